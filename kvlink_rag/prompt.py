"""The prompt at token level: prefix, chunks, question.

The model's own chat template is rendered once with place holders where user text goes and cut at
them. Template parts are tokenised with their special tokens; user text never yields one. Chunks
are tokenised alone and spliced in as ids, so a chunk's ids are the same in every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kvlink_rag.chunk import Chunk
from kvlink_rag.errors import InputError

EncodeBehind = Literal["system", "header", "alone"]
"""What chunks are encoded behind: the default system prefix, the bare chat header, or nothing."""

DEFAULT_BEHIND: EncodeBehind = "system"

_SYSTEM, _CHUNKS, _QUESTION = "KVLINK0SYSTEM0", "KVLINK0CHUNKS0", "KVLINK0QUESTION0"
_FIXED_DATE = "01 Jan 2024"
_FIXED_DATE_MACRO = f"{{%- macro strftime_now(style) -%}}{_FIXED_DATE}{{%- endmacro -%}}"


def render_chunk(chunk: Chunk) -> str:
    """A chunk as the model reads it: its title on a line (if any), its text, and a blank line.

    No rank number is part of it: a chunk's tokens must not depend on where it is retrieved.
    """
    return f"{chunk.title}\n{chunk.text}\n\n" if chunk.title else f"{chunk.text}\n\n"


@dataclass(frozen=True)
class PromptTemplate:
    """The words around chunks and question inside the user's turn.

    Args:
        before: text between the chat header and the first chunk.
        question: text behind the last chunk; ``{question}`` is where the question goes.
        options: extra variables for the model's chat template, e.g. ``{"enable_thinking": False}``.
    """

    before: str = "Documents:\n\n"
    question: str = "Using the documents above, answer briefly.\nQuestion: {question}"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.question.count("{question}") != 1:
            raise InputError(
                f"the question template {self.question!r} must contain {{question}} exactly once"
            )


class PromptLayout:
    """Token ids of the prompt's parts for one tokenizer.

    Args:
        tokenizer: of the model; without a chat template a plain text layout is used.
        template: the words around chunks and question.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or PromptTemplate()
        self._control_ids, self._control_pattern = _control_tokens(tokenizer)
        self._parts = lru_cache(maxsize=64)(self._render_parts)

    def prefix(self, system: str | None = None) -> list[int]:
        """Token ids before the first chunk; ``system`` replaces the default system prompt."""
        before, _ = self._parts(system is not None, False)
        return self._ids(before, system or "")

    def question(self, question: str, system: str | None = None) -> list[int]:
        """Token ids behind the last chunk, up to where the answer starts.

        Raises:
            InputError: the question is not a text, or empty.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"the question must be a text, not {question!r}")
        _, after = self._parts(system is not None, False)
        return self._ids(after, question)

    def chunk(self, chunk: Chunk) -> list[int]:
        """Token ids of one chunk, encoded on its own."""
        return self.encode_text(render_chunk(chunk))

    def behind(self, mode: EncodeBehind) -> list[int]:
        """Token ids that chunks are encoded behind.

        They change neither with the user's system prompt nor with the day's date that some chat
        templates insert.
        """
        if mode == "alone":
            return []
        before, _ = self._parts(mode == "header", True)
        return self._ids(before, "")

    def encode_text(self, text: str) -> list[int]:
        """Tokenise user text so that it stays text, whatever control strings it contains."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be tokenised
        ids = self._encode(text, split_special_tokens=True)
        if self._control_pattern and not self._control_ids.isdisjoint(ids):
            # Added tokens that are not flagged special (tool or thinking marks) are matched even
            # so: encode the text in pieces that break each of them after its first character.
            cuts = [0, *(m.start() + 1 for m in self._control_pattern.finditer(text)), len(text)]
            pieces = [text[a:b] for a, b in pairwise(cuts)]
            ids = [i for p in pieces for i in self._encode(p, split_special_tokens=True)]
        return ids

    def _encode(self, text: str, **options: Any) -> list[int]:
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
        return list(encoded["input_ids"])

    def _ids(self, template_text: str, user_text: str) -> list[int]:
        """Template text with its special tokens, the place holder in it replaced by user text."""
        ids: list[int] = []
        for piece in re.split(f"({_SYSTEM}|{_QUESTION})", template_text):
            if piece in (_SYSTEM, _QUESTION):
                ids += self.encode_text(user_text) if user_text else []
            else:
                ids += self._encode(piece)
        return ids

    def _render_parts(self, with_system: bool, fixed_date: bool) -> tuple[str, str]:
        """The rendered prompt before and behind the chunks, place holders in it."""
        user = self.template.before + _CHUNKS + self.template.question.format(question=_QUESTION)
        rendered = self._render(user, with_system, fixed_date)
        for mark in (_CHUNKS, _QUESTION, *([_SYSTEM] if with_system else [])):
            if rendered.count(mark) != 1:
                raise InputError(
                    "the model's chat template does not show the user's message exactly once, so "
                    "the prompt cannot be split into prefix, chunks and question"
                )
        before, after = rendered.split(_CHUNKS)
        return before, after

    def _render(self, user: str, with_system: bool, fixed_date: bool) -> str:
        if not self.tokenizer.chat_template:
            bos = self.tokenizer.bos_token or ""
            starts_with_bos = bos and self.tokenizer("").get("input_ids") == [
                self.tokenizer.bos_token_id
            ]
            system = f"{_SYSTEM}\n\n" if with_system else ""
            return f"{bos if starts_with_bos else ''}{system}{user}\nAnswer:"
        options = dict(self.template.options)
        if fixed_date:
            # Some templates print today's date: a macro of that name hides transformers' function.
            template = _FIXED_DATE_MACRO + self.tokenizer.get_chat_template()
            options |= {"chat_template": template, "date_string": _FIXED_DATE}
        messages = [{"role": "user", "content": user}]
        if not with_system:
            return self._apply(messages, options)
        try:
            return self._apply([{"role": "system", "content": _SYSTEM}, *messages], options)
        except TemplateError:  # no system role (Gemma 2): the user's turn carries it
            return self._apply([{"role": "user", "content": f"{_SYSTEM}\n\n{user}"}], options)

    def _apply(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        return str(rendered)


def _control_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[frozenset[int], re.Pattern[str] | None]:
    """Added tokens that steer the model: those flagged special, and marks such as ``<think>``."""
    control = {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or re.fullmatch(r"[<\[|].*[>\]|]", token.content.strip())
    }
    if not control:
        return frozenset(), None
    longest_first = sorted(set(control.values()), key=len, reverse=True)
    pattern = "|".join(re.escape(text) for text in longest_first)
    return frozenset(control), re.compile(pattern)
