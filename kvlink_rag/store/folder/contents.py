"""What a folder store holds: each cache is a file and a row in the catalog, changed together."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import StoreError
from kvlink_rag.store.base import Budget, StoreCheck
from kvlink_rag.store.codec import codec_for
from kvlink_rag.store.folder import budget as room
from kvlink_rag.store.folder import catalog as sql
from kvlink_rag.store.folder.catalog import Catalog, Entry
from kvlink_rag.store.folder.check import Findings, find, settle
from kvlink_rag.store.folder.database import explained
from kvlink_rag.store.folder.files import ChunkFiles
from kvlink_rag.store.folder.outbox import Waiting
from kvlink_rag.store.folder.settings import Settings
from kvlink_rag.store.record import CorruptRecord

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


class Contents:
    """The files of a folder store and the rows that describe them, kept in step.

    Files get their names and are removed within the catalog's transaction: whoever holds its write
    lock sees file and row, or neither.

    Args:
        path: the folder, as errors name it.

    Attributes:
        codec: the folder's, as it was when this was last looked at.
        watcher: who is told of changes.
    """

    def __init__(self, path: Path, codec: str, files: ChunkFiles, catalog: Catalog) -> None:
        self.codec = codec
        self.watcher: FolderWatcher = Waiting(path)
        self._path = path
        self._files = files
        self._catalog = catalog

    def renew_codec(self) -> str:
        """The codec that the folder has now: another process may have migrated it.

        Raises:
            StoreError, OSError: as :meth:`kvlink_rag.store.folder.settings.Settings.read`.
        """
        self.codec = Settings.read(self._path).codec
        return self.codec

    def put(self, record: ChunkKV, documents: Collection[str]) -> None:
        """Write a cache with the folder's codec, wholly or not at all, for ``documents``.

        Raises:
            InputError, StoreError: as :meth:`kvlink_rag.store.FolderStore.put`.
        """
        temporary: Path | None = None
        try:
            with explained("store a chunk cache in", self._path):
                codec = codec_for(self.renew_codec(), record.dtype)
                temporary, nbytes = self._files.write(record, codec)
                entry = Entry.of(record.key_as(codec), record, nbytes)

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
        """Take in another folder's file; see :meth:`kvlink_rag.store.FolderStore.adopt`.

        Raises:
            CorruptRecord: the file is damaged, or holds another chunk's cache.
            StoreError: it could not be written; nothing is left behind.
        """
        temporary: Path | None = None
        note: Path | None = None

        def publish(tx: sqlite3.Connection) -> Path | None:
            assert temporary is not None
            if not wanted():
                return None
            self._check_codec(record, record.codec)
            return self._publish(tx, temporary, Entry.of(key, record, len(data)), ())

        try:
            with explained("store a chunk cache in", self._path):
                temporary = self._files.write_bytes(key, data)
                record = self._files.verified(temporary, key)
                note = self._catalog.write(publish)
                return None if note is None else record
        finally:
            for path in (temporary, note):  # under its own name when it was not published
                if path is not None:
                    path.unlink(missing_ok=True)

    def refer(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Let documents refer to keys: pairs ``(document id, key)``.

        Raises:
            StoreError: the catalog cannot be written.
        """
        with explained("write to the store", self._path):
            self._catalog.write(lambda tx: self._refer(tx, pairs))

    def release(self, documents: Iterable[str], keep: Collection[str]) -> int:
        """Drop references of documents except to ``keep``, and every cache left without any.

        Returns:
            the number of caches removed.

        Raises:
            StoreError: the catalog cannot be written.
        """
        rest = iter(documents)
        removed = 0
        while batch := list(islice(rest, RELEASE_BATCH)):
            with explained("release chunk caches in", self._path):
                removed += self._catalog.write(partial(self._let_go, documents=batch, keep=keep))
        return removed

    def set_budget(self, budget: Budget) -> None:
        """Say what the folder may hold from now on; evicts what is too much.

        Raises:
            StoreError: the catalog cannot be written.
        """

        def write(tx: sqlite3.Connection) -> None:
            room.set_budget(tx, budget)
            self._keep_budget(tx, {document for document, _ in sql.references(tx)})

        with explained("write to the store", self._path):
            self._catalog.write(write)

    def inspect(self, remove: bool, progress: Callable[[int, int], None] | None) -> StoreCheck:
        """Check every file and row, and remove what does not belong if that is asked for.

        Raises:
            StoreError: the folder cannot be read, or not be written to.
        """
        with explained("check", self._path):
            if not self._catalog.sound():
                if not remove:
                    return StoreCheck(corrupt=[str(self._catalog.path)])
                self._catalog.rebuild()
            found = find(self._files, self._catalog, progress)
            if found and not self._catalog.readonly:
                # from outside, a file that is just being stored looks like an orphan
                self._catalog.write(lambda tx: self._settle(tx, found, remove))
            return found.report(self._files)

    def drop_corrupt(self, key: str) -> None:
        """Remove a cache that was found damaged, if that can be done at once."""

        def drop(tx: sqlite3.Connection) -> None:
            try:
                self._files.read(key)  # has another process stored it anew meanwhile?
            except CorruptRecord:
                sql.drop(tx, key)
                self._files.remove(key)

        # in a read-only folder, or while another process writes, it stays: put replaces it
        with contextlib.suppress(OSError, sqlite3.Error, StoreError):
            self._catalog.write(drop, wait=False)

    def tidy_up(self) -> None:
        """Take in or remove what killed processes were just writing; prune finds the rest.

        Raises:
            OSError: the folder cannot be read.
        """
        left = self._files.left()

        def take_in(tx: sqlite3.Connection) -> None:
            for path, key in left:
                # killed between its new name and the commit
                if key:
                    self._take_in(tx, key)
                path.unlink(missing_ok=True)
            self._keep_budget(tx, ())

        if left:
            with contextlib.suppress(OSError, sqlite3.Error, StoreError):  # the next one does it
                self._catalog.write(take_in, wait=False)

    def take_in_used(self, tx: sqlite3.Connection, entries: Collection[Entry]) -> None:
        """Make rows for files that were read without having one (their put was killed)."""
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                size = self._files.path(entry.key).stat().st_size
                sql.add(tx, replace(entry, nbytes=size))
        if entries:
            self._keep_budget(tx, ())

    # Below: what is done inside a transaction.

    def _check_codec(self, record: ChunkKV, codec: str) -> None:
        """As the only writer, refuse what was written before a migration that is through now."""
        if codec_for(self.renew_codec(), record.dtype) != codec:
            raise StoreError(
                f"{self._path} was migrated to codec {self.codec!r} by another process just now: "
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

    def _keep_budget(self, tx: sqlite3.Connection, documents: Collection[str]) -> None:
        for key in room.keep(tx, documents, self._files.held):
            self._files.remove(key)

    def _take_in(self, tx: sqlite3.Connection, key: str) -> None:
        """Make a row for a file that has none."""
        if not sql.knows(tx, key) and (entry := self._files.entry(key)):
            sql.add(tx, entry)

    def _refer(self, tx: sqlite3.Connection, pairs: Sequence[tuple[str, str]]) -> None:
        sql.refer(tx, pairs)
        for key in {key for _, key in pairs}:
            # a put that was killed before its commit left a file without a row, which prune would
            # take for left over
            self._take_in(tx, key)
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

    def _settle(self, tx: sqlite3.Connection, found: Findings, remove: bool) -> None:
        if remove:
            settle(tx, found, self._files, remove=False)
            if found.unreferenced:
                self.watcher.pruned(found.unreferenced)
        settle(tx, found, self._files, remove)
