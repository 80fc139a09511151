"""LlamaIndex' chat messages as the engine's, with the documents that stand in them.

A document inside a message is a ``CitableBlock``: its text is a chunk, its source the id that
refers to the chunk's cache, its title (may be empty) the chunk's title.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)

from kvlink_rag import CHUNKS, Chunk, InputError, Message

ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
"""Roles that chat templates know by another name."""


def to_engine(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[Chunk]]:
    """Messages for the engine, and the documents that stand in them.

    Raises:
        InputError: a block that is neither text nor a document.
    """
    chunks: list[Chunk] = []
    return [_message(place, message, chunks) for place, message in enumerate(messages)], chunks


def _message(place: int, message: ChatMessage, chunks: list[Chunk]) -> Message:
    parts: list[Any] = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            # several texts stand on lines of their own, as in ChatMessage.content
            parts += ["\n", block.text] if parts and parts[-1] is not CHUNKS else [block.text]
        elif isinstance(block, CitableBlock):
            chunks.append(_chunk(place, block))
            if not parts or parts[-1] is not CHUNKS:
                parts.append(CHUNKS)
        elif not isinstance(block, (ThinkingBlock, CachePoint)):  # what the model never reads
            raise _not_text(place, block)
    content = parts if CHUNKS in parts else "".join(parts)
    return {"role": ROLES.get(message.role, message.role.value), "content": content}


def _chunk(place: int, block: CitableBlock) -> Chunk:
    texts = []
    for part in block.content:
        if not isinstance(part, TextBlock):
            raise _not_text(place, part)
        texts.append(part.text)
    return Chunk("\n".join(texts), id=block.source or None, title=block.title or None)


def to_block(chunk: Chunk) -> CitableBlock:
    """A chunk as part of a message."""
    return CitableBlock(
        title=chunk.title or "", source=chunk.id or "", content=[TextBlock(text=chunk.text)]
    )


def put_documents(
    messages: Sequence[ChatMessage], place: str, chunks: Sequence[Chunk]
) -> list[ChatMessage] | None:
    """The messages with documents where the text ``place`` stands; None if it stands nowhere.

    Raises:
        InputError: it stands more than once.
    """
    count = sum(
        block.text.count(place)
        for message in messages
        for block in message.blocks
        if isinstance(block, TextBlock)
    )
    if count > 1:
        raise InputError(
            f"the prompt has {{context_str}} in {count} places: chunks stand together, once"
        )
    return [_with_documents(message, place, chunks) for message in messages] if count else None


def _with_documents(message: ChatMessage, place: str, chunks: Sequence[Chunk]) -> ChatMessage:
    blocks: list[Any] = []
    for block in message.blocks:
        if isinstance(block, TextBlock) and place in block.text:
            before, after = block.text.split(place)
            documents = [to_block(chunk) for chunk in chunks]
            parts = [before, *documents, after] if documents else [before + after]
            blocks += [TextBlock(text=p) if isinstance(p, str) else p for p in parts]
        else:
            blocks.append(block)
    return ChatMessage(
        role=message.role, blocks=blocks, additional_kwargs=message.additional_kwargs
    )


def _not_text(place: int, block: Any) -> InputError:
    return InputError(
        f"message {place} has a {type(block).__name__}: the model reads text (TextBlock) and "
        "documents of text (CitableBlock)"
    )
