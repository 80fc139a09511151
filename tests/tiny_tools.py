"""Tiny models whose chat templates show tools, and that say what they are told to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tiny
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from kvlink_rag import KVLinkEngine

CHAT_TEMPLATE = (
    "{% if tools %}<|start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """:func:`tiny.tokenizer` with the marks of calls: Qwen's are plain, Mistral's is special."""
    backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    backend.add_tokens(
        [AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")]
    )
    backend.add_special_tokens(["[TOOL_CALLS]"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def engine() -> KVLinkEngine:
    """Its own one for each caller, so that a script is nobody else's."""
    return KVLinkEngine.from_pretrained((tiny.model("llama"), tokenizer()))


def say(engine: KVLinkEngine, text: str) -> None:
    """From now on every answer is this text, token by token, with its special tokens."""
    ids: Sequence[int] = engine.tokenizer(f"{text}<|end|>", add_special_tokens=False)["input_ids"]

    def tokens(prefill: Any, sampler: Any, first: int, count: int) -> Iterator[int]:
        yield from ids[:count]

    engine._tokens = tokens  # type: ignore[method-assign]
