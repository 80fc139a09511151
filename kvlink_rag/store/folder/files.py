"""The files of a folder store: their names, and what is to be thought of each."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from stat import S_ISREG

from kvlink_rag.chunk import RAW, ChunkKV
from kvlink_rag.errors import InputError
from kvlink_rag.store.encryption import Cipher
from kvlink_rag.store.folder.catalog import Entry
from kvlink_rag.store.record import (
    CorruptRecord,
    Header,
    MappedRecord,
    map_record,
    read_header,
    write_record,
)

KEY = re.compile(r"[0-9a-f]{64}")
SUFFIX = ".safetensors"
SEALED = ".sealed"
"""Of the files of an encrypted store."""
TEMPORARY = re.compile(r"\.writing-([0-9a-f]{8})-(\d+)-[0-9a-f]+(?:\.([0-9a-f]{64}))?")
"""Files of writers: host, process, and behind the point the key of a cache about to be renamed."""
ABANDONED_S = 3600.0
"""After this time a temporary file counts as left behind, whoever wrote it."""
MAPPED = 4096
"""Files that are remembered as mapped before those that nobody holds are forgotten."""
LOCKS = 64
"""Files that threads may map at a time."""
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
"""A process id says something only about processes of this machine."""


class State(Enum):
    """What a file in the folder is."""

    WHOLE = "a chunk cache, verified"
    WRITING = "a temporary file of a process that is alive"
    CORRUPT = "named as a chunk cache, but damaged or another one"
    STRAY = "a temporary file of a dead process, or a foreign file"
    GONE = "removed meanwhile"


class ChunkFiles:
    """Files ``<first 2 hex digits>/<key>.safetensors`` in a folder, and ``.writing`` beside them.

    There a file is written before it gets its name. Before that, an empty one with the key in its
    name is put beside it, and removed when the catalog has the cache: what a killed process left
    is found without looking through the folder.

    Args:
        folder: it need not be there.
        cipher: seals the files, which then are ``<key>.sealed``.
    """

    def __init__(self, folder: Path, cipher: Cipher | None = None) -> None:
        self.folder = folder
        self.writing = folder / ".writing"
        self._cipher = cipher
        self._suffix = SUFFIX if cipher is None else SEALED
        self._mapped: dict[str, tuple[tuple[int, ...], MappedRecord]] = {}
        self._new_locks()
        _FOLDERS.add(self)

    def _new_locks(self) -> None:
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    def path(self, key: str) -> Path:
        """Where the cache under ``key`` is kept.

        Raises:
            InputError: ``key`` is not 64 hex digits.
        """
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise InputError(f"{key!r} is no key of a chunk cache: keys are 64 hex digits")
        return self.folder / key[:2] / f"{key}{self._suffix}"

    def shared_name(self, key: str) -> str:
        """What the file under ``key`` is called in a place that other folders use, too."""
        return key if self._cipher is None else self._cipher.name(key)

    def has(self, key: str) -> bool:
        """Whether there is a file under ``key``; its contents are not looked at."""
        path = self.path(key)
        return path.exists() and not path.parent.is_symlink()

    def read(self, key: str) -> ChunkKV:
        """The verified cache under ``key``; one mapping of the file serves all who hold it.

        Raises:
            CorruptRecord: the file is damaged or holds another chunk's cache.
            OSError: it cannot be read, or is not there.
        """
        path = self.path(key)
        with self._locks[int(key[:4], 16) % LOCKS]:  # who comes second finds the first's mapping
            return self._read(path, key)

    def _read(self, path: Path, key: str) -> ChunkKV:
        stat = _regular(path)
        # a file that was shortened must not be read through a mapping of what it was
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._mapped.get(key)
        if known and known[0] == identity and (record := known[1].verified()):
            return record
        record, mapped = map_record(path, key, self._cipher)
        self._forget()
        self._mapped[key] = (identity, mapped)
        return record

    def held(self, key: str) -> bool:
        """Whether somebody in this process holds the cache that was read under ``key``."""
        known = self._mapped.get(key)
        return known is not None and known[1].record() is not None

    def _forget(self) -> None:
        """Drop what nobody holds any more, once it is much."""
        if len(self._mapped) >= MAPPED:
            self._mapped = {k: each for k, each in self._mapped.copy().items() if each[1].record()}

    def write(self, record: ChunkKV, codec: str = RAW) -> tuple[Path, int]:
        """Write a cache to a temporary file and sync it.

        Returns:
            the temporary file, and its bytes.

        Raises:
            OSError: nothing is left behind.
        """
        temporary = self._temporary(record.key_as(codec))
        try:
            return temporary, write_record(temporary, record, codec, self._cipher)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _temporary(self, key: str) -> Path:
        place = self.path(key).parent
        _check_no_link(place)
        for folder in (self.folder, place, self.writing):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                sync_folder(folder.parent)
        return self.writing / f".writing-{HOST}-{os.getpid()}-{secrets.token_hex(8)}"

    def write_bytes(self, key: str, data: bytes) -> Path:
        """Write a file of another folder to a temporary file beside its place and sync it.

        Raises:
            OSError: nothing is left behind.
        """
        temporary = self._temporary(key)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            return temporary
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def verified(self, temporary: Path, key: str) -> ChunkKV:
        """The cache in a temporary file that is to become the one under ``key``.

        Raises:
            CorruptRecord: the file is damaged or holds another chunk's cache.
        """
        return map_record(temporary, key, self._cipher)[0]

    def publish(self, temporary: Path, key: str) -> Path:
        """Give a temporary file its name, durably.

        Returns:
            a file to be removed once the catalog has the cache.
        """
        path = self.path(key)
        note = temporary.with_name(f"{temporary.name}.{key}")
        note.touch(mode=0o600)
        try:
            os.replace(temporary, path)
        except BaseException:
            note.unlink()
            raise
        sync_folder(path.parent)
        return note

    def left(self) -> list[tuple[Path, str | None]]:
        """What dead writers left, with the key that was about to be used, if there is one."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.writing.iterdir():
                match = TEMPORARY.fullmatch(path.name)
                with contextlib.suppress(FileNotFoundError):  # its writer is done with it
                    if match and not _may_be_writing(path, match):
                        found.append((path, match[3]))
        return found

    def remove(self, key: str) -> None:
        """Remove the file under ``key`` if it is there."""
        path = self.path(key)
        _check_no_link(path.parent)
        path.unlink(missing_ok=True)

    def paths(self) -> Iterator[Path]:
        """Every file in the folder, whatever it is."""
        for folder, _, names in os.walk(self.folder):
            yield from (Path(folder, name) for name in names)

    def entries(self) -> Iterator[Entry]:
        """What the headers of the caches say, unverified; other files are left out."""
        for path in self.paths():
            if (entry := self._entry(path)) is not None:
                yield entry

    def entry(self, key: str) -> Entry | None:
        """What the header of a cache says, unverified; None where there is none to be read."""
        return self._entry(self.path(key))

    def _entry(self, path: Path) -> Entry | None:
        with contextlib.suppress(CorruptRecord, OSError):
            if (key := self.key_of(path)) is not None:
                header, stat = self.header(key), path.stat()
                return Entry(key, header.tokens, stat.st_size, header.fingerprint, stat.st_mtime)
        return None

    def header(self, key: str) -> Header:
        """What the header of a cache says, unverified.

        Raises:
            CorruptRecord: there is no header, or it is another chunk's.
            OSError: the file cannot be read, or is not there.
        """
        path = self.path(key)
        _regular(path)
        header = read_header(path, key, self._cipher)
        if header.key != key:
            raise CorruptRecord("it holds the cache of another chunk")
        return header

    def key_of(self, path: Path) -> str | None:
        """The key of a file that is named as a chunk cache and in its place."""
        key = path.name.removesuffix(self._suffix)
        return key if KEY.fullmatch(key) and path == self.path(key) else None

    def state(self, path: Path) -> State:
        """Look at a file, reading all of it.

        Raises:
            PermissionError: this user may not read it.
        """
        try:
            key = self.key_of(path)
            if key is not None:
                self.read(key)
                return State.WHOLE
            writing = (match := TEMPORARY.fullmatch(path.name)) and _may_be_writing(path, match)
            return State.WRITING if writing else State.STRAY
        except FileNotFoundError:
            return State.GONE
        except PermissionError:
            raise  # says nothing about the contents
        except (CorruptRecord, OSError):
            return State.CORRUPT


_FOLDERS: weakref.WeakSet[ChunkFiles] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a child process: a lock that a thread held when it was made would stay held."""
    for files in list(_FOLDERS):
        files._new_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def sync_folder(folder: Path) -> None:
    """Make names given to files in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(path: Path) -> os.stat_result:
    """The status of a chunk file.

    Files that were copied from elsewhere may have anything in their place: a pipe would be waited
    for, and a link leads out of the folder.

    Raises:
        CorruptRecord: it is no regular file.
        OSError: it is not there, or its folder is a link.
    """
    _check_no_link(path.parent)
    stat = path.lstat()
    if not S_ISREG(stat.st_mode):
        raise CorruptRecord("it is a link or no regular file")
    return stat


def _check_no_link(folder: Path) -> None:
    """Nothing is read, written or removed through a link in a folder's place."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "there is a link in a folder's place, remove it", str(folder))


def _may_be_writing(path: Path, name: re.Match[str]) -> bool:
    if time.time() - path.stat().st_mtime > ABANDONED_S:
        return False
    host, pid = name[1], name[2]
    try:
        if host == HOST:
            os.kill(int(pid), 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's, alive
    return True
