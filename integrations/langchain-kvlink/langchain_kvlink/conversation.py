"""LangChain messages as the engine's: chat messages, and the chunks among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompts import BasePromptTemplate

from kvlink_rag import CHUNKS, Chunk, InputError
from langchain_kvlink.documents import DOCUMENT_BLOCKS, as_chunks, block_chunk

ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (SystemMessage, "system"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)


class Conversation:
    """What the engine is asked.

    Args:
        messages: documents may stand in them as content blocks, or as a tool's artifact.
        documents: more of them. Without any in the messages the engine chooses their place, and
            its own words around them.
        document_prompt: renders a document to its chunk's text.

    Attributes:
        messages: as ``KVLinkEngine.answer`` takes them, ``CHUNKS`` where the first document stood,
            even if that one was empty.
        chunks: all documents with a text, in order.

    Raises:
        InputError: a message or a document that the model cannot read.
    """

    def __init__(
        self,
        messages: Sequence[BaseMessage],
        documents: object = (),
        document_prompt: BasePromptTemplate[str] | None = None,
    ) -> None:
        self.chunks: list[Chunk] = []
        self._placed = False
        self._document_prompt = document_prompt
        self.messages = [self._message(place, message) for place, message in enumerate(messages)]
        self.chunks += as_chunks(documents, document_prompt)

    def _message(self, place: int, message: BaseMessage) -> dict[str, Any]:
        read: dict[str, Any] = {"role": _role(place, message)}
        found = _artifact(message)
        parts = self._put(as_chunks(found, self._document_prompt)) if found else []
        if not found:  # the text of a retriever's answer is that of its documents
            parts = [part for block in _blocks(message) for part in self._parts(place, block)]
        read["content"] = _joined(parts)
        if message.name:
            read["name"] = message.name
        if isinstance(message, AIMessage) and message.tool_calls:
            read["tool_calls"] = [
                {
                    "type": "function",
                    "id": call["id"],
                    "function": {"name": call["name"], "arguments": call["args"]},
                }
                for call in message.tool_calls
            ]
        if isinstance(message, ToolMessage):
            read["tool_call_id"] = message.tool_call_id
        return read

    def _parts(self, place: int, block: str | Mapping[str, Any]) -> list[Any]:
        """Texts, and ``CHUNKS`` for the first document."""
        if isinstance(block, str):
            return [block]
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            return [block["text"]]
        if kind in DOCUMENT_BLOCKS:
            chunk = block_chunk(block)
            return self._put([chunk] if chunk else [])
        raise InputError(
            f"message {place} has a block of type {kind!r}: the model reads text, so give it text "
            "or text-plain blocks"
        )

    def _put(self, chunks: Iterable[Chunk]) -> list[Any]:
        self.chunks += chunks
        first, self._placed = not self._placed, True
        return [CHUNKS] if first else []


def _role(place: int, message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in ROLES:
        if isinstance(message, kind):
            return role
    raise InputError(f"message {place} is a {type(message).__name__}: it cannot be said to a model")


def _artifact(message: BaseMessage) -> list[Document]:
    """The documents of a retriever tool's answer."""
    artifact = getattr(message, "artifact", None)
    if isinstance(artifact, (list, tuple)) and all(isinstance(a, Document) for a in artifact):
        return list(artifact)
    return []


def _blocks(message: BaseMessage) -> Iterator[str | Mapping[str, Any]]:
    """The parts of a message's content; of what a model said, only what it is shown again."""
    if isinstance(message.content, str):
        yield message.content
        return
    for block in message.content:
        shown = isinstance(block, str) or block.get("type") in {"text", *DOCUMENT_BLOCKS}
        if shown or not isinstance(message, AIMessage):
            yield block


def _joined(parts: Sequence[Any]) -> str | list[Any]:
    """Neighbouring texts become one: they are tokenised together, as one text would be."""
    joined: list[Any] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    if not joined:
        return ""
    return joined[0] if joined[0] is not CHUNKS and len(joined) == 1 else joined
