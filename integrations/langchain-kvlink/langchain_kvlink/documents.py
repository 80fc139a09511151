"""Documents, in every form in which they reach a chat model, as chunks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, format_document

from kvlink_rag import Chunk, InputError

DOCUMENT_BLOCKS = frozenset({"text-plain", "document"})
"""Types of content blocks that are documents."""


def as_chunk(
    document: Document | Mapping[str, Any] | str, document_prompt: BasePromptTemplate[str] | None
) -> Chunk | None:
    """The chunk that the model reads in the place of a document.

    Whoever encodes a document and whoever asks about it must come to the same text: this is the
    one place where it is made.

    Args:
        document: a document, a dict with ``page_content``, or a text.
        document_prompt: renders a document to the chunk's text; None shows ``page_content`` alone.

    Returns:
        None when there is no text to show.

    Raises:
        InputError: it is none of these, or lacks metadata that the prompt shows.
    """
    document = _as_document(document)
    if document_prompt is None:
        text = document.page_content
    else:
        try:
            text = format_document(document, document_prompt)
        except ValueError as error:
            raise InputError(f"document {document.id!r} cannot be shown: {error}") from error
    if not text.strip():
        return None
    return Chunk(text, id=document.id, metadata=document.metadata)


def as_chunks(documents: object, document_prompt: BasePromptTemplate[str] | None) -> list[Chunk]:
    """The chunks of documents, in order; those without text are left out.

    Raises:
        InputError: not a list, or as :func:`as_chunk`.
    """
    if isinstance(documents, (str, Document, Mapping)) or not isinstance(documents, Iterable):
        raise InputError(
            f"documents are a {type(documents).__name__}: pass a list of documents, not their text"
        )
    chunks = (as_chunk(document, document_prompt) for document in documents)
    return [chunk for chunk in chunks if chunk]


def block_chunk(block: Mapping[str, Any]) -> Chunk | None:
    """The chunk of a `text-plain` block, or of a `document` block with a text source.

    Its title is shown; ``context`` and ``extras`` are not. An id refers to the cache, but for those
    that LangChain made up for the block.

    Returns:
        None when there is no text to show.

    Raises:
        InputError: the block holds no text, only the place of one.
    """
    text = _base64_text(block) if block.get("base64") else block.get("text")
    if block["type"] == "document":
        source = block.get("source")
        source = source if isinstance(source, Mapping) else {}
        text = source.get("data") if source.get("type") == "text" else None
    if not isinstance(text, str):
        raise InputError(
            f"a {block['type']} block has no text, only {sorted(block)}: fetch it and put it in"
        )
    if not text.strip():
        return None
    id, title = block.get("id"), block.get("title")
    return Chunk(text, id=None if str(id).startswith("lc_") else id, title=title)


def _as_document(document: object) -> Document:
    if isinstance(document, Document):
        return document
    if isinstance(document, str):
        return Document(page_content=document)
    if isinstance(document, Mapping) and isinstance(document.get("page_content"), str):
        return Document(
            page_content=document["page_content"],
            metadata=document.get("metadata") or {},
            id=document.get("id"),
        )
    raise InputError(
        f"a document is {document!r}: it must be a Document, a dict with page_content, or a text"
    )


def _base64_text(block: Mapping[str, Any]) -> str:
    try:
        return base64.b64decode(block["base64"], validate=True).decode("utf-8")
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(f"a {block['type']} block is no base64 of UTF-8 text: {error}") from error
