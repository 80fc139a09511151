"""A searchable index whose chunks come with their KV caches: FAISS + texts + an engine."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvlink_rag.chunk import Chunk, ScoredChunk, as_chunks
from kvlink_rag.common.progress import Parts, TokenProgress, bar, token_progress
from kvlink_rag.engine.questions import Case, spread, write_questions
from kvlink_rag.engine.tune import TuneSettings, Tuning
from kvlink_rag.errors import IndexMismatchError, InputError, StoreError
from kvlink_rag.index import catalog as sql
from kvlink_rag.index import check as index_check
from kvlink_rag.index.behind import behind_to_record, recorded_behind
from kvlink_rag.index.catalog import CACHES, IndexCatalog, IndexStat
from kvlink_rag.index.check import Progress
from kvlink_rag.index.cost import to_encode
from kvlink_rag.index.embeddings import (
    Embeddings,
    SentenceEmbeddings,
    Vectors,
    embed,
    embedding_name,
)
from kvlink_rag.index.vectors import FLAT_LIMIT, VectorTable
from kvlink_rag.store import (
    Budget,
    EncryptionKey,
    KVStore,
    Remote,
    StoreCheck,
    open_store,
)
from kvlink_rag.store.codec import check_codec
from kvlink_rag.tuning.codec import AUTO, resolve_codec

if TYPE_CHECKING:
    from kvlink_rag.engine.answer import Answer, AnswerStream
    from kvlink_rag.engine.engine import KVLinkEngine

BATCH = 64
"""Chunks that are committed together: a killed process loses no more of its work."""


class KVIndex:
    """Texts, their vectors and their chunk caches in one folder.

    Open it with :meth:`open`. A chunk is in the index wholly or not at all, whenever a process is
    killed. Several threads and processes may use one folder: changes are made one batch at a time
    and seen by the next search of every other.

    Attributes:
        engine: the engine given, with its store in this folder.
        embeddings: what turns texts into vectors.
        store: the chunk caches.
    """

    def __init__(
        self,
        catalog: IndexCatalog,
        store: KVStore,
        engine: KVLinkEngine,
        embeddings: Embeddings,
        flat_limit: int = FLAT_LIMIT,
    ) -> None:
        self.engine = engine
        self.embeddings = embeddings
        self.store = store
        self.catalog = catalog
        self._table = VectorTable(catalog.folder, flat_limit)
        self._searching = threading.RLock()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        engine: KVLinkEngine,
        *,
        embeddings: Embeddings | None = None,
        codec: str | None = None,
        budget: Budget | int | None = None,
        encryption_key: EncryptionKey | None = None,
        remote: str | Remote | None = None,
        cache_after: int = 0,
    ) -> KVIndex:
        """Open the index in a folder, or begin one.

        Args:
            folder: made with mode 0700 when it is not there. A read-only one can be searched.
            engine: encodes and answers. Another model than before is allowed: its chunk caches are
                computed when they are first needed. One that was not told what chunks are encoded
                behind takes what the index was made with.
            embeddings: texts to vectors ``[texts, dim]``; None takes
                ``sentence-transformers/all-MiniLM-L6-v2``.
            codec: what a new index keeps its caches as (:mod:`kvlink_rag.store.codec`); None is
                ``int8``, or what the index has; ``auto`` measures for a new one which does
                (:func:`kvlink_rag.tuning.codec.choose_codec`).
            budget: most bytes that its caches may take (:class:`kvlink_rag.store.FolderStore`).
            encryption_key: of its caches (:class:`kvlink_rag.store.FolderStore`). Texts, vectors
                and ids are not encrypted: keep the folder on an encrypted disk for that.
            remote, cache_after: as for :func:`kvlink_rag.store.open_store`.

        Raises:
            StoreError: the folder cannot be used, is damaged, or a newer version made it.
            IndexMismatchError: the index was made with other embeddings.
            InputError: the embeddings return no vectors, or the index has another codec.
        """
        if codec is not None and codec != AUTO:
            check_codec(codec)
        embeddings = SentenceEmbeddings() if embeddings is None else embeddings
        catalog = IndexCatalog(folder, create=True)
        try:
            _check_embeddings(catalog, embeddings)
            store = open_store(
                catalog.folder / CACHES,
                codec=resolve_codec(codec, catalog.folder / CACHES, engine),
                budget=budget,
                encryption_key=encryption_key,
                remote=remote,
                cache_after=cache_after,
            )
        except BaseException:
            catalog.close()
            raise
        engine = engine.with_store(store)
        if (behind := recorded_behind(catalog, engine.adapter)) is not None:
            engine = engine.with_encode_behind(behind, override=False)
        index = cls(catalog, store, engine, embeddings)
        if not catalog.readonly:
            index._table.forget_later(catalog.generation())
        return index

    def add(
        self, chunks: Iterable[str | Chunk], progress: bool | TokenProgress = True
    ) -> list[str]:
        """Encode, embed and keep chunks; what is there already costs nothing.

        A chunk with a known id and another text or title takes its place. The vector is that of the
        title, if there is one, and the text.

        Args:
            chunks: texts or chunks. A chunk without an id gets one from its text.
            progress: True shows a progress bar; a function is called with (tokens encoded, tokens
                to encode) after each batch of the model.

        Returns:
            the ids, one for each chunk given.

        Raises:
            InputError: a chunk, its metadata or its vector cannot be kept.
            IndexMismatchError: the vectors have another dimension than those of the index.
            StoreError: the folder cannot be written to. Batches before are kept.
        """
        listed = as_chunks(chunks)
        for chunk in listed:  # refused now, not after the work of encoding
            sql.metadata_json(chunk)
        # the last of those with one id counts, as if they were added one by one
        distinct = list({chunk.document_id: chunk for chunk in listed}.values())
        if len(distinct) > BATCH:
            self._add_batches(distinct, progress)
        elif distinct:  # the engine tells of all there is
            self._add_batch(distinct, progress)
        return [chunk.document_id for chunk in listed]

    def delete(self, ids: Iterable[str]) -> int:
        """Remove chunks, their vectors and the caches that no other chunk needs.

        Returns:
            the number of chunks removed; unknown ids are ignored.

        Raises:
            StoreError: the folder cannot be written to.
        """
        ids = _as_ids(ids)
        with self.catalog.only_writer():
            self.catalog.finish_releases(self.store)
            with self.catalog.writing() as tx:
                gone = sql.delete_rows(tx, ids)
                sql.plan_release(tx, gone, keep=())
            self.catalog.finish_releases(self.store)
        return len(gone)

    def search(self, question: str, k: int = 4) -> list[ScoredChunk]:
        """The ``k`` chunks (or all, if there are fewer) nearest to a question, best first.

        Raises:
            InputError: an empty question, or ``k`` is no positive whole number.
            IndexMismatchError: the vectors have another dimension than those of the index.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"question is {question!r}: ask with a text")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InputError(f"k is {k!r}: it is the number of chunks, 1 or more")
        dim = int(self.catalog.meta("embedding_dim") or 0)
        if dim == 0:
            return []  # nothing was ever added
        vector = embed(self.embeddings, [question])  # [1, dim]
        _check_dim(self.catalog, vector.shape[1])
        with self._searching, self.catalog.reading() as tx:
            self._table.sync(tx, sql.generation_of(tx), dim)
            scores = self._table.search(vector, k)
            rows = sql.rows_of(tx, list(scores))
        return [_scored(chunk, scores[number]) for number, chunk in rows]

    def ask(self, question: str, k: int = 4, **settings: Any) -> Answer:
        """Search, and answer from what was found; ``settings`` are those of ``engine.answer``."""
        return self.engine.answer(question, self.search(question, k), **settings)

    def stream(self, question: str, k: int = 4, **settings: Any) -> AnswerStream:
        """Search, and answer piece by piece; ``settings`` are those of ``engine.stream``."""
        return self.engine.stream(question, self.search(question, k), **settings)

    def tune(self, questions: Iterable[str] = (), settings: TuneSettings | None = None) -> Tuning:
        """Find what ``strategy="auto"`` is to be here, by :meth:`cases` (KVLinkEngine.tune)."""
        settings = settings or TuneSettings()
        return self.engine.tune(asked=self.cases(questions, settings), settings=settings)

    def cases(self, questions: Iterable[str], settings: TuneSettings) -> list[Case]:
        """Questions as they would be asked, each with the chunks that are found for it.

        Where there are none, the model writes some about chunks from all over the index.
        """
        asked = list(questions)
        if not asked:
            about = self.get(spread(self.ids(), settings.questions))
            asked = write_questions(self.engine.pipeline.unwatched, about)
        return [(question, self.search(question, settings.k)) for question in asked]

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        """Chunks by id, in the order asked for; unknown ids are left out."""
        return self.catalog.get(_as_ids(ids))

    def ids(self) -> list[str]:
        """All ids, in the order of their last change."""
        return self.catalog.ids()

    def __len__(self) -> int:
        return len(self.catalog)

    def __contains__(self, id: object) -> bool:
        return id in self.catalog

    def stat(self) -> IndexStat:
        """Counts, sizes and identity."""
        return index_check.stat(self.catalog, self.store)

    def verify(self, progress: Progress | None = None) -> StoreCheck:
        """Check rows, vectors, caches and references; changes nothing."""
        return index_check.verify(self.catalog, self.store, progress)

    def prune(self, progress: Progress | None = None) -> StoreCheck:
        """Remove what :meth:`verify` reports, but for damaged rows."""
        return index_check.prune(self.catalog, self.store, progress)

    def close(self) -> None:
        """Save the vectors' snapshot and let go of the files; the engine given stays usable."""
        with self._searching:
            self._save_vectors()
            self.store.close()
            self.catalog.close()

    def __enter__(self) -> KVIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add_batches(self, chunks: Sequence[Chunk], progress: bool | TokenProgress) -> None:
        tokens = sum(to_encode(self.engine, chunks)) if progress else 0
        with (
            token_progress("Encoding chunks", tokens, progress) as encoded,
            # the caches are there, or stored later: it is the vectors that take time
            bar("Adding chunks", len(chunks), enabled=progress is True and not tokens) as added,
        ):
            parts = Parts(encoded)
            for start in range(0, len(chunks), BATCH):
                batch = chunks[start : start + BATCH]
                self._add_batch(batch, parts.tell)
                parts.next()
                added(start + len(batch))

    def _add_batch(self, batch: Sequence[Chunk], progress: bool | TokenProgress) -> None:
        with self.catalog.only_writer():
            self.catalog.finish_releases(self.store)
            known = {chunk.id: chunk for chunk in self.catalog.get(c.document_id for c in batch)}
            same = [chunk for chunk in batch if _same(chunk, known.get(chunk.document_id))]
            fresh = [chunk for chunk in batch if not _same(chunk, known.get(chunk.document_id))]
            replaced = [chunk.document_id for chunk in fresh if chunk.document_id in known]
            if replaced:  # killed before the rows are committed, their new caches are released
                with self.catalog.writing() as tx:
                    sql.plan_release(tx, replaced, self.engine.keys(known[id] for id in replaced))
            vectors = self._vectors(fresh) if fresh else None  # what others compute may fail
            # caches before rows: a row always had its cache; of a killed add only caches are left
            new = [chunk.document_id for chunk in fresh if chunk.document_id not in known]
            with self._undone(new):
                self.engine.index(batch, progress=progress)
                keep = self.engine.keys(fresh) if replaced else []
                moved = [chunk for chunk in same if _moved(chunk, known[chunk.document_id])]
                if not fresh and not moved:
                    return
                with self.catalog.writing() as tx:
                    sql.update_metadata(tx, moved)
                    if vectors is not None:
                        sql.add_rows(tx, fresh, vectors)
                        sql.write_meta(tx, self._identity(vectors.shape[1]))
                    sql.plan_release(tx, replaced, keep)
            self.catalog.finish_releases(self.store)

    @contextlib.contextmanager
    def _undone(self, new: Sequence[str]) -> Iterator[None]:
        """Leave no caches of documents that do not come to be."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreError):  # the first error counts; prune finds the rest
                self.store.release(new)
                self.catalog.finish_releases(self.store)  # of those that were to replace others
            raise

    def _identity(self, dim: int) -> dict[str, str]:
        return {
            "embedding_name": embedding_name(self.embeddings),
            "embedding_dim": str(dim),
            "model_name": str(getattr(self.engine, "name", "")),
            "fingerprint": self.engine.fingerprint,
            **behind_to_record(self.engine.encode_behind, self.engine.adapter),
        }

    def _vectors(self, chunks: Sequence[Chunk]) -> Vectors:
        texts = [f"{chunk.title}\n{chunk.text}" if chunk.title else chunk.text for chunk in chunks]
        vectors = embed(self.embeddings, texts)  # [chunks, dim]
        _check_dim(self.catalog, vectors.shape[1])
        return vectors

    def _save_vectors(self) -> None:
        """Leave a snapshot for the next one who opens the folder; it only saves time."""
        with contextlib.suppress(StoreError):
            dim = int(self.catalog.meta("embedding_dim") or 0)
            if self.catalog.readonly or dim == 0 or self._table.saved(self.catalog.generation()):
                return
            with self.catalog.reading() as tx:
                self._table.sync(tx, sql.generation_of(tx), dim)
            self._table.save()


def _check_embeddings(catalog: IndexCatalog, embeddings: Embeddings) -> None:
    made_with, name = catalog.meta("embedding_name") or "", embedding_name(embeddings)
    if made_with and name and made_with != name:
        raise IndexMismatchError(
            f"{catalog.folder} was made with the embeddings {made_with!r}, not {name!r}: "
            "open it with those, or index into another folder"
        )
    # the default's dimension is known by its name: no need to load it only for this
    if catalog.meta("embedding_dim") and not isinstance(embeddings, SentenceEmbeddings):
        _check_dim(catalog, embed(embeddings, ["dimension"]).shape[1])


def _check_dim(catalog: IndexCatalog, dim: int) -> None:
    made_with = int(catalog.meta("embedding_dim") or dim)
    if made_with != dim:
        raise IndexMismatchError(
            f"{catalog.folder} holds vectors of dimension {made_with}, the embeddings give {dim}: "
            "open it with the embeddings it was made with, or index into another folder"
        )


def _same(chunk: Chunk, known: Chunk | None) -> bool:
    return known is not None and (chunk.text, chunk.title) == (known.text, known.title)


def _moved(chunk: Chunk, known: Chunk) -> bool:
    return sql.metadata_json(chunk) != sql.metadata_json(known)


def _scored(chunk: Chunk, score: float) -> ScoredChunk:
    return ScoredChunk(chunk.text, chunk.id, chunk.title, chunk.metadata, score)


def _as_ids(ids: Iterable[str]) -> list[str]:
    if isinstance(ids, str):
        raise InputError("ids must be a list of ids, not one id: pass [id]")
    listed = list(ids)
    for id in listed:
        if not isinstance(id, str):
            raise InputError(f"id {id!r} is a {type(id).__name__}: ids are str")
    return listed
