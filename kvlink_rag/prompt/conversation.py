"""Conversations: chat messages, and the place among them where the chunks stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvlink_rag.errors import InputError

Message = Mapping[str, Any]
"""A chat message: `role`, `content`, and what else the model's chat template reads (`tool_calls`,
`name`). The content is a text, None, or a list of texts with :data:`CHUNKS` among them."""


class _Chunks:
    """A class of its own, so that no text can be taken for it."""

    def __repr__(self) -> str:
        return "CHUNKS"


CHUNKS: Final = _Chunks()
"""In a message's content: here the chunks stand. At most once in a conversation; without it they
stand in the last message of the user, with the words of the engine's prompt around them."""

CHUNKS_MARK = "KVLINK0CHUNKS0"
TEXT_MARK = re.compile(r"KVLINK0TEXT(\d+)0")


class Marked:
    """Messages as a chat template is given them, with marks in the place of texts and chunks.

    Args:
        messages: checked (:func:`as_messages`).
        before, question: the words around chunks whose place is not named; ``{question}`` in the
            latter is the text of the user.
        with_chunks: whether there are any.

    Attributes:
        messages: with marks.
        texts: of each mark the role that said it, and the text.

    Raises:
        InputError: there are chunks, and no place for them.
    """

    def __init__(
        self, messages: Sequence[Message], before: str, question: str, with_chunks: bool
    ) -> None:
        self.texts: list[tuple[str, str]] = []
        self.messages: list[dict[str, Any]] = []
        named = any(_names_the_place(message) for message in messages)
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if with_chunks and not named and not users:
            raise InputError("there are chunks, but no message of the user for them to stand in")
        for place, message in enumerate(messages):
            content = self._mark(message, CHUNKS_MARK if with_chunks else "")
            if with_chunks and not named and place == users[-1]:
                content = before + CHUNKS_MARK + question.replace("{question}", content or "")
            self.messages.append({**message, "content": content})

    def _mark(self, message: Message, chunks_mark: str) -> str | None:
        content = message["content"]
        if content is None:
            return None
        marked = ""
        for part in [content] if isinstance(content, str) else content:
            if part is CHUNKS:
                marked += chunks_mark
            elif part:
                marked += f"KVLINK0TEXT{len(self.texts)}0"
                self.texts.append((message["role"], part))
        return marked


def as_messages(question: str | Sequence[Message], system: str | None = None) -> list[Message]:
    """A question, or a conversation, as checked messages.

    Args:
        system: a system prompt to put in front; None leaves the model's default.

    Raises:
        InputError: an empty question, no messages, one that is not as :data:`Message` says, or two
            system prompts.
    """
    if isinstance(question, str) and question.strip():
        messages: list[Message] = [{"role": "user", "content": question}]
    elif isinstance(question, Sequence) and not isinstance(question, str):
        messages = list(question)
    else:
        raise InputError(f"the question must be a text or chat messages, not {question!r}")
    if not messages:
        raise InputError("the question has no messages: give at least one of the user")
    for place, message in enumerate(messages):
        _check(place, message)
    if sum(map(_names_the_place, messages)) > 1:
        raise InputError("CHUNKS stands in more than one place: chunks stand together, once")
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise InputError("there is a system message and system=...: leave one of them out")
    return [{"role": "system", "content": system}, *messages]


def _check(place: int, message: object) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {place} is {message!r}: it must be a dict with role and content")
    content = message.get("content", ...)
    parts = content if isinstance(content, list) else [content]
    if content is not None and not all(isinstance(p, str) or p is CHUNKS for p in parts):
        raise InputError(
            f"message {place} has the content {content!r}: it must be a text, None, or a list of "
            "texts and CHUNKS"
        )
    if isinstance(content, list) and sum(part is CHUNKS for part in content) > 1:
        raise InputError("CHUNKS stands in more than one place: chunks stand together, once")


def _names_the_place(message: Message) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(part is CHUNKS for part in content)
