"""Chunks encoded and stored before anybody asks about them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.progress import TokenProgress, token_progress
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.report import IndexReport, Stopwatch
from kvlink_rag.prompt.segments import Wanted

LOOKUPS = 16
"""Caches looked up at a time: a store may have to ask a distant server for each."""


class Indexing:
    """One run over some chunks.

    Args:
        pipeline: whose store is to have their caches.
        chunks: with ids.

    Raises:
        InputError: a chunk is empty or longer than the model's context.
    """

    def __init__(self, pipeline: Pipeline, chunks: Sequence[Chunk]) -> None:
        pipeline.runner.check_unchanged()
        self._pipeline, self._count, self._watch = pipeline, len(chunks), Stopwatch()
        self._wanted: dict[str, Wanted] = {}  # by key
        self._owners: dict[str, list[str]] = {}
        for chunk in chunks:
            wanted = pipeline.prompts.wanted(chunk)
            length = sum(map(len, wanted))
            pipeline.prompts.check_length(length, f"chunk {chunk.document_id!r}")
            key = pipeline.caches.key_of(wanted)
            self._wanted[key] = wanted
            self._owners.setdefault(key, []).append(chunk.document_id)

    def run(self, progress: bool | TokenProgress) -> IndexReport:
        """Compute and store what is missing; all documents refer to their caches afterwards.

        Args:
            progress: True draws a bar; a function is called with (tokens encoded, tokens to encode)
                after each batch of the model.

        Raises:
            StoreError: a cache cannot be written; those written before stay.
        """
        store, keys = self._pipeline.caches.store, list(self._wanted)
        with ThreadPoolExecutor(LOOKUPS) as pool:
            stored = dict(zip(keys, pool.map(store.has, keys), strict=True))
        missing = [key for key in keys if not stored[key]]
        later, missing = (missing, []) if store.cache_after else ([], missing)
        computed = set(missing)
        known = [key for key in keys if key not in computed]
        store.refer([(owner, key) for key in known for owner in self._owners[key]])
        nbytes = self._encode_and_store(missing, progress)
        return IndexReport(
            chunks=self._count,
            hits=sum(len(self._owners[key]) for key in keys if stored[key]),
            misses=len(missing),
            deferred=len(later),
            tokens=sum(len(self._wanted[key][0]) for key in missing),
            nbytes=nbytes,
            total_s=self._watch.total(),
            started=self._watch.started,
        )

    def _encode_and_store(self, keys: Sequence[str], progress: bool | TokenProgress) -> int:
        """Encode batch by batch while the batch before is being written; returns bytes."""
        texts, nbytes, done = [self._wanted[key][0] for key in keys], 0, 0
        total, behind = sum(map(len, texts)), self._pipeline.prompts.behind
        with (
            token_progress("Encoding chunks", total, progress) as show,
            ThreadPoolExecutor(1) as writer,
        ):
            writing: Future[None] | None = None
            for batch in self._pipeline.runner.encode(texts, behind):
                if writing:
                    writing.result()
                records = [(record, self._owners[keys[i]]) for i, record in batch.records]
                writing = writer.submit(self._pipeline.caches.put, records)
                nbytes += sum(record.nbytes for _, record in batch.records)
                done += sum(len(record.token_ids) for _, record in batch.records)
                show(done)
            if writing:
                writing.result()
        return nbytes
