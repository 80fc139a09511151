"""What every store of chunk caches can do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvlink_rag.chunk import ChunkKV


@dataclass(frozen=True)
class StoreStat:
    """Size of a store: entries, tokens, bytes of files, documents that refer to entries."""

    entries: int
    tokens: int
    nbytes: int
    documents: int
    unreferenced: int


@dataclass
class StoreCheck:
    """What :meth:`KVStore.verify` found, or what :meth:`KVStore.prune` removed, by key or path."""

    checked: int = 0
    corrupt: list[str] = field(default_factory=list)
    """Files whose checksum, header or name does not hold."""
    orphans: list[str] = field(default_factory=list)
    """Files that the catalog does not know (left by a killed process), temporary files included."""
    missing: list[str] = field(default_factory=list)
    """Catalog entries whose file is gone."""
    unreferenced: list[str] = field(default_factory=list)
    """Entries no document refers to (kept until pruned: they cost only disk)."""

    @property
    def clean(self) -> bool:
        """No corrupt file, no orphan, no missing file."""
        return not (self.corrupt or self.orphans or self.missing)


@runtime_checkable
class KVStore(Protocol):
    """A place for chunk caches. Safe to use from several threads."""

    @property
    def codec(self) -> str:
        """What keys and values are written as (:mod:`kvlink_rag.store.codec`)."""

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        """The cache under ``key``, checksum verified; None if absent or (warned) corrupt.

        Args:
            within_s: None also when getting it takes longer, or is known to; computing it does not.
                A store on this machine may leave it unheeded.
        """

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Store under its key with the store's codec, wholly or not at all, for ``documents``.

        Raises:
            StoreError: it could not be written.
        """

    def has(self, key: str) -> bool:
        """Whether ``get`` would find an entry, without reading it."""

    def refer(self, references: Iterable[tuple[str, str]]) -> None:
        """Let documents refer to entries: pairs ``(document id, key)``; known pairs are ignored."""

    def release(self, documents: Iterable[str], keep: Collection[str] = ()) -> int:
        """Drop the references of these documents, and every entry left without any.

        References to the keys in ``keep`` stay: a changed document keeps its new caches.

        Returns:
            the number of entries removed.
        """

    def references(self, prefix: str = "") -> list[tuple[str, str]]:
        """Pairs ``(document id, key)``: all, or of documents whose id starts with ``prefix``.

        So ids that begin alike can be released together, whoever wrote them.
        """

    def stat(self) -> StoreStat:
        """Counts and sizes, from the catalog."""

    def verify(self) -> StoreCheck:
        """Check everything that is stored; changes nothing."""

    def prune(self) -> StoreCheck:
        """Remove what ``verify`` reports: corrupt, orphaned, missing and unreferenced entries."""

    def close(self) -> None:
        """Flush and let go of files; the store can not be used afterwards."""
