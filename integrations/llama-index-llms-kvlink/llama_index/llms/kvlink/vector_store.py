"""A vector store whose nodes and their caches come and go together."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.llms.kvlink.holder import EngineHandle, EngineHolder
from llama_index.llms.kvlink.nodes import PREFIX, document_prefix, node_chunks, node_id

from kvlink_rag import InputError, KVLinkEngine


class KVLinkVectorStore(EngineHolder, BasePydanticVectorStore):
    """Any vector store, with chunk caches that are released when their nodes are deleted.

    Indexes and pipelines delete by calling their vector store (``delete_ref_doc``,
    ``refresh_ref_docs``, ``delete_nodes``, the upserts of an ``IngestionPipeline``), so this is
    where caches can follow. Nodes that are added get their caches here unless
    :class:`KVLinkTransform` has stored them, as when an ``IngestionCache`` skipped it.

    A document's deletion releases what any of its nodes refer to in the engine's store. Two indexes
    with the same documents need a store each: ``engine.with_store("another-folder")``.

    Args:
        vector_store: holds vectors and nodes, and does all else.
        engine: whose store holds the caches.
        show_progress: a progress bar on stderr while nodes are encoded here.

    Pickling is refused.
    """

    _handle: EngineHandle = PrivateAttr()
    _inner: BasePydanticVectorStore = PrivateAttr()
    _show_progress: bool = PrivateAttr()

    def __init__(
        self,
        vector_store: BasePydanticVectorStore,
        engine: KVLinkEngine,
        show_progress: bool = True,
    ) -> None:
        super().__init__(
            stores_text=vector_store.stores_text,
            is_embedding_query=vector_store.is_embedding_query,
        )
        self._inner = vector_store
        self._show_progress = show_progress
        self._handle = EngineHandle(lambda: engine)

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised components."""
        return "KVLinkVectorStore"

    @property
    def inner(self) -> BasePydanticVectorStore:
        """The vector store that was given."""
        return self._inner

    @property
    def client(self) -> Any:
        """The inner store's client."""
        return self._inner.client

    # Adding

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store the nodes' caches where they are missing, then add the nodes.

        Raises:
            InputError: a node is longer than the model's context; no node is added.
        """
        self.engine.index(node_chunks(nodes), progress=self._show_progress)
        return self._inner.add(list(nodes), **kwargs)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """:meth:`add`; the event loop stays free."""
        await self.engine.aindex(node_chunks(nodes), progress=self._show_progress)
        return await self._inner.async_add(list(nodes), **kwargs)

    # Deleting: first the nodes, so that a failure leaves caches to spare and not nodes without

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a document's nodes and release their caches."""
        self._inner.delete(ref_doc_id, **delete_kwargs)
        self._release_document(ref_doc_id)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """:meth:`delete`; the event loop stays free."""
        await self._inner.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._release_document, ref_doc_id)

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete nodes and release their caches.

        Raises:
            InputError: filters, on a vector store that cannot list its nodes.
        """
        before = None if filters is None and node_ids is not None else listed(self._inner)
        self._inner.delete_nodes(node_ids, filters, **delete_kwargs)
        self._release(node_ids or () if before is None else before - listed(self._inner))

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """:meth:`delete_nodes`; the event loop stays free."""
        before = None if filters is None and node_ids is not None else listed(self._inner)
        await self._inner.adelete_nodes(node_ids, filters, **delete_kwargs)
        gone = node_ids or () if before is None else before - listed(self._inner)
        await asyncio.to_thread(self._release, gone)

    def clear(self) -> None:
        """Delete all nodes and release their caches."""
        before = listed(self._inner)
        self._inner.clear()
        self._release(before)

    async def aclear(self) -> None:
        """:meth:`clear`; the event loop stays free."""
        before = listed(self._inner)
        await self._inner.aclear()
        await asyncio.to_thread(self._release, before)

    def _release_document(self, ref_doc_id: str) -> None:
        store = self.engine.store
        store.release({document for document, _ in store.references(document_prefix(ref_doc_id))})

    def _release(self, gone: Collection[str]) -> None:
        store, gone = self.engine.store, set(gone)
        store.release({ref for ref, _ in store.references(PREFIX) if node_id(ref) in gone})

    # All else is the inner store's

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The inner store's answer; the caches of its nodes begin to load."""
        found = self._inner.query(query, **kwargs)
        self.engine.prefetch(node_chunks(found.nodes or ()))
        return found

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The inner store's answer; the caches of its nodes begin to load."""
        found = await self._inner.aquery(query, **kwargs)
        self.engine.prefetch(node_chunks(found.nodes or ()))
        return found

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The inner store's nodes."""
        return self._inner.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The inner store's nodes."""
        return await self._inner.aget_nodes(node_ids, filters)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Persist the inner store; caches lie in the engine's store, which needs no call."""
        self._inner.persist(persist_path, fs=fs)


def listed(vector_store: BasePydanticVectorStore) -> set[str]:
    """The ids of all nodes in a vector store.

    Raises:
        InputError: it cannot list them.
    """
    if isinstance(vector_store, KVLinkVectorStore):
        return listed(vector_store.inner)
    if isinstance(vector_store, SimpleVectorStore):
        return set(vector_store.data.embedding_dict)
    try:
        return {node.node_id for node in vector_store.get_nodes()}
    except NotImplementedError as error:
        raise InputError(
            f"{type(vector_store).__name__} cannot list its nodes: name nodes by their ids, and "
            "give prune the nodes that are still needed"
        ) from error
