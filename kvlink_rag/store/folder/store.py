"""Chunk caches in a folder: one safetensors file each, and a SQLite catalog."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from filelock import FileLock

from kvlink_rag.chunk import RAW, ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store.base import Budget, StoreCheck, StoreStat, StoreUsage, check_cache_after
from kvlink_rag.store.codec import DEFAULT_CODEC, check_codec
from kvlink_rag.store.encryption import Cipher, EncryptionKey
from kvlink_rag.store.folder import budget as room
from kvlink_rag.store.folder import catalog as sql
from kvlink_rag.store.folder.catalog import Catalog, Entry
from kvlink_rag.store.folder.contents import Contents, FolderWatcher
from kvlink_rag.store.folder.database import explained
from kvlink_rag.store.folder.files import ChunkFiles
from kvlink_rag.store.folder.settings import NAME as STORE_JSON
from kvlink_rag.store.folder.settings import Settings
from kvlink_rag.store.folder.uses import Uses
from kvlink_rag.store.record import CorruptRecord

CATALOG = "catalog.sqlite"
CHUNKS = "chunks"


class FolderStore:
    """A :class:`~kvlink_rag.store.base.KVStore` in a folder.

    Files are ``chunks/<first 2 hex digits>/<key>.safetensors``, written under a temporary name,
    synced and renamed; ``catalog.sqlite`` describes them. Any number of threads and processes may
    use one folder at once. Reading does not touch the catalog. Tensors of :meth:`get` are views of
    the mapped file and stay valid after it is removed.

    Args:
        path: the folder; made with mode 0700 when it is not there. A read-only one can be read.
        codec: what keys and values are written as (:mod:`kvlink_rag.store.codec`); fixed when the
            folder is made. None is what it was made with, ``int8`` for a new one.
        budget: bytes of files that the folder may hold, for all processes from now on; what is
            worth least is evicted for what is new (:mod:`.budget`). None leaves the
            folder's as it is, a new one without limit. Each writing thread adds a file for a time.
        encryption_key: 16, 24 or 32 bytes, or what returns them: encrypts the chunk files of a new
            folder, not its catalog (:mod:`kvlink_rag.store.encryption`), and opens them later.
            Without one, an encrypted folder is opened with that in ``KVLINK_STORE_KEY`` and a new
            one is not encrypted.
        cache_after: see :attr:`~kvlink_rag.store.base.KVStore.cache_after`; of this object, not of
            the folder.

    Raises:
        InputError: there is no such codec, the folder has another, the key is not its key, or
            ``cache_after`` is no int >= 0.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        codec: str | None = None,
        budget: Budget | int | None = None,
        encryption_key: EncryptionKey | None = None,
        *,
        cache_after: int = 0,
    ) -> None:
        self.cache_after = check_cache_after(cache_after)
        if codec is not None:
            check_codec(codec)
        cipher = None if encryption_key is None else Cipher(encryption_key)
        self.path = Path(path).expanduser().absolute()
        limits = Budget(budget) if isinstance(budget, int) else budget
        with explained("open the store", self.path):
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700, parents=True)
            os.listdir(self.path)  # unreadable: say so before anything is made
            made_with, self._files, self._catalog = self._opened(codec, cipher)
            self._contents = Contents(self.path, made_with, self._files, self._catalog)
            self._uses = Uses(self._catalog, self._contents)
            if not self._catalog.readonly:
                self._files.folder.mkdir(mode=0o700, exist_ok=True)
                self._contents.tidy_up()
        if limits is not None and limits != self.budget:
            self.set_budget(limits)

    @property
    def codec(self) -> str:
        """What keys and values are written as."""
        return self._contents.codec

    def has(self, key: str) -> bool:
        """Whether there is a file under ``key``; its contents are not looked at."""
        return self._files.has(key)

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        """The cache under ``key``, checksum verified; None when absent or corrupt.

        ``within_s`` is not heeded: a disk is fast. A corrupt file is removed with a warning, so
        that the cache is computed anew.
        """
        file = self._files.path(key)
        try:
            record = self._files.read(key)
        except (FileNotFoundError, NotADirectoryError):
            self._uses.count(None)
            with contextlib.suppress(OSError, StoreError):  # put says it
                self._contents.renew_codec()
            return None
        except CorruptRecord as reason:
            self._contents.drop_corrupt(key)
            self._warn(f"dropped the chunk cache {file}: {reason}")
            self._uses.count(None)
            return None
        except OSError as error:
            self._warn(f"cannot read the chunk cache {file}: {error}")
            self._uses.count(None)
            return None
        self._uses.count(Entry.of(key, record))
        return record

    def count_use(self, key: str, record: ChunkKV) -> None:
        """Note that a cache of this folder was got from a copy: what is used is not evicted."""
        self._uses.count(Entry.of(key, record))

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Store under its key with the store's codec, wholly or not at all, for ``documents``.

        Raises:
            InputError: keys and values do not fit the tokens, or are another codec's.
            StoreError: it could not be written, has no room in the budget, the codec cannot hold
                its numbers, or the folder was migrated meanwhile; nothing is left behind.
        """
        self._check_writable()
        self._uses.flush()  # what is evicted depends on the uses
        self._contents.put(record, list(documents))

    def adopt(self, key: str, data: bytes, wanted: Callable[[], bool]) -> ChunkKV | None:
        """Take in a file of another folder with the same codec, verified before it appears.

        Args:
            data: all of the file.
            wanted: asked at last, where no other process can release the key; False takes nothing.

        Returns:
            the cache.

        Raises:
            CorruptRecord: the file is damaged, or holds another chunk's cache.
            StoreError: it could not be written; nothing is left behind.
        """
        self._check_writable()
        return self._contents.adopt(key, data, wanted)

    def file_bytes(self, key: str) -> bytes | None:
        """The file under ``key`` as it is, for another folder to adopt; None when there is none.

        Raises:
            StoreError: it cannot be read.
        """
        with explained("read the store", self.path):
            try:
                return self._files.path(key).read_bytes()
            except FileNotFoundError:
                return None

    def shared_name(self, key: str) -> str:
        """What a cache is called on a remote: of an encrypted folder, only the key tells."""
        return self._files.shared_name(key)

    def keys(self) -> set[str]:
        """The keys of all entries, from the catalog."""
        with explained("read the store", self.path):
            return self._catalog.read(sql.keys)

    def refer(self, references: Iterable[tuple[str, str]]) -> None:
        """Let documents refer to entries: pairs ``(document id, key)``; known pairs are ignored.

        A reference to a key that is not stored holds as soon as it is.

        Raises:
            StoreError: the catalog cannot be written.
        """
        self._check_writable()
        pairs = list(references)
        for _, key in pairs:
            self._files.path(key)  # refuses what is no key
        if pairs:
            self._contents.refer(pairs)

    def release(self, documents: Iterable[str], keep: Collection[str] = ()) -> int:
        """Drop the references of these documents, and every entry left without any.

        References to the keys in ``keep`` stay: a changed document keeps its new caches.

        Returns:
            the number of entries removed.

        Raises:
            InputError: ``documents`` is one string.
            StoreError: the catalog cannot be written.
        """
        if isinstance(documents, str):
            raise InputError("documents must be a list of ids, not one id: pass [id]")
        self._check_writable()
        return self._contents.release(documents, frozenset(keep))

    def references(self, prefix: str = "") -> list[tuple[str, str]]:
        """Pairs ``(document id, key)``: all, or of documents whose id starts with ``prefix``."""
        with explained("read the store", self.path):
            return self._catalog.read(lambda tx: list(sql.references(tx, prefix)))

    def count_misses(self, keys: Iterable[str]) -> list[int]:
        """Note that these caches were wanted and had to be computed; how often so far, each.

        Counted until the cache is stored. A read-only folder counts nothing: each is the first.

        Raises:
            StoreError: the catalog cannot be written.
        """
        listed = list(keys)
        if self._catalog.readonly or not listed:
            return [1] * len(listed)
        with explained("write to the store", self.path):
            return self._catalog.write(lambda tx: sql.count_misses(tx, listed, time.time()))

    def stat(self) -> StoreStat:
        """Counts and sizes, from the catalog."""
        self._uses.flush()
        with explained("read the store", self.path):
            return self._catalog.read(sql.stat)

    def usage(self) -> StoreUsage:
        """Budget, hits and misses, ages, and what is held of which model; from the catalog."""
        self._uses.flush()
        with explained("read the store", self.path):
            return self._catalog.read(room.usage)

    @property
    def budget(self) -> Budget:
        """What the folder may hold."""
        with explained("read the store", self.path):
            return self._catalog.read(room.budget_of)

    def set_budget(self, budget: Budget) -> None:
        """Say what the folder may hold from now on, for all processes; evicts what is too much.

        What is pinned or being answered from stays, even where it is too much.

        Raises:
            StoreError: the catalog cannot be written.
        """
        self._check_writable()
        self._contents.set_budget(budget)

    def pin(self, documents: Iterable[str]) -> None:
        """Never evict caches that these documents refer to, now or later, until :meth:`unpin`.

        Nor those of their parts, whose ids are theirs with ``#`` and more behind it.

        Raises:
            InputError: ``documents`` is one string.
            StoreError: the catalog cannot be written.
        """
        self._change_pins(room.pin, documents)

    def unpin(self, documents: Iterable[str]) -> None:
        """Take pins back; unknown ones are ignored.

        Raises:
            InputError, StoreError: as :meth:`pin`.
        """
        self._change_pins(room.unpin, documents)

    def pinned(self) -> list[str]:
        """The documents that are pinned."""
        with explained("read the store", self.path):
            return self._catalog.read(room.pins)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Check every checksum, name, row and reference; changes nothing.

        Args:
            progress: called with (files checked, files in all) after each file.
        """
        self._uses.flush()
        return self._contents.inspect(False, progress)

    def prune(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Remove corrupt, orphaned, missing and unreferenced entries.

        Also files under ``chunks`` that are no chunk caches, and what killed processes left.

        Raises:
            StoreError: the folder cannot be written to.
        """
        self._check_writable()
        self._uses.flush()
        return self._contents.inspect(True, progress)

    def path_of(self, key: str) -> Path:
        """The file under a key, whether it is there or not.

        Raises:
            InputError: ``key`` is not 64 hex digits.
        """
        return self._files.path(key)

    def copy_catalog(self, folder: Path) -> Path:
        """Write a consistent copy of the catalog into another folder; returns the file.

        Raises:
            StoreError: it cannot be written.
        """
        self._uses.flush()
        copy = folder / self._catalog.path.name
        with explained("copy the catalog of", self.path):
            self._catalog.copy_to(copy)
        return copy

    def close(self) -> None:
        """Write what is remembered and let go of the catalog; tensors read before stay valid."""
        with contextlib.suppress(StoreError):
            self._uses.flush()
        self._catalog.close()

    @property
    def watcher(self) -> FolderWatcher:
        """Who is told what is stored and removed."""
        return self._contents.watcher

    @watcher.setter
    def watcher(self, watcher: FolderWatcher) -> None:
        self._contents.watcher = watcher

    # Below: what the methods above are made of.

    def _opened(self, wanted: str | None, cipher: Cipher | None) -> tuple[str, ChunkFiles, Catalog]:
        """The folder's codec, files and catalog, which are made where they are not there."""
        if (self.path / CATALOG).exists() or not os.access(self.path, os.W_OK):
            return self._known(wanted, cipher)
        with FileLock(self.path / "store.lock", mode=0o600):
            codec = wanted or DEFAULT_CODEC
            if not is_store(self.path) and (codec != RAW or cipher):
                Settings.made(codec, cipher).write(self.path)
            # before the catalog: a folder that has one has its settings
            return self._known(wanted, cipher)

    def _known(self, wanted: str | None, cipher: Cipher | None) -> tuple[str, ChunkFiles, Catalog]:
        """:meth:`_opened`, as the folder was made."""
        settings = Settings.read(self.path)
        if wanted not in (None, settings.codec):
            raise InputError(
                f"the store {self.path} was made with codec {settings.codec!r}, not {wanted!r}: "
                "leave codec out, or use another folder"
            )
        files = ChunkFiles(self.path / CHUNKS, settings.cipher(self.path, cipher))
        return settings.codec, files, Catalog(self.path / CATALOG, files.entries)

    def _change_pins(
        self,
        change: Callable[[sqlite3.Connection, Iterable[str]], None],
        documents: Iterable[str],
    ) -> None:
        if isinstance(documents, str):
            raise InputError("documents must be a list of ids, not one id: pass [id]")
        self._check_writable()
        listed = list(documents)
        with explained("write to the store", self.path):
            self._catalog.write(lambda tx: change(tx, listed))

    def _check_writable(self) -> None:
        if self._catalog.readonly:
            raise StoreError(
                f"cannot change {self.path}: it is read-only; "
                "make it writable, or use another folder"
            )

    def _warn(self, text: str) -> None:
        warnings.warn(f"{text}; it will be computed anew", KVLinkWarning, stacklevel=3)


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a folder was made a store before, so that its codec is fixed.

    Raises:
        StoreError: it cannot be looked at.
    """
    folder = Path(path).expanduser()
    with explained("open the store", folder):
        return any((folder / name).exists() for name in (CATALOG, STORE_JSON, CHUNKS))
