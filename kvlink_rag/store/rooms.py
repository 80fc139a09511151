"""Memory that caches are decoded into, and the next ones again when nobody reads them any more.

Fresh pages are a good part of what loading costs: ten caches of 500 tokens took 55 and 64 ms into
fresh memory, 40 and 44 ms into memory that had been used before (SmolLM2-135M, `int8`, 2 threads).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch

LEAST = 1 << 20
"""Bytes below which memory is not kept: the allocator keeps small pieces itself."""
KEPT = 256 << 20
"""Bytes that are kept for later, at most."""
TOO_LARGE = 1.5
"""What is so many times as large as is asked for is left for others."""


class Rooms:
    """Pieces of memory, each for one tensor at a time. For any number of threads.

    Args:
        kept: bytes that are kept while nobody uses them, at most.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        # may be taken again by the thread that has it: a tensor may be collected at any time
        self._lock = threading.RLock()
        self._free: dict[int, Any] = {}  # by id

    @property
    def nbytes(self) -> int:
        """Bytes that nobody uses now."""
        with self._lock:
            return sum(room.nbytes for room in list(self._free.values()))

    def take(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes, ``[nbytes]`` uint8 on CPU.

        When the tensor and all its views are gone, its memory is for the next one.
        """
        if nbytes < LEAST:
            return torch.empty(nbytes, dtype=torch.uint8)
        room = self._found(nbytes)
        if room is None:
            room = np.empty(nbytes, np.uint8)  # by numpy, which asks for huge pages
        array = room[:nbytes]  # which the tensor's memory keeps, and nobody else
        weakref.finalize(array, self._give_back, room).atexit = False
        return torch.from_numpy(array)

    def _found(self, nbytes: int) -> Any:
        with self._lock:
            fits = [
                (room.nbytes, key)
                for key, room in list(self._free.items())
                if nbytes <= room.nbytes <= TOO_LARGE * nbytes
            ]
            return self._free.pop(min(fits)[1]) if fits else None

    def _give_back(self, room: Any) -> None:
        with self._lock:
            if self.nbytes + room.nbytes <= self.kept:
                self._free[id(room)] = room
