"""The prompt at token level: prefix, chunks, question.

The model's own chat template is rendered once with place holders where user text goes and cut at
them. Template parts are tokenised with their special tokens; user text never yields one. Chunks
are tokenised alone and spliced in as ids, so a chunk's ids are the same in every prompt.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.text import valid
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.conversation import (
    CHUNKS,
    CHUNKS_MARK,
    TEXT_MARK,
    Marked,
    Message,
    as_messages,
)
from kvlink_rag.prompt.preamble import PREAMBLE

EncodeBehind = Literal["documents", "system", "header", "alone"]
"""What chunks are encoded behind: the default system prefix and made-up documents, that prefix by
itself, the bare chat header, or nothing."""

DEFAULT_BEHIND: EncodeBehind = "documents"

Turn = Literal["user", "system"]
"""In whose turn chunks stand, unless a message names their place."""

_FIXED_DATE = "01 Jan 2024"
_FIXED_DATE_MACRO = f"{{%- macro strftime_now(style) -%}}{_FIXED_DATE}{{%- endmacro -%}}"

CHUNKS_REMEMBERED = 1024
"""Chunks whose token ids are kept, so that a popular one is tokenised once."""

_CHUNK = "{title}\n{text}\n\n"


def render_chunk(chunk: Chunk, template: str = _CHUNK) -> str:
    """A chunk as the model reads it: its title on a line (if any), its text, and a blank line.

    No rank number is part of it: a chunk's tokens must not depend on where it is retrieved.

    Args:
        template: other words around title and text (``PromptTemplate.chunk``).
    """
    before, behind = template.split("{text}")
    if "{title}" in before:
        before = before.replace("{title}", chunk.title) if chunk.title else ""
    return before + chunk.text + behind


@dataclass(frozen=True)
class PromptTemplate:
    """The words around chunks and question.

    Args:
        before: text right before the first chunk; special tokens in it are special.
        question: text of the user's turn; ``{question}`` is where the question goes.
        options: extra variables for the model's chat template, e.g. ``{"enable_thinking": False}``;
            ``chat_template`` replaces it.
        chunk: a chunk's own words around ``{title}`` and ``{text}``. A chunk without a title leaves
            out what stands before ``{text}`` if ``{title}`` is there.
        system: default system prompt; None leaves the chat template's.
        turn: chunks open the last turn of the `user`, or close the `system` prompt.
    """

    before: str = "Documents:\n\n"
    question: str = "Using the documents above, answer briefly.\nQuestion: {question}"
    options: Mapping[str, Any] = field(default_factory=dict)
    chunk: str = _CHUNK
    system: str | None = None
    turn: Turn = "user"

    def __post_init__(self) -> None:
        if self.question.count("{question}") != 1:
            raise InputError(
                f"the question template {self.question!r} must contain {{question}} exactly once"
            )
        if self.chunk.count("{text}") != 1 or "{title}" in self.chunk.split("{text}")[1]:
            raise InputError(
                f"the chunk template {self.chunk!r} must contain {{text}} exactly once, and "
                "{title}, if at all, before it"
            )
        if self.turn not in get_args(Turn):
            raise InputError(f"turn must be one of {get_args(Turn)}, not {self.turn!r}")
        if self.turn == "system" and self.system is None:
            raise InputError("chunks in the system turn need a default system prompt: give system=")


@dataclass(frozen=True)
class PromptParts:
    """Token ids around the chunks.

    Attributes:
        prefix: before the first chunk; empty without chunks.
        question: behind the last chunk, up to where the answer starts.
        lasting: whether the prefix holds nothing that was said, only system prompts and the chat
            template's words, so that other questions have the same.
    """

    prefix: list[int]
    question: list[int]
    lasting: bool


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
        self._render = lru_cache(maxsize=64)(self._render_json)
        self._chunk = lru_cache(maxsize=CHUNKS_REMEMBERED)(self.encode_text)
        # Whether special tokens are text is a setting that transformers keeps in the tokenizer, for
        # all threads: ours is a tokenizer of its own, for one thread at a time.
        self._encoder = copy.deepcopy(tokenizer)
        self._encoding = threading.Lock()

    def lay_out(
        self,
        question: str | Sequence[Message],
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        with_chunks: bool = True,
    ) -> PromptParts:
        """The prompt around the chunks.

        Args:
            question: a text, or the messages of a conversation.
            system: replaces the default system prompt.
            tools: JSON schemas of functions, for a chat template that shows them.
            with_chunks: False leaves out the words around chunks, too.

        Raises:
            InputError: an empty question, messages that the chat template refuses or does not show
                whole, or tools that it does not show.
        """
        if tools and not self.supports_tools:
            raise InputError("the model's chat template shows no tools: leave tools out")
        return self._parts(as_messages(question, system), tools, with_chunks)

    def _parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        with_chunks: bool = True,
        fixed_date: bool = False,
    ) -> PromptParts:
        template = self.template
        if template.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": template.system}, *messages]
        words = (template.before, template.question) if with_chunks else ("", "")
        if template.turn == "user" or not with_chunks or any(map(_names_the_place, messages)):
            marked = Marked(messages, *words, with_chunks)
        else:
            marked = Marked(messages, "", template.question, with_chunks)
            _move_to_system_turn(marked, template.before)
        rendered = self._render(json.dumps([marked.messages, list(tools)]), fixed_date)
        numbers = sorted(int(number) for number in TEXT_MARK.findall(rendered))
        if numbers != list(range(len(marked.texts))) or rendered.count(CHUNKS_MARK) != with_chunks:
            raise InputError(
                "the model's chat template does not show every message exactly once, so the prompt "
                "cannot be split into prefix, chunks and question"
            )
        before, after = rendered.split(CHUNKS_MARK) if with_chunks else ("", rendered)
        roles = {marked.texts[int(number)][0] for number in TEXT_MARK.findall(before)}
        return PromptParts(self._ids(before, marked), self._ids(after, marked), roles <= {"system"})

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the model's chat template shows tools."""
        if not self.template.options.get("chat_template", self.tokenizer.chat_template):
            return False
        tool = {"name": "probe", "description": "", "parameters": {}}
        tools = [{"type": "function", "function": tool}]
        messages = [{"role": "user", "content": "question"}]
        plain, shown = (self._render(json.dumps([messages, t]), False) for t in ([], tools))
        return plain != shown

    def prefix(self, system: str | None = None) -> list[int]:
        """Token ids before the first chunk; ``system`` replaces the default system prompt."""
        return self.lay_out("question", system).prefix

    def question(self, question: str, system: str | None = None) -> list[int]:
        """Token ids behind the last chunk, up to where the answer starts.

        Raises:
            InputError: the question is not a text, or empty.
        """
        return self.lay_out(question, system).question

    def chunk(self, chunk: Chunk) -> list[int]:
        """Token ids of one chunk, encoded on its own; those of the last chunks are remembered."""
        return list(self._chunk(render_chunk(chunk, self.template.chunk)))

    def behind(self, mode: EncodeBehind) -> list[int]:
        """Token ids that chunks are encoded behind.

        They change neither with the user's system prompt nor with the day's date that some chat
        templates insert.

        Raises:
            InputError: there is no such mode.
        """
        if mode not in get_args(EncodeBehind):
            raise InputError(f"encode_behind must be one of {get_args(EncodeBehind)}, not {mode!r}")
        if mode == "alone":
            return []
        system = "" if mode == "header" else None
        prefix = self._parts(as_messages("question", system), fixed_date=True).prefix
        if mode == "documents":
            prefix = [*prefix, *(id for chunk in PREAMBLE for id in self.chunk(chunk))]
        return prefix

    def encode_text(self, text: str) -> list[int]:
        """Tokenise user text so that it stays text, whatever control strings it contains."""
        text = valid(text)
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
        with self._encoding:
            encoded = self._encoder(text, add_special_tokens=False, verbose=False, **options)
        return list(encoded["input_ids"])

    def _ids(self, template_text: str, marked: Marked) -> list[int]:
        """Template text with its special tokens, the marks in it replaced by texts."""
        ids: list[int] = []
        # every second piece is the number of a mark
        for place, piece in enumerate(TEXT_MARK.split(template_text)):
            ids += (
                self.encode_text(marked.texts[int(piece)][1]) if place % 2 else self._encode(piece)
            )
        return ids

    def _render_json(self, messages_and_tools: str, fixed_date: bool) -> str:
        """The rendered conversation, given as JSON to remember what was rendered before."""
        messages, tools = json.loads(messages_and_tools)
        options = dict(self.template.options)
        if not options.get("chat_template", self.tokenizer.chat_template):
            return self._render_plain(messages)
        if tools:
            options["tools"] = tools
        if fixed_date:
            # Some templates print today's date: a macro of that name hides transformers' function.
            template = self.tokenizer.get_chat_template(options.get("chat_template"))
            template = _FIXED_DATE_MACRO + template
            options |= {"chat_template": template, "date_string": _FIXED_DATE}
        try:
            return self._apply(messages, options)
        except TemplateError as error:
            if [m["role"] for m in messages[:2]] == ["system", "user"]:
                # no system role (Gemma 2): the user's turn carries it
                return self._apply(_without_system(messages), options)
            raise InputError(f"the model's chat template refuses the messages: {error}") from error

    def _render_plain(self, messages: Sequence[Message]) -> str:
        """For a model without a chat template."""
        bos = self.tokenizer.bos_token or ""
        if not bos or self.tokenizer("").get("input_ids") != [self.tokenizer.bos_token_id]:
            bos = ""
        forms = {"user": "{}\nAnswer:", "assistant": " {}\n\n"}
        return bos + "".join(
            forms.get(m["role"], "{}\n\n").format(m["content"]) for m in messages if m["content"]
        )

    def _apply(self, messages: Sequence[Message], options: dict[str, Any]) -> str:
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        return str(rendered)


def _names_the_place(message: Message) -> bool:
    return isinstance(message["content"], list) and CHUNKS in message["content"]


def _move_to_system_turn(marked: Marked, before: str) -> None:
    """Move the chunks from the user's turn to the end of the system prompt, the first message."""
    for message in marked.messages:
        if message["content"]:
            message["content"] = message["content"].replace(CHUNKS_MARK, "")
    marked.messages[0]["content"] += before + CHUNKS_MARK


def _without_system(messages: Sequence[Message]) -> list[Message]:
    system, user, *rest = messages
    texts = [text for text in (system["content"], user["content"]) if text]
    return [{**user, "content": "\n\n".join(texts)}, *rest]


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
