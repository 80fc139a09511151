"""Nodes as chunks, and the ids by which a store of chunk caches remembers them.

A reference names the document and the node, so that caches go with either. Nodes get new ids each
time a document is split, documents keep theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from kvlink_rag import Chunk, InputError

PREFIX = "llama_index:"
"""Starts every reference from here: a store may hold other owners' caches, too."""

TextOrNode = str | Chunk | BaseNode | NodeWithScore


def reference(node: BaseNode) -> str:
    """The id under which a store remembers that a node needs its cache."""
    return PREFIX + json.dumps([node.ref_doc_id, node.node_id])


def document_prefix(ref_doc_id: str) -> str:
    """How the references of a document's nodes begin."""
    return f"{PREFIX}[{json.dumps(ref_doc_id)}, "


def node_id(reference: str) -> str:
    """The node's id in a reference."""
    return str(json.loads(reference.removeprefix(PREFIX))[1])


def text_of(node: BaseNode) -> str:
    """What a response synthesizer gives the model of a node."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def node_chunks(nodes: Iterable[BaseNode]) -> list[Chunk]:
    """Nodes as chunks; those without text are left out."""
    chunks = [Chunk(text_of(node), id=reference(node)) for node in nodes]
    return [chunk for chunk in chunks if chunk.text.strip()]


def as_chunks(documents: Sequence[TextOrNode]) -> list[Chunk]:
    """Texts, chunks, nodes and retrieved nodes as chunks.

    Raises:
        InputError: not a list of these.
    """
    if isinstance(documents, (str, Chunk, BaseNode, NodeWithScore)):
        raise InputError("documents must be a list, not one document: pass [document]")
    return [_as_chunk(place, document) for place, document in enumerate(documents)]


def _as_chunk(place: int, document: TextOrNode) -> Chunk:
    if isinstance(document, str):
        return Chunk(document)
    if isinstance(document, Chunk):
        return document
    node = document.node if isinstance(document, NodeWithScore) else document
    if not isinstance(node, BaseNode):
        raise InputError(
            f"document {place} is a {type(node).__name__}: documents are texts, nodes, retrieved "
            "nodes or kvlink_rag.Chunk"
        )
    return Chunk(text_of(node), id=reference(node))
