"""Downloads from a remote into the folder in front of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import StoreError
from kvlink_rag.store.folder.store import FolderStore
from kvlink_rag.store.record import CorruptRecord
from kvlink_rag.store.remote.base import RemoteError
from kvlink_rag.store.remote.guard import Guard

DOWNLOADS = 32
"""At a time; what is asked for beyond is computed."""


class Downloads:
    """Fetches objects, each in a thread of its own and once for all who ask for it meanwhile.

    What comes is verified and kept by the folder, also when nobody waits for it any more.

    Args:
        folder: takes in what is downloaded.
        guard: the remote.
        failed: called, in any thread, after the remote could not be read.
    """

    def __init__(self, folder: FolderStore, guard: Guard, failed: Callable[[], None]) -> None:
        self._folder, self._guard, self._failed = folder, guard, failed
        self._stopped = False
        self._damaged: set[str] = set()  # keys whose object is to be replaced
        self.renew()

    def renew(self) -> None:
        """Start without downloads, as a forked process does, where any lock may be held."""
        self._changed = threading.Condition()
        # by key, until they are done. Whoever takes one out keeps it from being stored
        self._running: dict[str, Future[ChunkKV | None]] = {}
        self._storing = 0

    def may_come(self, key: str) -> bool:
        """False for an object that is known to be damaged, and after :meth:`stop`."""
        return not self._stopped and key not in self._damaged

    def wait(self, key: str, limit_s: float) -> ChunkKV | None:
        """What a download brings in time; None when there is nothing, or too much to do already.

        Raises:
            concurrent.futures.TimeoutError: it takes longer, and goes on.
        """
        with self._changed:
            if (download := self._running.get(key)) is None:
                if self._stopped or len(self._running) >= DOWNLOADS:
                    return None
                download = self._running[key] = Future()
                thread = threading.Thread(
                    target=self._download, args=(key, download), name="kvlink-get", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # too many threads, or the process is ending
                    del self._running[key]
                    return None
        return download.result(limit_s)

    def forget(self, keys: Iterable[str]) -> None:
        """Keep out of the folder what is being downloaded under these keys."""
        with self._changed:
            for key in keys:
                self._running.pop(key, None)

    def replaced(self, key: str) -> bool:
        """Note that the object is going to be replaced; whether it was damaged."""
        with self._changed:
            damaged = key in self._damaged
            self._damaged.discard(key)
        return damaged

    def stop(self) -> None:
        """Keep out of the folder what has not come yet; returns when nothing is being stored."""
        with self._changed:
            self._stopped = True
            self._running.clear()
            self._changed.wait_for(lambda: self._storing == 0)

    # Below: what the threads do.

    def _download(self, key: str, download: Future[ChunkKV | None]) -> None:
        record = None
        try:
            data = self._read(key)
            if data is not None:
                record = self._stored_here(key, data, download)
        finally:
            with self._changed:
                if self._running.get(key) is download:
                    del self._running[key]
            download.set_result(record)

    def _read(self, key: str) -> bytes | None:
        started, name = time.monotonic(), self._folder.shared_name(key)
        try:
            data = self._guard.call(lambda: self._guard.remote.read(name))
        except RemoteError as error:
            self._guard.notice_refusal(error)
            self._failed()
            return None
        self._guard.speed.note(time.monotonic() - started, len(data or b""))
        return data

    def _stored_here(
        self, key: str, data: bytes, download: Future[ChunkKV | None]
    ) -> ChunkKV | None:
        """A downloaded file as a cache of the folder; None where it is damaged or not wanted."""
        with self._changed:
            if self._stopped:  # the process may be ending, and torch with it
                return None
            self._storing += 1
        try:
            return self._folder.adopt(key, data, lambda: self._running.get(key) is download)
        except CorruptRecord as reason:
            with self._changed:
                self._damaged.add(key)
            self._guard.notice(
                "damaged",
                f"{self._guard.remote.name} holds damaged objects, such as {key[:12]}... "
                f"({reason}); they are computed anew and replaced",
            )
        except StoreError as error:
            self._guard.notice("folder", f"downloaded caches are not kept: {error}")
        finally:
            with self._changed:
                self._storing -= 1
                self._changed.notify_all()
        return None
