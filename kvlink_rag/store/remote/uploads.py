"""A thread that does what waits in an outbox."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from filelock import FileLock, Timeout

from kvlink_rag.common.threads import side_by_side
from kvlink_rag.errors import StoreError
from kvlink_rag.store.folder.outbox import Operation, Outbox, Task
from kvlink_rag.store.folder.store import FolderStore
from kvlink_rag.store.remote.base import RemoteError, RemoteRefused, needed
from kvlink_rag.store.remote.guard import Guard

ATTEMPTS = 3
"""Of one task, before another has its turn."""
FIRST_WAIT_S = 0.1
"""Before a task is tried again, at most; twice as long each time."""
IDLE_S = 1.0
"""Time after which the thread ends when there is nothing to do."""
POLL_S = 0.2
"""Between two looks at what another process does."""
REFUSED_S = 60.0
"""Before a remote that refuses to be written to is tried again."""
STOP_S = 2.0
"""How long a task that is being done is waited for in the end."""
AT_ONCE = 8
"""Tasks that are done side by side: a distant server takes its time for each, however small."""
PROBE = "0" * 64
"""A key that nothing has: asking for it tells whether a remote answers."""


class Uploader:
    """Writes to a remote and deletes from it, some tasks at a time, in the background.

    One process at a time does it for a folder; which, a lock file decides.

    Args:
        folder: whose files are uploaded.
        outbox: what is to be done.
        guard: the remote.

    Raises:
        InputError: tenacity is not installed.
    """

    def __init__(self, folder: FolderStore, outbox: Outbox, guard: Guard) -> None:
        self._folder, self._outbox, self._guard = folder, outbox, guard
        self._stopped = threading.Event()
        self.renew()

    def renew(self) -> None:
        """Start without a thread, as a forked process does, where any lock may be held for ever."""
        tenacity = needed("tenacity", self._guard.remote.name)
        self._lock = FileLock(self._folder.path / "outbox.lock", mode=0o600)
        self._changed = threading.Condition()
        self._woken = False
        stopped, self._stopped = self._stopped.is_set(), threading.Event()
        if stopped:
            self._stopped.set()
        self._thread: threading.Thread | None = None
        self._retrying: Any = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S),
            retry=tenacity.retry_if_exception(self._is_worth_another),
            sleep=self._stopped.wait,
            reraise=True,
        )

    def wake(self) -> None:
        """There may be something to do."""
        with self._changed:
            if self._stopped.is_set():
                return
            self._woken = True
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="kvlink-upload", daemon=True)
                with contextlib.suppress(RuntimeError):  # the process is ending: the outbox lasts
                    thread.start()
                    self._thread = thread
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do, whichever process does it; False when time is up."""
        deadline = time.monotonic() + timeout_s
        while len(self._outbox):
            left = deadline - time.monotonic()
            if left <= 0 or self._stopped.is_set():
                return False
            self.wake()
            with self._changed:
                self._changed.wait(min(left, POLL_S))
        return True

    def stop(self) -> None:
        """End the thread; what is being done may be done again by the next process."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(STOP_S)  # a server that hangs is not waited for

    # Below: what the thread does.

    def _work(self) -> None:
        try:
            while not self._stopped.is_set() and self._step():
                pass
        except StoreError as error:  # the folder is gone or full; the next put tries again
            if not self._stopped.is_set():
                self._guard.notice("outbox", f"uploads have stopped: {error}")
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None
                self._changed.notify_all()

    def _step(self) -> bool:
        """Do what is next; False when there has been nothing to do for a while."""
        if not self._guard.answers:
            self._try_whether_it_answers()
            return True
        with self._changed:
            self._woken = False  # before looking: what comes now is seen, or wakes
        if not len(self._outbox):
            return self._idle()
        try:
            with self._lock.acquire(timeout=0):
                tasks = self._outbox.next(AT_ONCE)  # not what another process has done meanwhile
                pause_s = max(side_by_side(self._do, tasks), default=0.0)
        except Timeout:  # another process is at it
            pause_s = POLL_S
        with self._changed:
            self._changed.notify_all()
        self._stopped.wait(pause_s)
        return True

    def _idle(self) -> bool:
        with self._changed:
            if self._changed.wait_for(lambda: self._woken or self._stopped.is_set(), IDLE_S):
                return True
            self._thread = None  # and whoever wakes starts another
            return False

    def _try_whether_it_answers(self) -> None:
        """The trial call that ends a failure, so that nobody's answer waits for it."""
        if not self._stopped.wait(self._guard.retry_s):
            with contextlib.suppress(RemoteError):
                self._guard.call(lambda: self._guard.remote.has(PROBE))

    def _do(self, task: Task) -> float:
        """Do a task; returns how long to pause before the next."""
        try:
            if self._retrying(self._attempt, task):
                self._outbox.done(task)
            else:
                self._outbox.drop(task)
        except RemoteRefused as error:
            self._guard.notice("refuses", f"{error}; tried again every {REFUSED_S:g} s")
            self._outbox.postpone(task)  # another may be taken
            return REFUSED_S
        except RemoteError:  # the guard tells
            self._outbox.postpone(task)
        return 0.0

    def _attempt(self, task: Task) -> bool:
        """Do a task once; False when there is nothing to upload any more."""
        name = self._folder.shared_name(task.key)
        remote, call = self._guard.remote, self._guard.call
        if task.operation is Operation.DELETE:
            call(lambda: remote.delete(name))
            return True
        if task.operation is Operation.WRITE and call(lambda: remote.has(name)):
            return True  # a key stands for its contents
        data = self._folder.file_bytes(task.key)
        if data is None:
            return False
        call(lambda: remote.write(name, data))
        return True

    def _is_worth_another(self, error: BaseException) -> bool:
        passing = isinstance(error, RemoteError) and not isinstance(error, RemoteRefused)
        return passing and self._guard.answers and not self._stopped.is_set()
