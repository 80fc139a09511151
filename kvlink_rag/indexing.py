"""Chunks into a store: the caches that it lacks are encoded while those before are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvlink_rag.chunk import Chunk, ChunkKV, as_chunks
from kvlink_rag.prefiller import Prefiller
from kvlink_rag.progress import bar
from kvlink_rag.report import IndexReport, Stopwatch


class IndexingRun:
    """One indexing run: the chunks' token ids by key, and the documents that refer to each.

    Args:
        engine: its store is filled.

    Raises:
        InputError: a chunk is empty or longer than the model's context.
    """

    def __init__(self, engine: Prefiller, chunks: Iterable[str | Chunk]) -> None:
        self._engine = engine
        self._watch, self._given = Stopwatch(), as_chunks(chunks)
        self._texts: dict[str, list[int]] = {}
        self._owners: dict[str, list[str]] = {}
        for chunk in self._given:
            token_ids = engine.layout.chunk(chunk)
            length = len(engine.behind) + len(token_ids)
            engine._check_length(length, f"chunk {chunk.document_id!r}")
            key = engine._key(token_ids)
            self._texts[key] = token_ids
            self._owners.setdefault(key, []).append(chunk.document_id)

    def finished(self, progress: bool) -> IndexReport:
        """Encode and store what the store lacks; with ``cache_after``, only refer to it.

        Raises:
            StoreError: a cache cannot be written; those written before stay.
        """
        engine, texts, owners = self._engine, self._texts, self._owners
        missing = {key: ids for key, ids in texts.items() if not engine.store.has(key)}
        later = set(missing) if engine.cache_after else set()
        missing = {} if engine.cache_after else missing
        known = [(owner, key) for key in texts if key not in missing for owner in owners[key]]
        engine.store.refer(known)
        nbytes = self._encode_and_store(missing, progress)
        return IndexReport(
            chunks=len(self._given),
            hits=sum(len(owners[key]) for key in texts if key not in missing and key not in later),
            misses=len(missing),
            deferred=len(later),
            tokens=sum(map(len, missing.values())),
            nbytes=nbytes,
            total_s=self._watch.total(),
            started=self._watch.started,
        )

    def _encode_and_store(self, missing: dict[str, list[int]], progress: bool) -> int:
        """Encode batch by batch while the batch before is being written; returns bytes."""
        keys, nbytes, done = list(missing), 0, 0
        total = sum(map(len, missing.values()))
        with (
            bar("Reading chunks (tokens)", total, enabled=progress and bool(missing)) as show,
            ThreadPoolExecutor(1) as writer,
        ):
            writing: Future[None] | None = None
            for batch in encoded(self._engine, [missing[key] for key in keys]):
                if writing:
                    writing.result()
                owned = [(record, self._owners[keys[i]]) for i, record in batch]
                writing = writer.submit(self._engine._put, owned)
                nbytes += sum(record.nbytes for _, record in batch)
                done += sum(len(record.token_ids) for _, record in batch)
                show(done)
            if writing:
                writing.result()
        return nbytes


def encoded(
    engine: Prefiller, texts: Sequence[Sequence[int]]
) -> Iterator[list[tuple[int, ChunkKV]]]:
    """Caches of texts with their ranks, batch by batch; answers get their turn in between."""
    batches = engine._encoder.encode(texts, engine.behind, max_batch_tokens=engine.batch_tokens)
    while True:
        with engine._model_lock:
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
