"""Memory that attention computes in."""

from __future__ import annotations

import math

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
