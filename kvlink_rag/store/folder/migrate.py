"""Change what a folder's caches are written as, in place."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from kvlink_rag.chunk import RAW
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store.base import StoreStat
from kvlink_rag.store.codec import check_codec, codec_for, needs_rope
from kvlink_rag.store.encryption import Cipher, EncryptionKey
from kvlink_rag.store.folder import catalog as sql
from kvlink_rag.store.folder.catalog import Catalog, Entry
from kvlink_rag.store.folder.database import explained
from kvlink_rag.store.folder.files import TEMPORARY, ChunkFiles, State
from kvlink_rag.store.folder.outbox import Waiting
from kvlink_rag.store.folder.settings import Settings
from kvlink_rag.store.folder.store import CATALOG, CHUNKS
from kvlink_rag.store.record import CorruptRecord, Header

BATCH = 100
"""Old entries removed in one transaction, so that others get their turn."""


def migrate(
    path: str | os.PathLike[str],
    codec: str,
    *,
    encryption_key: EncryptionKey | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StoreStat:
    """Write the caches of a folder with another codec, with the same document references.

    New files are made beside the old ones, then the folder's codec is changed, then the old files
    are removed. So the disk holds both for a while, and a migration that was killed or ran out of
    disk leaves a folder that works as before: run it again to finish it, or with the folder's own
    codec to undo it.

    Others may read and write the folder meanwhile: what they store is rewritten too, and stores
    that are open take the new codec over when they next store something or miss it.

    Args:
        path: of a folder with codec ``raw`` or, for a model in bfloat16, ``bf16``.
        codec: the new one (:mod:`kvlink_rag.store.codec`).
        encryption_key: of an encrypted folder (:class:`FolderStore`),
            which stays encrypted with it.
        progress: called with (files done, files in all) after each file that is rewritten.

    Returns:
        counts and sizes afterwards.

    Raises:
        InputError: there is no such codec; the caches went through another one already, or their
            files do not say how keys are rotated, so that they have to be indexed again; or the
            key is not the folder's.
        StoreError: there is no such folder, a file is damaged, or it cannot be written.
    """
    check_codec(codec)
    cipher = None if encryption_key is None else Cipher(encryption_key)
    folder = Path(path).expanduser().absolute()
    if not (folder / CATALOG).exists():
        raise StoreError(f"{folder} is no store of chunk caches: name a folder that has a catalog")
    with explained("migrate", folder), _alone(folder):
        settings = Settings.read(folder)
        cipher = settings.cipher(folder, cipher)
        files = ChunkFiles(folder / CHUNKS, cipher)
        catalog = Catalog(folder / CATALOG, files.entries)
        try:
            migration = _Migration(folder, files, catalog, codec, Waiting(folder))
            if settings.codec != codec:
                migration.write(settings.codec, Settings.made(codec, cipher), progress)
            migration.remove_old()
            return catalog.read(sql.stat)
        finally:
            catalog.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "store.lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(f"another process is migrating {folder}: wait until it is done") from error
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Migration:
    folder: Path
    files: ChunkFiles
    catalog: Catalog
    codec: str
    waiting: Waiting
    """For the folder's remote, if it has one."""
    moved: dict[str, str] = field(default_factory=dict)
    """New keys of the caches that were rewritten, by old key."""

    def write(self, old: str, new: Settings, progress: Callable[[int, int], None] | None) -> None:
        """Write every cache of the old codec with the new one, beside its old file; then switch."""
        if old not in (RAW, "bf16"):
            raise InputError(
                f"the store {self.folder} has codec {old!r}: what went through it cannot become "
                f"{self.codec!r}; index again into a new folder"
            )
        looked_at = self.catalog.read(sql.keys)
        keys = [header.key for header in self._headers() if self._is_source(header, old)]
        for done, key in enumerate(keys, start=1):
            self._rewrite(key)
            if progress is not None:
                progress(done, len(keys))
        looked_at |= set(keys)
        while late := self.catalog.write(partial(self._switch, new=new, looked_at=looked_at)):
            for header in self._headers(late):
                if self._is_source(header, old):
                    self._rewrite(header.key)
            looked_at |= late

    def _switch(self, tx: sqlite3.Connection, new: Settings, looked_at: set[str]) -> set[str]:
        """As the only writer, change what the folder is, or say what was stored meanwhile."""
        late = sql.keys(tx) - looked_at - set(self.moved.values())
        if not late:
            for old_key, new_key in self.moved.items():  # documents that came meanwhile
                sql.refer(tx, [(document, new_key) for document in sql.holders(tx, old_key)])
            new.write(self.folder)
        return late

    def _is_source(self, header: Header, old: str) -> bool:
        """Whether a file is to be rewritten; refuses what cannot be."""
        if header.codec not in (RAW, old):
            return False  # new already, or left by a migration to yet another codec
        if header.codec != RAW:
            raise InputError(
                f"the store {self.folder} has caches that went through codec {header.codec!r} and "
                f"cannot become {self.codec!r}: index again into a new folder"
            )
        if needs_rope(self.codec) and not header.has_rope:
            raise InputError(
                f"the store {self.folder} has caches of an older version, which do not say how "
                f"their keys are rotated (the first is {header.key}): index again into a new "
                "folder"
            )
        return True

    def _rewrite(self, key: str) -> None:
        """Write one cache anew, unless a migration before this one has."""
        try:
            record = self.files.read(key)
            used = self.files.path(key).stat().st_mtime
        except FileNotFoundError:
            return  # released or evicted meanwhile
        except CorruptRecord as reason:
            raise self._damaged(key, reason) from reason
        codec = codec_for(self.codec, record.dtype)
        new = record.key_as(codec)
        if new == key:
            return
        temporary = None
        try:
            if self.files.has(new):
                nbytes = self.files.path(new).stat().st_size
            else:
                temporary, nbytes = self.files.write(record, codec)
            entry = Entry(new, len(record.token_ids), nbytes, record.fingerprint, used)
            note = self.catalog.write(lambda tx: self._publish(tx, key, temporary, entry))
            if note is not None:
                note.unlink()
        finally:
            if temporary is not None:  # under its own name when it was not published
                with suppress(OSError):
                    temporary.unlink()

    def _publish(
        self, tx: sqlite3.Connection, key: str, temporary: Path | None, entry: Entry
    ) -> Path | None:
        if not self.files.has(key):
            return None  # released or evicted meanwhile
        sql.add(tx, entry, sql.holders(tx, key))
        sql.take_after(tx, entry.key, key)
        self.waiting.stored(entry.key)
        self.moved[key] = entry.key
        return None if temporary is None else self.files.publish(temporary, entry.key)

    def remove_old(self) -> None:
        """Remove what has another codec than the folder, and what killed migrations left."""
        old = [header.key for header in self._headers() if header.codec != self._codec_of(header)]
        for start in range(0, len(old), BATCH):
            batch = old[start : start + BATCH]
            self.catalog.write(partial(self._forget, keys=batch))
            # after the commit: a file without a row is found again, a row without its file is not
            for key in batch:
                self.files.remove(key)
        for path in list(self.files.paths()):
            if TEMPORARY.fullmatch(path.name) and self.files.state(path) is State.STRAY:
                path.unlink(missing_ok=True)

    def _forget(self, tx: sqlite3.Connection, keys: Collection[str]) -> None:
        """Drop entries, and the references of documents to them."""
        self.waiting.pruned(keys)
        for key in keys:
            sql.forget_holders(tx, key)
            sql.drop(tx, key)

    def _codec_of(self, header: Header) -> str:
        return codec_for(self.codec, header.dtype)

    def _headers(self, keys: Iterable[str] | None = None) -> Iterator[Header]:
        """Of these caches, or of all in the folder, whether the catalog knows them or not."""
        found = map(self.files.key_of, list(self.files.paths())) if keys is None else keys
        for key in found:
            if key is not None:
                try:
                    yield self.files.header(key)
                except FileNotFoundError:
                    continue  # released or evicted meanwhile
                except CorruptRecord as reason:
                    raise self._damaged(key, reason) from reason

    def _damaged(self, key: str, reason: CorruptRecord) -> StoreError:
        return StoreError(
            f"cannot migrate {self.folder}: {self.files.path(key)} is damaged ({reason}); remove "
            f"it with `kvlink store prune {self.folder}`, it will be computed anew, and run again"
        )
