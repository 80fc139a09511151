"""Chunk caches in a folder: one safetensors file each, and a SQLite catalog."""

from __future__ import annotations

import contextlib
import json
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

from filelock import FileLock

from kvlink_rag.chunk import RAW, ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store import catalog as sql
from kvlink_rag.store.base import StoreCheck, StoreStat
from kvlink_rag.store.catalog import Catalog, Entry
from kvlink_rag.store.check import find, settle
from kvlink_rag.store.codec import check_codec, codec_for
from kvlink_rag.store.database import explained
from kvlink_rag.store.files import ChunkFiles, sync_folder
from kvlink_rag.store.record import CorruptRecord
from kvlink_rag.whole import write_whole

TOUCHES = 256
"""Uses that are remembered before they are written to the catalog."""
RELEASE_BATCH = 500
"""Documents released in one transaction, so that other writers get their turn."""


class FolderStore:
    """A :class:`~kvlink_rag.store.base.KVStore` in a folder.

    Files are ``chunks/<first 2 hex digits>/<key>.safetensors``, written to a temporary name,
    synced and renamed; ``catalog.sqlite`` describes them. Any number of threads and processes may
    use one folder at once. Reading does not touch the catalog. Tensors of :meth:`get` are views of
    the mapped file and stay valid after it is removed.

    Args:
        path: the folder; made with mode 0700 when it is not there. A read-only one can be read.
        codec: what keys and values are written as (:mod:`kvlink_rag.store.codec`); fixed when the
            folder is made. None is what it was made with, ``raw`` for a new one.

    Raises:
        InputError: there is no such codec, or the folder has another.
        StoreError: the folder cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], codec: str | None = None) -> None:
        if codec is not None:
            check_codec(codec)
        self.path = Path(path).expanduser().absolute()
        self._files = ChunkFiles(self.path / "chunks")
        self._touched: dict[str, Entry] = {}
        self._touching = threading.Lock()
        with explained("open the store", self.path):
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700, parents=True)
            os.listdir(self.path)  # unreadable: say so before anything is made
            self.codec, self._catalog = self._opened(codec)
            if not self._catalog.readonly:
                self._files.folder.mkdir(mode=0o700, exist_ok=True)

    def has(self, key: str) -> bool:
        """Whether there is a file under ``key``; its contents are not looked at."""
        return self._files.path(key).exists()

    def get(self, key: str) -> ChunkKV | None:
        """The cache under ``key``, checksum verified; None when absent or corrupt.

        A corrupt file is removed with a warning, so that the cache is computed anew.
        """
        file = self._files.path(key)
        try:
            record = self._files.read(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CorruptRecord as reason:
            self._drop_corrupt(key)
            self._warn(f"dropped the chunk cache {file}: {reason}")
            return None
        except OSError as error:
            self._warn(f"cannot read the chunk cache {file}: {error}")
            return None
        self._touch(key, record)
        return record

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Store under its key with the store's codec, wholly or not at all, for ``documents``.

        Raises:
            InputError: keys and values do not fit the tokens, or are another codec's.
            StoreError: it could not be written, or the codec cannot hold its numbers; nothing is
                left behind.
        """
        self._check_writable()
        documents = list(documents)
        temporary: Path | None = None
        try:
            with explained("store a chunk cache in", self.path):
                codec = codec_for(self.codec, record.keys.dtype)
                temporary, nbytes = self._files.write(record, codec)
                entry = _entry(record.key_as(codec), record, nbytes)
                self._catalog.write(lambda tx: self._publish(tx, temporary, entry, documents))
        except BaseException:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            raise
        self._flush()

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

    def stat(self) -> StoreStat:
        """Counts and sizes, from the catalog."""
        self._flush()
        with explained("read the store", self.path):
            return self._catalog.read(sql.stat)

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

    def close(self) -> None:
        """Write what is remembered and let go of the catalog; tensors read before stay valid."""
        with contextlib.suppress(StoreError):
            self._flush()
        self._catalog.close()

    # Below: what the methods above are made of.

    def _opened(self, wanted: str | None) -> tuple[str, Catalog]:
        """The folder's codec and catalog; both are made where they are not there."""
        path = self.path / "catalog.sqlite"
        if path.exists() or not os.access(self.path, os.W_OK):
            return self._known_codec(wanted), Catalog(path, self._files.entries)
        with FileLock(self.path / "store.lock", mode=0o600):
            if not path.exists() and not self._settings.exists() and wanted not in (None, RAW):
                write_whole(self._settings, json.dumps({"codec": wanted}))
                sync_folder(self.path)
            # before the catalog: a folder that has one has its codec
            return self._known_codec(wanted), Catalog(path, self._files.entries)

    @property
    def _settings(self) -> Path:
        return self.path / "store.json"

    def _known_codec(self, wanted: str | None) -> str:
        """The codec that the folder was made with."""
        found = RAW
        with contextlib.suppress(FileNotFoundError):
            try:
                found = check_codec(json.loads(self._settings.read_bytes())["codec"])
            except (ValueError, KeyError, TypeError, InputError) as error:
                raise StoreError(
                    f"cannot open the store {self.path}: {self._settings} names no codec "
                    f"({error}); write the codec into it again, or use another folder"
                ) from error
        if wanted not in (None, found):
            raise InputError(
                f"the store {self.path} was made with codec {found!r}, not {wanted!r}: leave codec "
                "out, or use another folder"
            )
        return found

    def _publish(
        self, tx: sqlite3.Connection, temporary: Path, entry: Entry, documents: Iterable[str]
    ) -> None:
        # renamed before the commit: whoever holds the write lock sees file and row, or neither
        sql.add(tx, entry, documents)
        self._files.publish(temporary, entry.key)

    def _refer(self, tx: sqlite3.Connection, pairs: Sequence[tuple[str, str]]) -> None:
        sql.refer(tx, pairs)
        for key in {key for _, key in pairs}:
            # a put that was killed before its commit left a file without a row, which prune would
            # take for left over
            if not sql.knows(tx, key) and (entry := self._files.entry(key)):
                sql.add(tx, entry)

    def _let_go(
        self, tx: sqlite3.Connection, documents: Collection[str], keep: Collection[str]
    ) -> int:
        free = sql.let_go(tx, documents, keep)
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

    def _touch(self, key: str, record: ChunkKV) -> None:
        with self._touching:
            self._touched[key] = _entry(key, record)
            full = len(self._touched) >= TOUCHES
        if full:
            self._flush(wait=False)  # somebody is waiting for an answer

    def _flush(self, wait: bool = True) -> None:
        """Write the remembered uses, and take in files that have no row (a put was killed)."""
        with self._touching:
            touched, self._touched = self._touched, {}

        def write(tx: sqlite3.Connection) -> None:
            for entry in touched.values():
                if not sql.touch(tx, entry):
                    with contextlib.suppress(FileNotFoundError):  # released meanwhile
                        size = self._files.path(entry.key).stat().st_size
                        sql.add(tx, replace(entry, nbytes=size))

        if touched and not self._catalog.readonly:
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
                self._catalog.write(lambda tx: settle(tx, found, self._files, remove))
            return found.report(self._files)

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
        return any((folder / name).exists() for name in ("catalog.sqlite", "store.json", "chunks"))
