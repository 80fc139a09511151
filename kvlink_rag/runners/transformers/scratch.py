"""Memory that is computed in."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from functools import cache

import torch

KEPT = 32 << 20
"""Bytes of a tensor that are kept for the next forward pass."""


class Scratch:
    """Memory for one forward pass at a time, the same again for the next.

    What a thread allocates and frees stays in its own heap: with many threads their heaps would
    hold more than the chunk caches that they share.
    """

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on CPU; what had the name before is overwritten."""
        count = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.dtype != dtype or memory.numel() < count:
            memory = torch.empty(count, dtype=dtype)
            if memory.nbytes <= KEPT:
                self._memory[name] = memory
        return memory[:count].view(shape)


def give_back() -> None:
    """Give memory that was freed, in whichever thread, back to the system.

    GNU's allocator keeps what a thread has freed in that thread's heap, up to 64 MB of it: after
    sixteen threads had read a question each, over the same caches of 86 MB, it held 18 MB of
    nothing. It takes some microseconds, and up to 30 ms where 2 GB are in small pieces.
    """
    _way_back()()


@cache
def _way_back() -> Callable[[], object]:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return (lambda: trim(0)) if trim else lambda: None  # other allocators have their own ways
