"""Who computes with a model: one thread at a time, with all processors that are free.

torch's Linux builds compute with GCC's OpenMP, which keeps a team of threads for every thread that
has ever computed. As soon as all teams together are more than the processors, it lets their threads
sleep between any two operations: answers in another thread than the one that loaded the model took
twice as long (SmolLM2-135M, 2 processors). So whoever has computed lets go of its team, and of the
buffers that MKL keeps for every thread: some 1 MB each.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import TracebackType

import torch

from kvlink_rag.common.processors import free_for

PAUSE_HARD = 2
"""``omp_pause_hard`` of OpenMP 5.0: threads and all are let go of."""


class ModelLock:
    """A lock that a thread may take again while it has it.

    Whoever takes it computes with as many threads as there are free processors, and no more than
    torch was told before (:func:`free_for`). With one of two processors kept busy by another
    program, `reuse` over 5,000 tokens took 0.18 s idle, 0.40 to 0.85 s with two threads and 0.29 to
    0.42 s with one; that the threads sleep instead of spinning (OMP_WAIT_POLICY) cost 0.35 s on an
    idle machine.

    Let go of it, and the thread's OpenMP team is let go of as well; the next operation starts
    another, which did not show in 48 ms a token (2 processors).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._told: int | None = None  # threads, while there are fewer

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        if self._depth == 1:
            threads = torch.get_num_threads()
            if (free := free_for(threads)) < threads:
                self._told = threads
                torch.set_num_threads(free)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            let_go()
            if self._told is not None:
                torch.set_num_threads(self._told)
                self._told = None
        self._lock.release()


_locks: weakref.WeakKeyDictionary[torch.nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(model: torch.nn.Module) -> ModelLock:
    """The lock of a model, the same for all engines over it.

    A forward pass sets the attention and the masks of the model's own object, so two engines that
    were made of one model must not run it at once.
    """
    with _finding:
        return _locks.setdefault(model, ModelLock())


def let_go() -> None:
    """Let go of the calling thread's buffers and team."""
    for way in _ways():
        way()


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch computes with, where it is GCC's and comes with torch."""
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        return ctypes.CDLL(str(path))  # loaded already: this is only another name for it
    return None


@cache
def _ways() -> list[Callable[[], object]]:
    """What there is to call; nothing where torch brings no such library, or another one."""
    found: list[Callable[[], object]] = []
    for path in Path(torch.__file__).parent.glob("lib/libtorch_cpu*.so"):
        library = ctypes.CDLL(str(path))  # loaded already, too
        if hasattr(library, "mkl_serv_thread_free_buffers"):
            found.append(library.mkl_serv_thread_free_buffers)
    if pause := getattr(openmp(), "omp_pause_resource_all", None):
        found.append(partial(pause, PAUSE_HARD))
    return found
