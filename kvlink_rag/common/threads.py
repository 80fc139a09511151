"""Threads that wait for disks and networks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


class Threads:
    """Some threads, started when they are first needed, also in a process that was forked.

    Args:
        name: what debuggers show.
        count: how many.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._owner = 0

    def submit(self, act: Callable[[A], T], given: A) -> Future[T]:
        """Begin ``act(given)``."""
        with self._lock:
            if self._pool is None or self._owner != os.getpid():  # threads do not survive a fork
                self._pool = ThreadPoolExecutor(self._count, thread_name_prefix=self._name)
                self._owner = os.getpid()
            return self._pool.submit(act, given)

    def all(self, act: Callable[[A], T], given: Iterable[A]) -> list[T]:
        """``act`` of each, in order; a single one in the caller's own thread.

        Raises:
            the first error that one of them has raised.
        """
        each = list(given)
        if len(each) < 2:
            return [act(one) for one in each]
        return [future.result() for future in [self.submit(act, one) for one in each]]


def side_by_side(act: Callable[[A], T], given: Sequence[A]) -> list[T]:
    """``act`` of each, in order, each in a thread of its own that keeps no process from ending.

    Raises:
        the first error that one of them has raised, once all have ended.
    """
    futures: list[Future[T]] = [Future() for _ in given]

    def run(number: int) -> None:
        try:
            futures[number].set_result(act(given[number]))
        except BaseException as error:
            futures[number].set_exception(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(given))]
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError:  # too many threads, or the process is ending
            run(number)
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    return [future.result() for future in futures]
