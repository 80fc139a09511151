"""Caches of nodes that no index holds any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llama_index.core.indices.base import BaseIndex
from llama_index.core.indices.vector_store import VectorStoreIndex
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.llms.kvlink.nodes import PREFIX, node_id
from llama_index.llms.kvlink.vector_store import listed

from kvlink_rag import InputError, KVLinkEngine

Holder = BaseIndex[Any] | BasePydanticVectorStore | Iterable[BaseNode | NodeWithScore | str]


def prune(engine: KVLinkEngine, *holders: Holder) -> int:
    """Release the caches of all nodes but those in ``holders``.

    For what nothing tells of: documents that were deleted without :class:`KVLinkVectorStore`, or
    indexed anew into a new index. Caches that LlamaIndex' nodes do not refer to are left alone.

    Args:
        holders: EVERY index, vector store, or list of nodes (or their ids) whose caches are in the
            engine's store and still needed.

    Returns:
        the number of caches removed.

    Raises:
        InputError: no holder, or one that cannot list its nodes.
    """
    if not holders:
        raise InputError(
            "prune without an index would release every cache: name each index, vector store or "
            "list of nodes that is still needed (an empty list releases everything)"
        )
    needed = set().union(*map(_node_ids, holders))
    stale = {ref for ref, _ in engine.store.references(PREFIX) if node_id(ref) not in needed}
    return engine.store.release(stale)


def _node_ids(holder: Holder) -> set[str]:
    if isinstance(holder, VectorStoreIndex):
        return _in_vector_index(holder)
    if isinstance(holder, BaseIndex):
        return set(holder.docstore.docs)
    if isinstance(holder, BasePydanticVectorStore):
        return listed(holder)
    if isinstance(holder, (str, BaseNode, NodeWithScore)) or not isinstance(holder, Iterable):
        raise InputError(
            f"prune was given a {type(holder).__name__}: pass indexes, vector stores or lists of "
            "nodes or node ids"
        )
    return {node if isinstance(node, str) else node.node_id for node in holder}


def _in_vector_index(index: VectorStoreIndex) -> set[str]:
    try:
        return listed(index.vector_store)
    except InputError:
        if index.vector_store.stores_text:
            raise
        return set(index.index_struct.nodes_dict.values())  # FAISS and others with vectors only
