"""A vector store whose documents come with their chunk caches."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import BasePromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from typing_extensions import Self

from kvlink_rag import InputError, KVLinkEngine
from langchain_kvlink.caches import DocumentCaches


def _passed_on(name: str) -> Any:
    """A method that is the wrapped store's, called as it was called."""

    def method(self: KVLinkVectorStore, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.vectorstore, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"``{name}`` of the wrapped store."
    return method


def _searched(name: str) -> Any:
    """A search of the wrapped store; the caches of what it finds begin to load meanwhile."""

    def method(self: KVLinkVectorStore, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self.vectorstore, name)(*args, **kwargs)
        self._caches.prefetch(found)
        return found

    async def amethod(self: KVLinkVectorStore, *args: Any, **kwargs: Any) -> Any:
        found = await getattr(self.vectorstore, name)(*args, **kwargs)
        self._caches.prefetch(found)
        return found

    made = amethod if name.startswith("a") else method
    made.__name__ = name
    made.__doc__ = f"``{name}`` of the wrapped store."
    return made


class KVLinkVectorStore(VectorStore):
    """Any vector store, with a chunk cache for each of its documents.

    Adding documents also encodes them; deleting them, or changing their text, drops their caches.
    What is there already costs nothing, a change of metadata that the model does not see neither.
    Searches are the wrapped store's; the caches of what they find begin to load at once. Also for
    ``langchain_core.indexing.index``.

    The caches are in the engine's store, referred to by the documents' ids: two vector stores that
    give the same id to different documents need an engine store each
    (``engine.with_store(folder)``).

    Args:
        vectorstore: the store to wrap. Documents that it has already get their caches when they are
            first asked about, or when they are added again.
        engine: the one that answers, or a twin with the same store.
        document_prompt: renders a document to the text that the model reads; None shows
            ``page_content`` alone. Give the same to :class:`ChatKVLink`.
        show_progress: a progress bar on stderr while documents are encoded.

    Raises:
        InputError: one of these is something else.
    """

    def __init__(
        self,
        vectorstore: VectorStore,
        engine: KVLinkEngine,
        document_prompt: BasePromptTemplate[str] | None = None,
        *,
        show_progress: bool = True,
    ) -> None:
        if not isinstance(vectorstore, VectorStore):
            raise InputError(
                f"vectorstore is a {type(vectorstore).__name__}: pass a LangChain VectorStore"
            )
        if not isinstance(engine, KVLinkEngine):
            raise InputError(
                f"engine is a {type(engine).__name__}: pass a kvlink_rag.KVLinkEngine, such as "
                "ChatKVLink(...).engine"
            )
        self.vectorstore = vectorstore
        self.engine = engine
        self._caches = DocumentCaches(engine, document_prompt, show_progress)

    @property
    def embeddings(self) -> Embeddings | None:
        """The wrapped store's."""
        return self.vectorstore.embeddings

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        engine: KVLinkEngine | None = None,
        vectorstore_class: type[VectorStore] = InMemoryVectorStore,
        document_prompt: BasePromptTemplate[str] | None = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Make and fill a vector store; also behind ``from_documents`` and the async twins.

        Args:
            engine: as above; needed.
            vectorstore_class: made with its own ``from_texts`` and wrapped.
            kwargs: further arguments of that.

        Raises:
            InputError: no engine, or a text that cannot be encoded.
        """
        if not isinstance(engine, KVLinkEngine):
            raise InputError(f"engine is {engine!r}: pass a kvlink_rag.KVLinkEngine")
        given = ids or [None] * len(texts)
        known = [id or str(uuid.uuid4()) for id in given]
        caches = DocumentCaches(engine, document_prompt, show_progress)
        held = caches.hold(
            Document(page_content=text, metadata=metadata)
            for text, metadata in zip(texts, metadatas or [{}] * len(texts), strict=True)
        )
        try:
            made = vectorstore_class.from_texts(texts, embedding, metadatas, ids=known, **kwargs)
        except BaseException:
            caches.let_go(held)
            raise
        caches.refer(known, held)
        return cls(made, engine, document_prompt, show_progress=show_progress)

    # Adding: caches first, so that a document that can be found has its cache. If the wrapped store
    # then fails, they are dropped again; what it had is as it was.

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Encode documents and add them to the wrapped store, or put them in the place of others.

        Args:
            kwargs: of the wrapped store's ``add_documents``, `ids` among them.

        Returns:
            their ids.

        Raises:
            InputError: a document cannot be encoded; nothing is added.
            StoreError: the caches cannot be kept.
        """
        held = self._caches.hold(documents)
        try:
            ids = self.vectorstore.add_documents(documents, **kwargs)
        except BaseException:
            self._caches.let_go(held)
            raise
        self._caches.refer(ids, held)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """:meth:`add_documents`; encoding runs in a thread. Cancelled, it first cleans up."""
        holding = asyncio.ensure_future(asyncio.to_thread(self._caches.hold, documents))
        try:
            held = await asyncio.shield(holding)
            ids = await self.vectorstore.aadd_documents(documents, **kwargs)
        except BaseException:
            await asyncio.wait([holding])  # the thread goes on when its task is cancelled
            if not holding.cancelled() and not holding.exception():
                await asyncio.to_thread(self._caches.let_go, holding.result())
            raise
        await asyncio.to_thread(self._caches.refer, ids, held)
        return ids

    # Deleting: caches last, so that a document that is still there keeps its cache.

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Delete from the wrapped store, and drop the caches.

        Args:
            ids: None deletes whatever the wrapped store makes of it, and of ``kwargs``.

        Returns:
            what the wrapped store returns; after False all caches stay.

        Raises:
            NotImplementedError: no ids, and the wrapped store cannot tell which it has
                (``get_by_ids``); nothing is deleted.
        """
        gone = ids if ids is not None else _ids(self.get_by_ids(self._caches.documents()))
        deleted = self.vectorstore.delete(ids, **kwargs)
        stay = _ids(self.get_by_ids(gone)) if ids is None and gone else []
        if deleted is not False:
            self._caches.release(set(gone) - set(stay))
        return deleted

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """:meth:`delete`; caches are dropped in a thread."""
        gone = ids
        if gone is None:
            known = await asyncio.to_thread(self._caches.documents)
            gone = _ids(await self.aget_by_ids(known))
        deleted = await self.vectorstore.adelete(ids, **kwargs)
        stay = _ids(await self.aget_by_ids(gone)) if ids is None and gone else []
        if deleted is not False:
            await asyncio.to_thread(self._caches.release, set(gone) - set(stay))
        return deleted

    # Searching

    def similarity_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        """``similarity_search`` of the wrapped store."""
        found = self.vectorstore.similarity_search(*args, **kwargs)
        self._caches.prefetch(found)
        return found

    get_by_ids = _passed_on("get_by_ids")
    search = _searched("search")
    similarity_search_with_score = _searched("similarity_search_with_score")
    similarity_search_with_relevance_scores = _searched("similarity_search_with_relevance_scores")
    similarity_search_by_vector = _searched("similarity_search_by_vector")
    max_marginal_relevance_search = _searched("max_marginal_relevance_search")
    max_marginal_relevance_search_by_vector = _searched("max_marginal_relevance_search_by_vector")

    aget_by_ids = _passed_on("aget_by_ids")
    asearch = _searched("asearch")
    asimilarity_search = _searched("asimilarity_search")
    asimilarity_search_with_score = _searched("asimilarity_search_with_score")
    asimilarity_search_with_relevance_scores = _searched("asimilarity_search_with_relevance_scores")
    asimilarity_search_by_vector = _searched("asimilarity_search_by_vector")
    amax_marginal_relevance_search = _searched("amax_marginal_relevance_search")
    amax_marginal_relevance_search_by_vector = _searched("amax_marginal_relevance_search_by_vector")

    _select_relevance_score_fn = _passed_on("_select_relevance_score_fn")
    _similarity_search_with_relevance_scores = _passed_on(
        "_similarity_search_with_relevance_scores"
    )
    _asimilarity_search_with_relevance_scores = _passed_on(
        "_asimilarity_search_with_relevance_scores"
    )


def _ids(documents: Sequence[Document]) -> list[str]:
    return [str(document.id) for document in documents]
