"""Chunk caches in a folder: one safetensors file each, and a SQLite catalog."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from kvlink_rag.chunk import RAW, ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store import budget as room
from kvlink_rag.store import catalog as sql
from kvlink_rag.store.base import Budget, StoreCheck, StoreStat, StoreUsage
from kvlink_rag.store.catalog import Catalog, Entry
from kvlink_rag.store.check import Findings, find, settle
from kvlink_rag.store.codec import check_codec, codec_for
from kvlink_rag.store.database import explained
from kvlink_rag.store.encryption import Cipher, EncryptionKey
from kvlink_rag.store.files import ChunkFiles
from kvlink_rag.store.outbox import Waiting
from kvlink_rag.store.record import CorruptRecord
from kvlink_rag.store.settings import NAME as STORE_JSON
from kvlink_rag.store.settings import Settings

CATALOG = "catalog.sqlite"
CHUNKS = "chunks"

TOUCHES = 256
"""Times caches were asked for that are remembered before they are written to the catalog."""
RELEASE_BATCH = 500
"""Documents released in one transaction, so that other writers get their turn."""


class FolderWatcher(Protocol):
    """Who is told what a folder stores and removes, within the transaction that does it.

    What it notes is noted whenever the folder's change lasts, even through a kill; when it raises,
    so does the call that made the change. Removals for other reasons (damage) are not told.
    """

    def stored(self, key: str) -> None:
        """A cache was put under this key."""

    def released(self, keys: Collection[str]) -> None:
        """These are about to be removed: their last document was released."""

    def pruned(self, keys: Collection[str]) -> None:
        """These are about to be removed: they were found without any document."""


class FolderStore:
    """A :class:`~kvlink_rag.store.base.KVStore` in a folder.

    Files are ``chunks/<first 2 hex digits>/<key>.safetensors``, written under a temporary name,
    synced and renamed; ``catalog.sqlite`` describes them. Any number of threads and processes may
    use one folder at once. Reading does not touch the catalog. Tensors of :meth:`get` are views of
    the mapped file and stay valid after it is removed.

    Args:
        path: the folder; made with mode 0700 when it is not there. A read-only one can be read.
        codec: what keys and values are written as (:mod:`kvlink_rag.store.codec`); fixed when the
            folder is made. None is what it was made with, ``raw`` for a new one.
        budget: bytes of files that the folder may hold, for all processes from now on; what is
            worth least is evicted for what is new (:mod:`kvlink_rag.store.budget`). None leaves the
            folder's as it is, a new one without limit. Each writing thread adds a file for a time.
        encryption_key: 16, 24 or 32 bytes, or what returns them: encrypts the chunk files of a new
            folder, not its catalog (:mod:`kvlink_rag.store.encryption`), and opens them later.
            Without one, an encrypted folder is opened with that in ``KVLINK_STORE_KEY`` and a new
            one is not encrypted.

    Raises:
        InputError: there is no such codec, the folder has another, or the key is not its key.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        codec: str | None = None,
        budget: Budget | int | None = None,
        encryption_key: EncryptionKey | None = None,
    ) -> None:
        if codec is not None:
            check_codec(codec)
        cipher = None if encryption_key is None else Cipher(encryption_key)
        self.path = Path(path).expanduser().absolute()
        self._touched: dict[str, Entry] = {}
        self._asked = 0
        self._missed = 0
        self._touching = threading.Lock()
        limits = Budget(budget) if isinstance(budget, int) else budget
        self.watcher: FolderWatcher = Waiting(self.path)
        with explained("open the store", self.path):
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700, parents=True)
            os.listdir(self.path)  # unreadable: say so before anything is made
            self.codec, self._files, self._catalog = self._opened(codec, cipher)
            if not self._catalog.readonly:
                self._files.folder.mkdir(mode=0o700, exist_ok=True)
                self._tidy_up()
        if limits is not None and limits != self.budget:
            self.set_budget(limits)

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
            self._count(None)
            with contextlib.suppress(OSError, StoreError):  # put says it
                self._renew_codec()
            return None
        except CorruptRecord as reason:
            self._drop_corrupt(key)
            self._warn(f"dropped the chunk cache {file}: {reason}")
            self._count(None)
            return None
        except OSError as error:
            self._warn(f"cannot read the chunk cache {file}: {error}")
            self._count(None)
            return None
        self._count(_entry(key, record))
        return record

    def count_use(self, key: str, record: ChunkKV) -> None:
        """Note that a cache of this folder was got from a copy: what is used is not evicted."""
        self._count(_entry(key, record))

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Store under its key with the store's codec, wholly or not at all, for ``documents``.

        Raises:
            InputError: keys and values do not fit the tokens, or are another codec's.
            StoreError: it could not be written, has no room in the budget, the codec cannot hold
                its numbers, or the folder was migrated meanwhile; nothing is left behind.
        """
        self._check_writable()
        self._flush()  # what is evicted depends on the uses
        documents = list(documents)
        temporary: Path | None = None
        try:
            with explained("store a chunk cache in", self.path):
                codec = codec_for(self._renew_codec(), record.keys.dtype)
                temporary, nbytes = self._files.write(record, codec)
                entry = _entry(record.key_as(codec), record, nbytes)

                def store(tx: sqlite3.Connection) -> Path:
                    self._check_codec(record, codec)
                    return self._store(tx, temporary, entry, documents)

                note = self._catalog.write(store)
            with contextlib.suppress(OSError):
                note.unlink()
        except BaseException:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            raise

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
        temporary: Path | None = None
        note: Path | None = None

        def publish(tx: sqlite3.Connection) -> Path | None:
            assert temporary is not None
            if not wanted():
                return None
            self._check_codec(record, record.codec)
            return self._publish(tx, temporary, _entry(key, record, len(data)), ())

        try:
            with explained("store a chunk cache in", self.path):
                temporary = self._files.write_bytes(key, data)
                record = self._files.verified(temporary, key)
                note = self._catalog.write(publish)
                return None if note is None else record
        finally:
            for path in (temporary, note):  # under its own name when it was not published
                if path is not None:
                    path.unlink(missing_ok=True)

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
            with explained("write to the store", self.path):
                self._catalog.write(lambda tx: self._refer(tx, pairs))

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
        keep = frozenset(keep)
        rest = iter(documents)
        removed = 0
        while batch := list(islice(rest, RELEASE_BATCH)):
            with explained("release chunk caches in", self.path):
                removed += self._catalog.write(partial(self._let_go, documents=batch, keep=keep))
        return removed

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
        self._flush()
        with explained("read the store", self.path):
            return self._catalog.read(sql.stat)

    def usage(self) -> StoreUsage:
        """Budget, hits and misses, ages, and what is held of which model; from the catalog."""
        self._flush()
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

        def write(tx: sqlite3.Connection) -> None:
            room.set_budget(tx, budget)
            self._keep_budget(tx, {document for document, _ in sql.references(tx)})

        with explained("write to the store", self.path):
            self._catalog.write(write)

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
        return self._inspect(False, progress)

    def prune(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Remove corrupt, orphaned, missing and unreferenced entries.

        Also files under ``chunks`` that are no chunk caches, and what killed processes left.

        Raises:
            StoreError: the folder cannot be written to.
        """
        self._check_writable()
        return self._inspect(True, progress)

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
        self._flush()
        copy = folder / self._catalog.path.name
        with explained("copy the catalog of", self.path):
            self._catalog.copy_to(copy)
        return copy

    def close(self) -> None:
        """Write what is remembered and let go of the catalog; tensors read before stay valid."""
        with contextlib.suppress(StoreError):
            self._flush()
        self._catalog.close()

    # Below: what the methods above are made of.

    def _opened(self, wanted: str | None, cipher: Cipher | None) -> tuple[str, ChunkFiles, Catalog]:
        """The folder's codec, files and catalog, which are made where they are not there."""
        if (self.path / CATALOG).exists() or not os.access(self.path, os.W_OK):
            return self._known(wanted, cipher)
        with FileLock(self.path / "store.lock", mode=0o600):
            if not is_store(self.path) and (wanted not in (None, RAW) or cipher):
                Settings.made(wanted or RAW, cipher).write(self.path)
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

    def _renew_codec(self) -> str:
        """The codec that the folder has now: another process may have migrated it."""
        self.codec = Settings.read(self.path).codec
        return self.codec

    def _check_codec(self, record: ChunkKV, codec: str) -> None:
        """As the only writer, refuse what was written before a migration that is through now."""
        if codec_for(self._renew_codec(), record.keys.dtype) != codec:
            raise StoreError(
                f"{self.path} was migrated to codec {self.codec!r} by another process just now: "
                "store the chunk cache again"
            )

    def _store(
        self, tx: sqlite3.Connection, temporary: Path, entry: Entry, documents: Iterable[str]
    ) -> Path:
        note = self._publish(tx, temporary, entry, documents)
        self.watcher.stored(entry.key)
        return note

    def _publish(
        self, tx: sqlite3.Connection, temporary: Path, entry: Entry, documents: Iterable[str]
    ) -> Path:
        sql.add(tx, entry, documents)
        for key in room.keep(tx, set(documents), self._files.held, entry):
            self._files.remove(key)
        # renamed before the commit: whoever holds the write lock sees file and row, or neither
        return self._files.publish(temporary, entry.key)

    def _tidy_up(self) -> None:
        """Take in or remove what killed processes were just writing; prune finds the rest."""
        left = self._files.left()

        def take_in(tx: sqlite3.Connection) -> None:
            for path, key in left:
                # killed between its new name and the commit
                if key and not sql.knows(tx, key) and (entry := self._files.entry(key)):
                    sql.add(tx, entry)
                path.unlink(missing_ok=True)
            self._keep_budget(tx, ())

        if left:
            with contextlib.suppress(OSError, sqlite3.Error, StoreError):  # the next one does it
                self._catalog.write(take_in, wait=False)

    def _keep_budget(self, tx: sqlite3.Connection, documents: Collection[str]) -> None:
        for key in room.keep(tx, documents, self._files.held):
            self._files.remove(key)

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

    def _refer(self, tx: sqlite3.Connection, pairs: Sequence[tuple[str, str]]) -> None:
        sql.refer(tx, pairs)
        for key in {key for _, key in pairs}:
            # a put that was killed before its commit left a file without a row, which prune would
            # take for left over
            if not sql.knows(tx, key) and (entry := self._files.entry(key)):
                sql.add(tx, entry)
        self._keep_budget(tx, {document for document, _ in pairs})

    def _let_go(
        self, tx: sqlite3.Connection, documents: Collection[str], keep: Collection[str]
    ) -> int:
        free = sql.let_go(tx, documents, keep)
        if free:
            self.watcher.released(free)
        for key in free:
            # unlinked before the commit: another process' put of this key waits for the lock
            sql.drop(tx, key)
            self._files.remove(key)
        return len(free)

    def _drop_corrupt(self, key: str) -> None:
        def drop(tx: sqlite3.Connection) -> None:
            try:
                self._files.read(key)  # has another process stored it anew meanwhile?
            except CorruptRecord:
                sql.drop(tx, key)
                self._files.remove(key)

        # in a read-only folder, or while another process writes, it stays: put replaces it
        with contextlib.suppress(OSError, sqlite3.Error, StoreError):
            self._catalog.write(drop, wait=False)

    def _count(self, used: Entry | None) -> None:
        """Remember that a cache was asked for, and which was found."""
        with self._touching:
            self._asked += 1
            if used is None:
                self._missed += 1
            else:
                before = self._touched.get(used.key)
                uses = used.uses + (before.uses if before else 0)
                self._touched[used.key] = replace(used, uses=uses)
            full = self._asked >= TOUCHES
        if full:
            self._flush(wait=False)  # somebody is waiting for an answer

    def _flush(self, wait: bool = True) -> None:
        """Write the remembered uses, and take in files that have no row (a put was killed)."""
        with self._touching:
            touched, self._touched = self._touched, {}
            asked, self._asked = self._asked, 0
            missed, self._missed = self._missed, 0

        def write(tx: sqlite3.Connection) -> None:
            sql.count(tx, asked - missed, missed)
            unknown = [entry for entry in touched.values() if not sql.touch(tx, entry)]
            for entry in unknown:
                with contextlib.suppress(FileNotFoundError):  # released meanwhile
                    size = self._files.path(entry.key).stat().st_size
                    sql.add(tx, replace(entry, nbytes=size))
            if unknown:
                self._keep_budget(tx, ())

        if asked and not self._catalog.readonly:
            with contextlib.suppress(OSError, sqlite3.Error):  # a last use is no reason to fail
                self._catalog.write(write, wait)

    def _inspect(self, remove: bool, progress: Callable[[int, int], None] | None) -> StoreCheck:
        self._flush()
        with explained("check", self.path):
            if not self._catalog.sound():
                if not remove:
                    return StoreCheck(corrupt=[str(self._catalog.path)])
                self._catalog.rebuild()
            found = find(self._files, self._catalog, progress)
            if found and not self._catalog.readonly:
                # from outside, a file that is just being stored looks like an orphan
                self._catalog.write(lambda tx: self._settle(tx, found, remove))
            return found.report(self._files)

    def _settle(self, tx: sqlite3.Connection, found: Findings, remove: bool) -> None:
        if remove:
            settle(tx, found, self._files, remove=False)
            if found.unreferenced:
                self.watcher.pruned(found.unreferenced)
        settle(tx, found, self._files, remove)

    def _check_writable(self) -> None:
        if self._catalog.readonly:
            raise StoreError(
                f"cannot change {self.path}: it is read-only; "
                "make it writable, or use another folder"
            )

    def _warn(self, text: str) -> None:
        warnings.warn(f"{text}; it will be computed anew", KVLinkWarning, stacklevel=3)


def _entry(key: str, record: ChunkKV, nbytes: int = 0) -> Entry:
    return Entry(key, len(record.token_ids), nbytes, record.fingerprint, time.time())


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a folder was made a store before, so that its codec is fixed.

    Raises:
        StoreError: it cannot be looked at.
    """
    folder = Path(path).expanduser()
    with explained("open the store", folder):
        return any((folder / name).exists() for name in (CATALOG, STORE_JSON, CHUNKS))
