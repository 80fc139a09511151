"""What every store of chunk caches can do, which kinds there are, and what each promises.

A store keeps a :class:`~kvlink_rag.chunk.ChunkKV` under its key, a digest of all that its numbers
depend on: an entry is never out of date, it is there or is computed again. Beside it the store
keeps which documents refer to it; with the last of them it is removed.

- ``MemoryStore`` (`memory`): tensors as they are put, without a copy, on their device. As long as
  the object lasts; no codec, no budget.
- ``FolderStore`` (`folder/`): a safetensors file a chunk and a SQLite catalog of them. Until
  released, evicted or pruned. Codec, encryption, budget, pins and the count of hits are a folder's.
- ``RamTier`` (`ram`): another store, and in memory copies of what was read last from it, up to so
  many bytes: what is kept costs no disk and no checksum.
- ``RemoteTier`` (`remote/`): a folder, and behind it a remote that several machines share (object
  storage, Redis): what the folder lacks is downloaded, what is put there is uploaded later.

:func:`kvlink_rag.store.open_store` makes one of them, or one tier before another, from what a user
says. Any object with the attributes of :class:`KVStore` can take their place.

**Promises.** `put` stores a whole record or nothing; a kill at any instant costs a folder at most
the record being written. `get` returns what was put, as exactly as the codec keeps it, or None. A
folder verifies what it reads and a remote's objects before they are used: what is damaged is never
served, and a warning says so. Trouble with a remote is no error: what does not come in time is
None, what cannot be uploaded waits in the folder. A folder that cannot be used is a StoreError of
all methods but `get` and `has`.

**Threads.** Every method may be called from any thread while others are being called, but nothing
after `close`. Records are shared by all who get them: nobody changes their tensors.

**Processes.** Those that share a folder open it each for itself, and find what another has put at
once; a catalog's write lock keeps files and rows in step, and readers wait for nobody. Copies of a
RAM tier are of one process, which may serve on what another has removed (harmless, as a key stands
for its contents). One process at a time uploads for a folder, all that wait. A forked process may
go on with its parent's folders and tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError


@dataclass(frozen=True)
class StoreStat:
    """Size of a store: entries, tokens, bytes of files, documents that refer to entries."""

    entries: int
    tokens: int
    nbytes: int
    documents: int
    unreferenced: int


@dataclass(frozen=True)
class Budget:
    """How many bytes of files a folder may hold.

    Attributes:
        max_bytes: in all; None for any number.
        document_bytes: of the caches that any one document refers to. Ids that are alike up to
            their last ``#`` are parts of one document, as the chunks of an indexed file are.
        namespaces: of the caches that documents whose id begins with the name refer to, by name. A
            cache counts in every namespace it is referred to from.

    Raises:
        InputError: a limit is no int >= 1 that SQLite can hold, or a namespace has no name.
    """

    max_bytes: int | None = None
    document_bytes: int | None = None
    namespaces: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = {"max_bytes": self.max_bytes, "document_bytes": self.document_bytes}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        for name, limit in (limits | dict(self.namespaces)).items():
            if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit < 2**63:
                raise InputError(
                    f"{name} is {limit!r}: pass a number of bytes, an int >= 1 (and below 2**63)"
                )
        if not all(isinstance(name, str) and name for name in self.namespaces):
            raise InputError("a namespace has no name: for all documents, set max_bytes")


@dataclass(frozen=True)
class ModelUsage:
    """What a store holds of one model, by its fingerprint."""

    fingerprint: str
    entries: int
    tokens: int
    nbytes: int


@dataclass(frozen=True)
class StoreUsage:
    """How a folder is used.

    Attributes:
        budget: what it may hold.
        hits, misses: times that a cache was asked for and was, or was not there, since the folder
            was made. A process counts with a delay (some hundred uses, or its end).
        evicted: caches removed to keep the budget.
        pinned: entries that are never evicted.
        oldest, last_used: Unix times: when the oldest entry was made, when any was used last; None
            while there is no entry.
        models: by size, largest first.
    """

    budget: Budget
    hits: int
    misses: int
    evicted: int
    pinned: int
    oldest: float | None
    last_used: float | None
    models: list[ModelUsage]

    @property
    def hit_rate(self) -> float | None:
        """Share of hits; None before anything was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


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


def check_cache_after(value: int) -> int:
    """After how many retrievals a cache is stored (:attr:`KVStore.cache_after`).

    Raises:
        InputError: it is no int >= 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(
            f"cache_after is {value!r}: pass 0 to store caches when chunks are indexed, "
            "or after how many retrievals"
        )
    return value


@runtime_checkable
class KVStore(Protocol):
    """A place for chunk caches. See the top of this file for what may be called from where."""

    @property
    def codec(self) -> str:
        """What keys and values are written as (:mod:`kvlink_rag.store.codec`)."""

    @property
    def cache_after(self) -> int:
        """When caches are put: 0 when chunks are indexed, n by the n-th answer that retrieves one.

        A wish of the process that opened the store, for whoever computes caches: the store takes
        all it is given, counts misses (:meth:`count_misses`), and does not write this down.
        """

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

    def count_misses(self, keys: Iterable[str]) -> list[int]:
        """Note that these caches were wanted and had to be computed; how often so far, each."""

    def references(self, prefix: str = "") -> list[tuple[str, str]]:
        """Pairs ``(document id, key)``: all, or of documents whose id starts with ``prefix``.

        So ids that begin alike can be released together, whoever wrote them.
        """

    def stat(self) -> StoreStat:
        """Counts and sizes, from the catalog."""

    def verify(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Check everything that is stored; changes nothing.

        Args:
            progress: called with (entries checked, entries in all), where it takes long.
        """

    def prune(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Remove what ``verify`` reports: corrupt, orphaned, missing and unreferenced entries."""

    def close(self) -> None:
        """Flush and let go of files; the store can not be used afterwards."""
