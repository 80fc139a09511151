"""Chunk caches in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import torch

from kvlink_rag.chunk import RAW, ChunkKV
from kvlink_rag.common.once import say_once_that_memory_ends
from kvlink_rag.errors import InputError
from kvlink_rag.store.base import StoreCheck, StoreStat, check_cache_after
from kvlink_rag.store.record import check_shapes


class MemoryStore:
    """A :class:`~kvlink_rag.store.base.KVStore` that lasts as long as the process.

    Caches are kept as they are put, on their device, and given back without a copy: do not change
    them.

    Args:
        cache_after: see :attr:`KVStore.cache_after`.

    Raises:
        InputError: ``cache_after`` is no int >= 0.
    """

    codec = RAW

    def __init__(self, *, cache_after: int = 0) -> None:
        self.cache_after = check_cache_after(cache_after)
        self._records: dict[str, ChunkKV] = {}
        self._keys: dict[str, set[str]] = {}  # document -> keys
        self._documents: dict[str, set[str]] = {}  # key -> documents
        self._misses: Counter[str] = Counter()
        self._lock = threading.RLock()

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        """The cache under ``key``, or None; at once."""
        return self._records.get(key)

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Keep under ``record.key`` and let ``documents`` refer to it.

        Raises:
            InputError: keys and values do not fit the tokens.
        """
        check_shapes(record)
        record = record.copied(_own)
        key = record.key
        with self._lock:
            self._records[key] = record
            self._misses.pop(key, None)
            self.refer((document, key) for document in documents)

    def has(self, key: str) -> bool:
        """Whether there is an entry."""
        return key in self._records

    def refer(self, references: Iterable[tuple[str, str]]) -> None:
        """Let documents refer to entries: pairs ``(document id, key)``; known pairs are ignored."""
        with self._lock:
            for document, key in references:
                self._keys.setdefault(document, set()).add(key)
                self._documents.setdefault(key, set()).add(document)

    def release(self, documents: Iterable[str], keep: Collection[str] = ()) -> int:
        """Drop the references of these documents, and every entry left without any.

        References to the keys in ``keep`` stay: a changed document keeps its new caches.

        Returns:
            the number of entries removed.

        Raises:
            InputError: ``documents`` is one string.
        """
        if isinstance(documents, str):
            raise InputError("documents must be a list of ids, not one id: pass [id]")
        removed = 0
        with self._lock:
            for document in documents:
                held = self._keys.pop(document, set())
                for key in held.difference(keep):
                    self._documents[key].discard(document)
                    if not self._documents[key]:
                        del self._documents[key]
                        removed += self._records.pop(key, None) is not None
                if kept := held.intersection(keep):
                    self._keys[document] = kept
        return removed

    def count_misses(self, keys: Iterable[str]) -> list[int]:
        """Note that these caches were wanted and had to be computed; how often so far, each."""
        with self._lock:
            listed = list(keys)
            self._misses.update(listed)
            return [self._misses[key] for key in listed]

    def references(self, prefix: str = "") -> list[tuple[str, str]]:
        """Pairs ``(document id, key)``: all, or of documents whose id starts with ``prefix``."""
        with self._lock:
            return [
                (document, key)
                for document, keys in self._keys.items()
                if document.startswith(prefix)
                for key in keys
            ]

    def stat(self) -> StoreStat:
        """Counts and sizes; ``nbytes`` are those of keys and values."""
        with self._lock:
            records = self._records.values()
            return StoreStat(
                entries=len(records),
                tokens=sum(len(record.token_ids) for record in records),
                nbytes=sum(record.nbytes for record in records),
                documents=len(self._keys),
                unreferenced=len(self._records.keys() - self._documents.keys()),
            )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Entries without a document; memory has no other faults."""
        with self._lock:
            unreferenced = sorted(self._records.keys() - self._documents.keys())
            return StoreCheck(checked=len(self._records), unreferenced=unreferenced)

    def prune(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Remove the entries without a document."""
        with self._lock:
            check = self.verify()
            for key in check.unreferenced:
                del self._records[key]
            return check

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._records.clear()
            self._keys.clear()
            self._documents.clear()


class UnnamedMemory(MemoryStore):
    """Where caches go when nobody has named a store: says at the first one that it will end."""

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """As :meth:`MemoryStore.put`."""
        say_once_that_memory_ends()
        super().put(record, documents)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the rest of the batch that it is a view of, which it would keep alive."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
