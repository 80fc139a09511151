"""What is known of a remote: whether it answers, how fast, and what its user is yet to be told."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from kvlink_rag.errors import KVLinkWarning
from kvlink_rag.store.remote.base import Remote, RemoteError, RemoteRefused, needed

T = TypeVar("T")

FAILURES = 3
"""In a row, after which a remote is left alone for a time."""
WEIGHT = 0.3
"""Of the last measurement in a running estimate."""
FORGOTTEN_S = 60.0
"""Age at which a measurement says nothing any more: a remote that was slow is tried again."""


class Guard:
    """Calls of one remote, reads and writes alike, behind one circuit breaker.

    Warnings wait for :meth:`tell`: most are met by threads that nobody listens to.

    Args:
        remote: what is called.
        retry_s: how long it is left alone after it has failed.

    Raises:
        InputError: pybreaker is not installed.
    """

    def __init__(self, remote: Remote, retry_s: float) -> None:
        self.remote = remote
        self.retry_s = retry_s
        self.speed = Speed()
        self._notices: deque[str] = deque()
        self._noticed: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """Begin anew, as a forked process does, where any lock may be held for ever."""
        pybreaker = needed("pybreaker", self.remote.name)
        self._tripped: type[Exception] = pybreaker.CircuitBreakerError
        self._breaker: Any = pybreaker.CircuitBreaker(
            fail_max=FAILURES,
            reset_timeout=self.retry_s,
            exclude=[RemoteRefused],  # it answers
            throw_new_error_on_trip=False,
        )
        self._telling = threading.Lock()

    @property
    def answers(self) -> bool:
        """False after it has failed, until a trial call has not."""
        return bool(self._breaker.current_state == "closed")

    def call(self, act: Callable[[], T]) -> T:
        """``act()``, which asks the remote; counts how that ends. The trial call once it is due.

        Raises:
            RemoteError, RemoteRefused
        """
        try:
            with self._breaker.calling():
                found = self._acted(act)
        except self._tripped:
            raise RemoteError(f"{self.remote.name} has failed and is left alone for now") from None
        except RemoteError as error:
            if not self.answers:
                self._notice_failure(error)
            raise
        if self.answers:
            self._noticed.discard("fails")  # the next time is told again
        return found

    def _acted(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except RemoteError:
            raise
        except Exception as error:  # a Remote may be anybody's; its words may hold credentials
            name = self.remote.name
            raise RemoteError(f"cannot use {name}: {type(error).__name__}") from None

    def gave_up(self, seconds: float) -> None:
        """Count that it has not answered for so long."""

        def fail() -> None:
            raise RemoteError(f"{self.remote.name} has not answered within {seconds:g} s")

        if self.answers:
            with contextlib.suppress(RemoteError):  # counted and noticed
                self.call(fail)

    def _notice_failure(self, error: RemoteError) -> None:
        self.notice(
            "fails",
            f"{error}; what is not in the local folder is computed meanwhile, and it is tried again"
            f" every {self.retry_s:g} s",
        )

    def notice(self, kind: str, text: str) -> None:
        """Have something told once."""
        with self._telling:
            if kind not in self._noticed:
                self._noticed.add(kind)
                self._notices.append(text)

    def notice_refusal(self, error: RemoteError) -> None:
        """Have it told once when a remote that answers does not let itself be read."""
        if isinstance(error, RemoteRefused):
            self.notice("refuses", f"{error}; what it refuses is computed")

    def tell(self) -> None:
        """Warn the user of what happened; called in a thread of his."""
        while self._notices:
            with self._telling:
                text = self._notices.popleft() if self._notices else None
            if text is not None:
                warnings.warn(text, KVLinkWarning, stacklevel=4)


class Speed:
    """How long it takes to get an object, as measured lately."""

    def __init__(self) -> None:
        self._latency_s: float | None = None
        self._s_per_byte = 0.0
        self._nbytes = 0.0
        self._at = 0.0

    def note(self, seconds: float, nbytes: int) -> None:
        """An object of so many bytes took so long; 0 bytes: an answer without one."""
        if nbytes == 0:
            self._latency_s = _mixed(self._latency_s, seconds)
        else:
            per_byte = max(seconds - (self._latency_s or 0.0), 0.0) / nbytes
            known = self._nbytes > 0
            self._s_per_byte = _mixed(self._s_per_byte if known else None, per_byte)
            self._nbytes = _mixed(self._nbytes if known else None, nbytes)
        self._at = time.monotonic()

    def expected_s(self) -> float | None:
        """How long an object of the usual size takes; None when that is not known."""
        if not self._nbytes or time.monotonic() - self._at > FORGOTTEN_S:
            return None
        return (self._latency_s or 0.0) + self._s_per_byte * self._nbytes


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else (1 - WEIGHT) * before + WEIGHT * now
