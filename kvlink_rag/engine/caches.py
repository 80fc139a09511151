"""The chunk caches that prompts want: from the store, or computed and stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvlink_rag.chunk import Chunk, ChunkKV, chunk_key
from kvlink_rag.common.threads import Threads
from kvlink_rag.engine.prefetch import Prefetcher
from kvlink_rag.engine.prompts import Prompts
from kvlink_rag.errors import KVLinkWarning, StoreError
from kvlink_rag.prompt.segments import Prompt, Wanted
from kvlink_rag.runners.base import ModelRunner
from kvlink_rag.store import KVStore
from kvlink_rag.store.codec import codec_for

LOAD_THREADS = 4
"""Caches of a prompt that are read and verified at a time."""

Found = Mapping[Wanted, ChunkKV | None]
"""What the store had; None where it had nothing."""

Computed = tuple[ChunkKV, list[str]]
"""A record that was computed, and ids of the documents that refer to it."""


@dataclass(frozen=True)
class Made:
    """What had to be computed.

    Attributes:
        records: the caches.
        before: tokens that ran for what they are encoded behind: none where that was kept.
    """

    records: dict[Wanted, ChunkKV]
    before: dict[tuple[int, ...], int]


class Caches:
    """What an engine's store has, and its runner makes where it has not.

    Args:
        tokens_per_s: how fast caches are computed, where it is known.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: KVStore,
        prompts: Prompts,
        tokens_per_s: float | None = None,
    ) -> None:
        self.store = store
        self.prefetcher = Prefetcher(prompts.wanted, self._load_one)
        self.tokens_per_s = tokens_per_s
        self._runner = runner
        self._prompts = prompts
        self._loading = Threads("kvlink-load", LOAD_THREADS)

    def key(self, chunk: Chunk) -> str:
        """Under which the store keeps a chunk's cache."""
        return self.key_of(self._prompts.wanted(chunk))

    def key_of(self, wanted: Wanted) -> str:
        """Under which the store keeps a cache."""
        text, behind = wanted
        codec = codec_for(self.store.codec, self._runner.dtype)
        return chunk_key(self._runner.fingerprint, behind, text, codec)

    def one(self, wanted: Wanted, *, keep: bool) -> ChunkKV:
        """A cache, from the store or computed (and stored)."""
        record = self.load([wanted])[wanted]
        if record is None:
            record = self.compute({wanted: None}).records[wanted]
            if keep:
                self.keep([(record, [])])
        return record

    def load(self, wanted: Iterable[Wanted]) -> Found:
        """Records from the store, compared with what was asked for: no digest is trusted alone."""
        each = list(dict.fromkeys(wanted))
        return dict(zip(each, self._loading.all(self._fetched, each), strict=True))

    def _fetched(self, wanted: Wanted) -> ChunkKV | None:
        return self.prefetcher.take(wanted) or self._load_one(wanted)

    def _load_one(self, wanted: Wanted) -> ChunkKV | None:
        text, behind = wanted
        if not text:
            return None
        rate = self.tokens_per_s
        within_s = None if rate is None else len(text) / rate  # else it is better computed
        record = self.store.get(self.key_of(wanted), within_s)
        if record and not record.is_for(self._runner.fingerprint, behind, text):
            warnings.warn(
                f"the store's entry {record.key[:12]}... is for other tokens or another model; "
                "computing it anew",
                KVLinkWarning,
                stacklevel=2,
            )
            return None
        if record is None or record.codec in self._runner.abilities.codecs:
            return record
        return record.decoded()

    def compute(self, found: Found) -> Made:
        """Make what was not found: chunks behind what they stand behind, the prefix alone."""
        made = Made({}, {})
        missing = [wanted for wanted, record in found.items() if record is None]
        for behind in {behind for _, behind in missing}:
            texts = [text for text, its in missing if its == behind and text]
            seconds = 0.0
            for encoded in self._runner.encode(texts, behind):
                made.records.update(((texts[i], behind), record) for i, record in encoded.records)
                made.before[behind] = made.before.get(behind, 0) + encoded.behind_tokens
                seconds += encoded.seconds
            self._note_speed(made.before.get(behind, 0) + sum(map(len, texts)), seconds)
        return made

    def _note_speed(self, tokens: int, seconds: float) -> None:
        """Remember how fast caches are computed, what was measured last above all."""
        if tokens and seconds:
            rate, before = tokens / seconds, self.tokens_per_s
            self.tokens_per_s = rate if before is None else 0.7 * before + 0.3 * rate

    def computed(self, prompt: Prompt, chunks: Sequence[Chunk], made: Made) -> list[Computed]:
        """What a prompt wants and was made, with the ids of the chunks that refer to it."""
        owners: dict[Wanted, list[str]] = {}
        for wanted, chunk in zip(prompt.wanted[1:], chunks, strict=True):
            if chunk.id is not None:
                owners.setdefault(wanted, []).append(chunk.id)
        # a conversation goes on: nobody will ask for its prefix again
        kept = prompt.wanted if prompt.lasting else prompt.wanted[1:]
        records = made.records
        return [(records[w], owners.get(w, [])) for w in dict.fromkeys(kept) if w in records]

    def keep(self, computed: Iterable[Computed]) -> None:
        """Store what an answer had to compute; an answer never fails for want of disk."""
        failed: StoreError | None = None
        try:
            for each in self._worth_keeping(computed):
                try:
                    self.put([each])
                except StoreError as error:  # another one may fit in the budget
                    failed = failed or error
        except StoreError as error:
            failed = error
        if failed is not None:
            warnings.warn(f"computed caches are not kept: {failed}", KVLinkWarning, stacklevel=3)

    def _worth_keeping(self, computed: Iterable[Computed]) -> list[Computed]:
        """Those that have now been asked for often enough (``store.cache_after``)."""
        listed, after = list(computed), self.store.cache_after
        if after <= 1:
            return listed
        codec = codec_for(self.store.codec, self._runner.dtype)
        keys = [record.key_as(codec) for record, _ in listed]
        distinct = list(dict.fromkeys(keys))
        times = dict(zip(distinct, self.store.count_misses(distinct), strict=True))
        return [c for c, key in zip(listed, keys, strict=True) if times[key] >= after]

    def put(self, records: Iterable[tuple[ChunkKV, Sequence[str]]]) -> None:
        """Store records for the documents beside them.

        Raises:
            StoreError: one cannot be written.
        """
        for record, documents in records:
            self.store.put(record, documents)
