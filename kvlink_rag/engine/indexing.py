"""Chunks encoded and stored before anybody asks about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvlink_rag.chunk import Chunk, ChunkKV
from kvlink_rag.common.progress import TokenProgress, token_progress
from kvlink_rag.engine.prefiller import Prefiller
from kvlink_rag.engine.report import IndexReport, Stopwatch

LOOKUPS = 16
"""Caches looked up at a time: a store may have to ask a distant server for each."""


class Indexing:
    """One run over some chunks.

    Args:
        engine: whose store is to have their caches.
        chunks: with ids.

    Raises:
        InputError: a chunk is empty or longer than the model's context.
    """

    def __init__(self, engine: Prefiller, chunks: Sequence[Chunk]) -> None:
        engine._check_unchanged()
        self._engine, self._count, self._watch = engine, len(chunks), Stopwatch()
        self._texts: dict[str, list[int]] = {}  # by key
        self._owners: dict[str, list[str]] = {}
        for chunk in chunks:
            token_ids = engine.layout.chunk(chunk)
            length = len(engine.behind) + len(token_ids)
            engine._check_length(length, f"chunk {chunk.document_id!r}")
            key = engine._key(token_ids)
            self._texts[key] = token_ids
            self._owners.setdefault(key, []).append(chunk.document_id)

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of the chunks, by the key of their cache: equal ones once."""
        return {key: len(token_ids) for key, token_ids in self._texts.items()}

    def run(self, progress: bool | TokenProgress) -> IndexReport:
        """Compute and store what is missing; all documents refer to their caches afterwards.

        Args:
            progress: True draws a bar; a function is called with (tokens encoded, tokens to encode)
                after each batch of the model.

        Raises:
            StoreError: a cache cannot be written; those written before stay.
        """
        engine, keys = self._engine, list(self._texts)
        with ThreadPoolExecutor(LOOKUPS) as pool:
            stored = dict(zip(keys, pool.map(engine.store.has, keys), strict=True))
        missing = [key for key in keys if not stored[key]]
        later, missing = (missing, []) if engine.cache_after else ([], missing)
        computed = set(missing)
        known = [key for key in keys if key not in computed]
        engine.store.refer([(owner, key) for key in known for owner in self._owners[key]])
        nbytes = self._encode_and_store(missing, progress)
        return IndexReport(
            chunks=self._count,
            hits=sum(len(self._owners[key]) for key in keys if stored[key]),
            misses=len(missing),
            deferred=len(later),
            tokens=sum(len(self._texts[key]) for key in missing),
            nbytes=nbytes,
            total_s=self._watch.total(),
            started=self._watch.started,
        )

    def _encode_and_store(self, keys: Sequence[str], progress: bool | TokenProgress) -> int:
        """Encode batch by batch while the batch before is being written; returns bytes."""
        texts, nbytes, done = [self._texts[key] for key in keys], 0, 0
        total = sum(map(len, texts))
        with (
            token_progress("Encoding chunks", total, progress) as show,
            ThreadPoolExecutor(1) as writer,
        ):
            writing: Future[None] | None = None
            for batch in encoded(self._engine, texts):
                if writing:
                    writing.result()
                records = [(record, self._owners[keys[i]]) for i, record in batch]
                writing = writer.submit(self._engine._put, records)
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
