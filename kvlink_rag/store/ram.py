"""Recently used chunk caches of another store, in memory."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError
from kvlink_rag.store.base import KVStore, StoreCheck, StoreStat
from kvlink_rag.store.codec import codec_for
from kvlink_rag.store.folder.behind import FolderBehind
from kvlink_rag.store.folder.store import FolderStore

QUEUE = 256
"""Records that may wait to be copied; what is found while so many wait is not kept."""
IDLE_S = 1.0
"""Time after which the copying thread ends when there is nothing to do."""


@dataclass(eq=False)
class _Request:
    """A key somebody asked for, and what was found under it, to be copied."""

    key: str
    record: ChunkKV | None = None


class RamTier(FolderBehind):
    """A :class:`~kvlink_rag.store.base.KVStore` that keeps what was read last from another one.

    What is kept costs no disk and no checksum. Anything else is given back as the store below
    gives it, without a wait: its copy for the next time is made by a thread in the background.
    Records are shared by all who get them: do not change them.

    Only changes made through this object are seen: an entry that another process removed may be
    served on, which is harmless, since a key stands for its contents. :meth:`has` is then true
    too.

    Args:
        store: the store below; :meth:`close` closes it.
        max_bytes: of keys and values kept, the copy being made included. Least recently used
            records make room; one that is larger is never kept.

    Raises:
        InputError: ``max_bytes`` is no positive int.
    """

    def __init__(self, store: KVStore, max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise InputError(
                f"max_bytes is {max_bytes!r}: pass how many bytes of memory to use, an int >= 1"
            )
        self.max_bytes = max_bytes
        self.hits = 0
        """Times that :meth:`get` found a record in memory."""
        self.misses = 0
        """Times that it had to ask the store below."""
        self._below = store
        has_folder = isinstance(store, (FolderStore, FolderBehind))
        self._folder = self.folder_behind() if has_folder else None
        self._kept: OrderedDict[str, ChunkKV] = OrderedDict()  # least recently used first
        self._stopped = False
        self._closed = False
        self._renew()
        _tiers.add(self)

    @property
    def codec(self) -> str:
        """That of the store below; memory keeps what the store below gives."""
        return self._below.codec

    @property
    def cache_after(self) -> int:
        """That of the store below."""
        return self._below.cache_after

    @property
    def below(self) -> KVStore:
        """The store below."""
        return self._below

    def folder_behind(self) -> FolderStore:
        """The folder below.

        Raises:
            InputError: the store below has none.
        """
        if isinstance(self._below, FolderStore):
            return self._below
        if isinstance(self._below, FolderBehind):
            return self._below.folder_behind()
        raise InputError(
            f"a {type(self._below).__name__} has no budget and no pins: use a folder as store"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values kept now."""
        return self._nbytes

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        """The cache under ``key``: from memory, or else what the store below finds in time."""
        with self._changed:
            if (record := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                self.hits += 1
            else:
                self.misses += 1
                request = self._request(key)
        if record is not None:
            if self._folder is not None:
                self._folder.count_use(key, record)
            return record
        try:
            record = self._below.get(key, within_s)
        finally:
            if request is not None:
                request.record = record  # None also where the store below has raised
                self._enqueue(request)
        return record

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Store below; nothing is kept before it is read.

        Raises:
            StoreError, InputError: as the store below says.
        """
        self._below.put(record, documents)
        key = record.key_as(codec_for(self.codec, record.dtype))
        self._forget([key])  # its reader may have refused the one that is kept

    def has(self, key: str) -> bool:
        """Whether ``get`` would find an entry."""
        with self._changed:
            if key in self._kept:
                return True
        return self._below.has(key)

    def refer(self, references: Iterable[tuple[str, str]]) -> None:
        """Let documents refer to entries, see the store below."""
        self._below.refer(references)

    def release(self, documents: Iterable[str], keep: Collection[str] = ()) -> int:
        """Drop references, and entries left without any, below and from memory.

        Returns:
            the number of entries removed below.
        """
        try:
            return self._below.release(documents, keep)
        finally:  # a part may have been removed before an error
            self._forget_removed()

    def count_misses(self, keys: Iterable[str]) -> list[int]:
        """Count misses, see the store below."""
        return self._below.count_misses(keys)

    def references(self, prefix: str = "") -> list[tuple[str, str]]:
        """Pairs ``(document id, key)`` of the store below."""
        return self._below.references(prefix)

    def stat(self) -> StoreStat:
        """Counts and sizes of the store below."""
        return self._below.stat()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Check the store below."""
        return self._below.verify(progress)

    def prune(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Remove from the store below what ``verify`` reports, and from memory."""
        try:
            return self._below.prune(progress)
        finally:
            self._forget_removed()

    def flush(self) -> None:
        """Wait until all that was found so far has been copied."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._copying)

    def close(self) -> None:
        """Let go of the memory and close the store below; closing twice is fine."""
        self._stop()
        with self._changed:
            closed, self._closed = self._closed, True
            self._kept.clear()
            self._nbytes = 0
        if not closed:
            self._below.close()

    # Below: what the methods above are made of.

    def _renew(self) -> None:
        """Start without a thread, as a forked process does, where any lock may be held for ever."""
        self._changed = threading.Condition()
        self._nbytes = sum(record.nbytes for record in self._kept.values())
        # by key, from before the store below is asked until the copy is kept. Whoever takes a
        # request out (its entry was removed or replaced meanwhile) keeps the copy from being kept
        self._requests: dict[str, _Request] = {}
        self._queue: deque[_Request] = deque()
        self._copying = False
        self._thread: threading.Thread | None = None

    def _request(self, key: str) -> _Request | None:
        if self._stopped or key in self._requests:
            return None
        request = self._requests[key] = _Request(key)
        return request

    def _enqueue(self, request: _Request) -> None:
        with self._changed:
            if self._requests.get(request.key) is not request:
                return
            fits = request.record is not None and request.record.nbytes <= self.max_bytes
            if fits and len(self._queue) < QUEUE and self._started():
                self._queue.append(request)
                self._changed.notify_all()
            else:
                del self._requests[request.key]

    def _started(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="kvlink-ram", daemon=True)
            with contextlib.suppress(RuntimeError):  # too many threads, or the process is ending
                thread.start()
                self._thread = thread
        return self._thread is not None

    def _work(self) -> None:
        while self._copy_next():
            pass  # with no record in a variable, which would live on after it is dropped

    def _copy_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopped, IDLE_S)
            if not self._queue:
                self._thread = None  # and nothing refers to this object from a thread any more
                return False
            request = self._queue.popleft()
            self._copying = True
            if wanted := self._requests.get(request.key) is request:
                self._make_room(request)
        copy = _copied(request) if wanted else None
        with self._changed:
            self._copying = False
            if self._requests.get(request.key) is request:
                del self._requests[request.key]
                if copy is not None:
                    self._kept[request.key] = copy
                    self._nbytes += copy.nbytes
            self._changed.notify_all()
        return True

    def _make_room(self, request: _Request) -> None:
        assert request.record is not None
        while self._nbytes + request.record.nbytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._nbytes -= dropped.nbytes

    def _forget(self, keys: Iterable[str]) -> None:
        with self._changed:
            for key in keys:
                self._requests.pop(key, None)
                if (record := self._kept.pop(key, None)) is not None:
                    self._nbytes -= record.nbytes

    def _forget_removed(self) -> None:
        with self._changed:
            keys = {*self._kept, *self._requests}
        self._forget([key for key in keys if not self._below.has(key)])

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._requests.clear()
            self._queue.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()


def _copied(request: _Request) -> ChunkKV | None:
    """The record with keys and values of its own; None where memory does not suffice."""
    record = request.record
    assert record is not None
    with contextlib.suppress(MemoryError, RuntimeError):
        return record.copied(_own)
    return None


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the same device.

    By numpy: it copies in this thread alone, without the interpreter's lock, where torch would
    start a team of threads beside those that compute somebody's answer.
    """
    if tensor.device.type != "cpu":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    np.copyto(_raw(copy), _raw(tensor))
    return copy


def _raw(tensor: torch.Tensor) -> np.ndarray:
    """As bytes: numpy has no bfloat16."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


_tiers: weakref.WeakSet[RamTier] = weakref.WeakSet()


def _renew_all() -> None:
    for tier in list(_tiers):
        tier._renew()


def _stop_all() -> None:
    for tier in list(_tiers):
        tier._stop()


# A daemon thread that is inside torch while the interpreter goes away can abort the process.
atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
