"""Tiny models whose chat templates show tools, and that say what they are told to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import scripted
import tiny
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from kvlink_rag import KVLinkEngine
from kvlink_rag.runners.base import Job

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


def say(engine: KVLinkEngine, text: str) -> Callable[[], None]:
    """From now on every answer is this text, token by token, with its special tokens.

    Returns:
        takes it back.
    """
    ids: Sequence[int] = engine.tokenizer(f"{text}<|end|>", add_special_tokens=False)["input_ids"]

    return scripted.rewrite(engine, lambda job, own: iter(ids))


def obliging_engine() -> KVLinkEngine:
    """Calls the first tool that it is shown, with arguments of the right types; then says Done."""
    made = engine()

    def tokens(job: Job, own: Iterator[int]) -> Iterator[int]:
        prompt = made.tokenizer.decode(job.prompt.token_ids)
        tool = re.search(r'^\{"type": "function".*\}$', prompt, re.MULTILINE)
        answered = "<|start|>tool\n" in prompt
        text = _call(json.loads(tool[0]), prompt) if tool and not answered else "Done."
        ids = made.tokenizer(f"{text}<|end|>", add_special_tokens=False)["input_ids"]
        yield from ids

    scripted.rewrite(made, tokens)
    return made


def _call(tool: dict[str, Any], prompt: str) -> str:
    function = tool["function"]
    properties = function["parameters"]["properties"]
    said = prompt.rsplit("<|start|>user\n", 1)[1].split("<|end|>")[0]
    values = {"integer": 3, "string": said}
    arguments = {
        name: properties[name].get("enum", [values.get(properties[name].get("type"))])[0]
        for name in function["parameters"].get("required", ())
    }
    call = {"name": function["name"], "arguments": arguments}
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"
