"""What :mod:`kvlink_rag.runners.transformers.placement` compiles; importing it needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kvlink_rag.runners.transformers import part
from kvlink_rag.runners.transformers.kernel import (
    MATH,
    narrow,
    num_threads,
    pointer,
    read,
    read_params,
    row_size,
    thread_num,
    turn,
)

(
    LAYER, PIECES, KV_HEADS, KEY_DIM, VALUE_DIM, PAIRS, HALF_OUT, VALUE_GROUPS, KEYS_OUT,
    VALUES_OUT, POSITIONS, MEMORY, OF_PIECES,
) = range(13)  # fmt: skip
FIELDS = OF_PIECES + part.FIELDS
"""What the kernel is told, by its place: numbers, and addresses of arrays.

Out come keys ``[kv_heads, positions, key_dim]`` and values alike, as bfloat16 or float32; memory is
for :func:`memory_of` numbers a thread. From ``OF_PIECES`` on it is what is told of pieces of spans
(:mod:`kvlink_rag.runners.transformers.part`), ``[pieces]`` int64 each.
"""


def memory_of(key_dim: int, value_dim: int) -> int:
    """Numbers (4 bytes) that a thread needs: a row, and the scales and offsets of one."""
    return 3 * max(key_dim, value_dim)


@njit(fastmath=MATH)
def _write(row_at: int, dim: int, half: bool, address: int) -> None:
    if half:
        narrow(row_at, dim, address)
    else:
        row = carray(pointer(row_at), (dim,), np.float32)
        out = carray(pointer(address), (dim,), np.float32)
        for i in range(dim):
            out[i] = row[i]


@njit
def _place_keys(told: Any, piece: int, head: int, memory: int) -> None:
    pieces, dim, pairs, half = told[PIECES], told[KEY_DIM], told[PAIRS], told[HALF_OUT] != 0

    def of(field: int) -> Any:
        return carray(pointer(told[OF_PIECES + field]), (pieces,), np.int64)[piece]

    kind, layer, step = of(part.KIND), told[LAYER], of(part.TURN_STEP)
    scales, offsets = memory + 4 * dim, memory + 8 * dim
    if kind == part.CODES:
        at = of(part.KEY_PARAMS) + (layer * told[KV_HEADS] + head) * of(part.KEY_PARAM_HEADS)
        read_params(at, dim, 1, scales)
        read_params(at + of(part.KEY_OFFSETS), dim, 1, offsets)
    size = row_size(kind, dim)
    out_size = dim * (2 if half else 4)
    at = of(part.KEYS) + layer * of(part.KEY_LAYERS) + head * of(part.KEY_HEADS)
    out = told[KEYS_OUT] + (head * told[POSITIONS] + of(part.START)) * out_size
    cosines, sines = of(part.COSINES), of(part.SINES)
    for t in range(of(part.TOKENS)):
        read(at + t * size, kind, dim, memory, scales, offsets)
        if pairs:
            turn(memory, pairs, cosines + t * step, sines + t * step)
        _write(memory, dim, half, out + t * out_size)


@njit
def _place_values(told: Any, piece: int, head: int, memory: int) -> None:
    pieces, dim, half = told[PIECES], told[VALUE_DIM], told[HALF_OUT] != 0

    def of(field: int) -> Any:
        return carray(pointer(told[OF_PIECES + field]), (pieces,), np.int64)[piece]

    kind, layer, groups = of(part.KIND), told[LAYER], told[VALUE_GROUPS]
    scales, offsets = memory + 4 * dim, memory + 8 * dim
    size = row_size(kind, dim)
    out_size = dim * (2 if half else 4)
    at = of(part.VALUES) + layer * of(part.VALUE_LAYERS) + head * of(part.VALUE_HEADS)
    out = told[VALUES_OUT] + (head * told[POSITIONS] + of(part.START)) * out_size
    params = of(part.VALUE_PARAMS) + (layer * told[KV_HEADS] + head) * of(part.VALUE_PARAM_HEADS)
    for t in range(of(part.TOKENS)):
        if kind == part.CODES:
            read_params(params + 2 * t * groups, groups, dim // groups, scales)
            read_params(
                params + 2 * t * groups + of(part.VALUE_OFFSETS), groups, dim // groups, offsets
            )
        read(at + t * size, kind, dim, memory, scales, offsets)
        _write(memory, dim, half, out + t * out_size)


def place(address: Any) -> None:
    """All pieces, each thread of a team its own; ``address`` is that of what the kernel is told."""
    told = carray(address, (FIELDS,), np.int64)
    kv_heads = told[KV_HEADS]
    memory = told[MEMORY] + 4 * thread_num() * 3 * max(told[KEY_DIM], told[VALUE_DIM])
    for task in range(thread_num(), told[PIECES] * kv_heads, num_threads()):
        _place_keys(told, task // kv_heads, task % kv_heads, memory)
        _place_values(told, task // kv_heads, task % kv_heads, memory)
