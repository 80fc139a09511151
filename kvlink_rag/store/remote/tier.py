"""A folder in front of a remote that several machines share."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store.base import StoreCheck, StoreStat
from kvlink_rag.store.folder.behind import FolderBehind
from kvlink_rag.store.folder.outbox import MOST_UPLOADS, NAME, Operation, Outbox
from kvlink_rag.store.folder.store import FolderStore
from kvlink_rag.store.remote.base import Remote, RemoteError
from kvlink_rag.store.remote.downloads import Downloads
from kvlink_rag.store.remote.guard import Guard
from kvlink_rag.store.remote.uploads import Uploader

TIMEOUT_S = 5.0
RETRY_S = 30.0
PROGRESS_S = 0.5
"""Between two words about uploads that are waited for."""
STALLED_S = 60.0
"""Time in which a remote must take something while its uploads are waited for."""
CLOSE_S = 5.0
"""How long closing waits for uploads; the rest stays in the outbox."""


class RemoteTier(FolderBehind):
    """A :class:`~kvlink_rag.store.base.KVStore`: a folder, and behind it a remote.

    What the folder lacks is downloaded into it, and verified there before it is used. What is put
    is in the folder when :meth:`put` returns and is uploaded in the background, deletions too: both
    wait in the folder's ``outbox.sqlite`` until they are done, by this process or a later one.
    No trouble with the remote reaches an answer: a cache that does not come in time is computed. A
    remote that fails is left alone for a while and tried again, and its user warned once.

    What a folder held before it got a remote is uploaded when it gets one. Entries evicted from the
    folder stay on the remote. Releasing a document deletes there what no other document *of this
    folder* refers to; another machine that still wants it computes it again.

    Args:
        folder: closed by :meth:`close`, as is the remote.
        remote: see :mod:`kvlink_rag.store.remote.base`.
        timeout_s: how long :meth:`get` waits for the remote at most.
        retry_s: how long a remote that has failed is left alone.
        most_uploads: that may wait; beyond, the oldest are given up, with a warning.

    Raises:
        InputError: a number is not above 0, or a package of the extra ``remote`` is missing.
        StoreError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: FolderStore,
        remote: Remote,
        *,
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
        most_uploads: int = MOST_UPLOADS,
    ) -> None:
        numbers = {"timeout_s": timeout_s, "retry_s": retry_s, "most_uploads": most_uploads}
        for name, number in numbers.items():
            if not number > 0:
                raise InputError(f"{name} is {number!r}: pass a number above 0")
        self.folder = folder
        self.remote = remote
        self._timeout_s = timeout_s
        self._closed = False
        self._guard = Guard(remote, retry_s)
        made = not (path := folder.path / NAME).exists()
        self._outbox = Outbox(path, most_uploads)
        if made and remote.writable:
            self._upload(Operation.WRITE, folder.keys())
        self._uploads = Uploader(folder, self._outbox, self._guard)
        self._downloads = Downloads(folder, self._guard, self._wake)
        folder.watcher = self
        _tiers.add(self)
        self._wake()

    @property
    def codec(self) -> str:
        """That of the folder."""
        return self.folder.codec

    @property
    def cache_after(self) -> int:
        """That of the folder."""
        return self.folder.cache_after

    @property
    def answers(self) -> bool:
        """False after the remote has failed, until it answers again."""
        return self._guard.answers

    @property
    def waiting(self) -> int:
        """Uploads and deletions that the remote has yet to take.

        Raises:
            StoreError: the outbox cannot be read.
        """
        return len(self._outbox)

    def folder_behind(self) -> FolderStore:
        """The folder."""
        return self.folder

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        """The cache under ``key``, from the folder or else the remote; None when it does not come.

        Args:
            within_s: how long to wait at most. A remote that is known to take longer is not asked;
                one that does take longer fills the folder for the next time.
        """
        record = self.folder.get(key)
        if record is None:
            limit_s = self._timeout_s if within_s is None else min(within_s, self._timeout_s)
            expected_s = self._guard.speed.expected_s()
            slow = within_s is not None and expected_s is not None and expected_s > within_s
            if not slow and self._may_have(key):
                record = self._downloaded(key, limit_s)
        self._guard.tell()
        return record

    def has(self, key: str) -> bool:
        """Whether ``get`` would find an entry: in the folder, or by what the remote says.

        An object that was damaged there is found out when it is first got, and false from then on.
        """
        found = self.folder.has(key) or (self._may_have(key) and self._is_on_remote(key))
        self._guard.tell()
        return found

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        """Store in the folder; uploaded later.

        Raises:
            StoreError, InputError: as the folder says.
        """
        self.folder.put(record, documents)
        self._wake()
        self._guard.tell()

    def refer(self, references: Iterable[tuple[str, str]]) -> None:
        """Let documents refer to entries, wherever these are, see the folder."""
        self.folder.refer(references)

    def release(self, documents: Iterable[str], keep: Collection[str] = ()) -> int:
        """Drop references, and every entry left without any: from the folder, later the remote.

        Returns:
            the number of entries removed.

        Raises:
            StoreError, InputError: as the folder says.
        """
        try:
            return self.folder.release(documents, keep)
        finally:  # a part may have been removed before an error
            self._wake()
            self._guard.tell()

    def count_misses(self, keys: Iterable[str]) -> list[int]:
        """Count misses, see the folder."""
        return self.folder.count_misses(keys)

    def references(self, prefix: str = "") -> list[tuple[str, str]]:
        """Pairs ``(document id, key)`` of the folder."""
        return self.folder.references(prefix)

    def stat(self) -> StoreStat:
        """Counts and sizes of the folder."""
        return self.folder.stat()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Check the folder."""
        return self.folder.verify(progress)

    def prune(self, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
        """Remove from the folder what ``verify`` reports.

        Entries without a document that were put here are deleted from the remote too; what was
        only downloaded belongs to others and stays there.
        """
        try:
            return self.folder.prune(progress)
        finally:
            self._wake()
            self._guard.tell()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is uploaded and deleted; False when that takes longer."""
        done = self._uploads.flush(timeout_s)
        self._guard.tell()
        return done

    def upload(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Wait for uploads and deletions for as long as the remote takes them.

        Args:
            progress: called with (done, in all) now and then.

        Returns:
            how many are left, when it has failed or taken nothing for a minute; they wait in the
            folder for the next process.
        """
        left = total = self.waiting
        moved = time.monotonic()
        while left and self.answers and time.monotonic() - moved < STALLED_S:
            self._uploads.flush(PROGRESS_S)
            before, left = left, self.waiting
            if left < before:
                moved = time.monotonic()
            if progress is not None:
                progress(max(total - left, 0), total)
        self._guard.tell()
        return left

    def close(self) -> None:
        """Wait a little for uploads, then let go of folder and remote; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(StoreError):  # a broken outbox keeps nothing else open
            if self._guard.answers:
                self._uploads.flush(CLOSE_S)
        self._stop()
        self._outbox.close()
        self.folder.close()
        self.remote.close()
        self._guard.tell()

    # What the folder tells, within its transactions.

    def stored(self, key: str) -> None:
        """Have a cache that was put uploaded."""
        if self._changes_remote():
            damaged = self._downloads.replaced(key)
            self._upload(Operation.REPLACE if damaged else Operation.WRITE, [key])

    def released(self, keys: Collection[str]) -> None:
        """Have objects deleted, and forget what is being downloaded under their keys."""
        self._downloads.forget(keys)
        if self._changes_remote():
            self._outbox.add(Operation.DELETE, keys)

    def pruned(self, keys: Collection[str]) -> None:
        """Have those objects deleted that this folder has put there."""
        self.released(self._outbox.own(keys))

    # Below: what the methods above are made of.

    def _upload(self, operation: Operation, keys: Iterable[str]) -> None:
        if self._outbox.add(operation, keys):
            self._guard.notice(
                "full",
                f"more than {self._outbox.most} caches wait to be uploaded to {self.remote.name}: "
                "the oldest are given up, and stay in the local folder",
            )

    def _wake(self) -> None:
        """Have done what waits; a remote that has failed is tried again there."""
        if self.remote.writable or not self._guard.answers:
            self._uploads.wake()

    def _changes_remote(self) -> bool:
        if not self.remote.writable:
            self._guard.notice(
                "readonly",
                f"{self.remote.name} can only be read: what is stored or deleted here changes the "
                "local folder alone",
            )
        return self.remote.writable

    def _may_have(self, key: str) -> bool:
        """Whether it makes sense to ask the remote for a key."""
        if not self._guard.answers:
            self._wake()
            return False
        if not self._downloads.may_come(key):
            return False
        try:
            return self._outbox.operation(key) is not Operation.DELETE
        except StoreError as error:
            self._guard.notice("outbox", f"{self.remote.name} is not asked: {error}")
            return False

    def _is_on_remote(self, key: str) -> bool:
        started, name = time.monotonic(), self.folder.shared_name(key)
        try:
            found = self._guard.call(lambda: self.remote.has(name))
        except RemoteError as error:
            self._guard.notice_refusal(error)
            self._wake()
            return False
        self._guard.speed.note(time.monotonic() - started, 0)
        return found

    def _downloaded(self, key: str, limit_s: float) -> ChunkKV | None:
        """What a download brings in time."""
        try:
            return self._downloads.wait(key, limit_s)
        except concurrent.futures.TimeoutError:
            if limit_s == self._timeout_s:
                self._guard.gave_up(limit_s)
                self._wake()
            return None

    def _stop(self) -> None:
        self._downloads.stop()
        self._uploads.stop()


_tiers: weakref.WeakSet[RemoteTier] = weakref.WeakSet()


def _renew_all() -> None:
    for tier in list(_tiers):
        tier._guard.renew()
        tier._downloads.renew()
        tier._uploads.renew()


def _stop_all() -> None:
    for tier in list(_tiers):
        tier._stop()


# A daemon thread that is inside torch while the interpreter goes away can abort the process.
atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
