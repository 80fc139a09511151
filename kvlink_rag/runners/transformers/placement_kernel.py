"""What :mod:`kvlink_rag.runners.transformers.placement` compiles; importing it needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kvlink_rag.runners.transformers.kernel import (
    MATH,
    narrow,
    num_threads,
    of_bits,
    pointer,
    thread_num,
    widen,
)

(
    LAYER, PIECES, KV_HEADS, KEY_DIM, VALUE_DIM, PAIRS, HALF_OUT, VALUE_GROUPS, KEYS_OUT,
    VALUES_OUT, POSITIONS, MEMORY, KIND, TOKENS, START, KEYS, VALUES, KEY_HEADS, VALUE_HEADS,
    KEY_LAYERS, VALUE_LAYERS, COSINES, SINES, TURN_STEP, KEY_PARAMS, VALUE_PARAMS, KEY_PARAM_HEADS,
    VALUE_PARAM_HEADS, KEY_OFFSETS, VALUE_OFFSETS, FIELDS,
) = range(31)  # fmt: skip
"""What the kernel is told, by its place: numbers, and addresses of arrays.

Out come keys ``[kv_heads, positions, key_dim]`` and values alike, as bfloat16 or float32; memory is
for :func:`memory_of` numbers a thread. Of each piece of a span (``[pieces]`` int64): of which kind
its numbers are, how many tokens it has, and the position of the first; addresses of its keys and
values of the first layer's first head, and the bytes from one head and one layer to the next;
addresses of the cosines and sines (float32, ``[pairs]``) that its first token's keys are turned by,
and the bytes from one token's to the next one's, 0 where it is the same for all. Of codes besides:
addresses of scales (float16; one for each channel of the piece's keys, and for each of
``VALUE_GROUPS`` groups of channels of each token's value) and the bytes from one head's to the next
one's; and how many bytes further the offsets are.
"""
FLOAT, HALF, CODES = range(3)
"""Kinds of numbers: float32, bfloat16, and a byte that is multiplied by a scale and added to."""


def memory_of(key_dim: int, value_dim: int) -> int:
    """Numbers (4 bytes) that a thread needs: a row, and the scales and offsets of one."""
    return 3 * max(key_dim, value_dim)


@njit(fastmath=MATH)
def _of_float16(bits: Any) -> Any:
    """A finite float16, given as its bits, as float32."""
    size = of_bits(np.int32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13)))
    size *= np.float32(2.0**112)  # the exponents' biases differ by as much
    return -size if bits & np.uint16(0x8000) else size


@njit(fastmath=MATH)
def _read(address: int, kind: int, dim: int, row_at: int, scales_at: int, offsets_at: int) -> None:
    """A row of numbers as float32; ``scales`` and ``offsets`` of codes, a number each."""
    row = carray(pointer(row_at), (dim,), np.float32)
    if kind == HALF:
        widen(address, dim, row_at)
    elif kind == FLOAT:
        exact = carray(pointer(address), (dim,), np.float32)
        for i in range(dim):
            row[i] = exact[i]
    else:
        codes = carray(pointer(address), (dim,), np.uint8)
        scales = carray(pointer(scales_at), (dim,), np.float32)
        offsets = carray(pointer(offsets_at), (dim,), np.float32)
        for i in range(dim):
            row[i] = np.float32(codes[i]) * scales[i] + offsets[i]


@njit(fastmath=MATH)
def _turn(row_at: int, pairs: int, cosines_at: int, sines_at: int) -> None:
    first = carray(pointer(row_at), (pairs,), np.float32)
    second = carray(pointer(row_at + 4 * pairs), (pairs,), np.float32)
    cosines = carray(pointer(cosines_at), (pairs,), np.float32)
    sines = carray(pointer(sines_at), (pairs,), np.float32)
    for i in range(pairs):
        a, b = first[i], second[i]
        first[i] = a * cosines[i] - b * sines[i]
        second[i] = b * cosines[i] + a * sines[i]


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
def _params(address: int, count: int, width: int, at: int) -> None:
    """``count`` float16 as float32, each ``width`` times."""
    kept = carray(pointer(address), (count,), np.uint16)
    row = carray(pointer(at), (count * width,), np.float32)
    for n in range(count):
        number = _of_float16(kept[n])
        for i in range(width):
            row[n * width + i] = number


@njit
def _place_keys(told: Any, piece: int, head: int, memory: int) -> None:
    pieces, dim, pairs, half = told[PIECES], told[KEY_DIM], told[PAIRS], told[HALF_OUT] != 0

    def of(field: int) -> Any:
        return carray(pointer(told[field]), (pieces,), np.int64)[piece]

    kind, layer, step = of(KIND), told[LAYER], of(TURN_STEP)
    scales, offsets = memory + 4 * dim, memory + 8 * dim
    if kind == CODES:
        at = of(KEY_PARAMS) + (layer * told[KV_HEADS] + head) * of(KEY_PARAM_HEADS)
        _params(at, dim, 1, scales)
        _params(at + of(KEY_OFFSETS), dim, 1, offsets)
    size = dim * (4 if kind == FLOAT else 2 if kind == HALF else 1)
    out_size = dim * (2 if half else 4)
    at = of(KEYS) + layer * of(KEY_LAYERS) + head * of(KEY_HEADS)
    out = told[KEYS_OUT] + (head * told[POSITIONS] + of(START)) * out_size
    cosines, sines = of(COSINES), of(SINES)
    for t in range(of(TOKENS)):
        _read(at + t * size, kind, dim, memory, scales, offsets)
        if pairs:
            _turn(memory, pairs, cosines + t * step, sines + t * step)
        _write(memory, dim, half, out + t * out_size)


@njit
def _place_values(told: Any, piece: int, head: int, memory: int) -> None:
    pieces, dim, half = told[PIECES], told[VALUE_DIM], told[HALF_OUT] != 0

    def of(field: int) -> Any:
        return carray(pointer(told[field]), (pieces,), np.int64)[piece]

    kind, layer, groups = of(KIND), told[LAYER], told[VALUE_GROUPS]
    scales, offsets = memory + 4 * dim, memory + 8 * dim
    size = dim * (4 if kind == FLOAT else 2 if kind == HALF else 1)
    out_size = dim * (2 if half else 4)
    at = of(VALUES) + layer * of(VALUE_LAYERS) + head * of(VALUE_HEADS)
    out = told[VALUES_OUT] + (head * told[POSITIONS] + of(START)) * out_size
    params = of(VALUE_PARAMS) + (layer * told[KV_HEADS] + head) * of(VALUE_PARAM_HEADS)
    for t in range(of(TOKENS)):
        if kind == CODES:
            _params(params + 2 * t * groups, groups, dim // groups, scales)
            _params(params + 2 * t * groups + of(VALUE_OFFSETS), groups, dim // groups, offsets)
        _read(at + t * size, kind, dim, memory, scales, offsets)
        _write(memory, dim, half, out + t * out_size)


def place(address: Any) -> None:
    """All pieces, each thread of a team its own; ``address`` is that of what the kernel is told."""
    told = carray(address, (FIELDS,), np.int64)
    kv_heads = told[KV_HEADS]
    memory = told[MEMORY] + 4 * thread_num() * 3 * max(told[KEY_DIM], told[VALUE_DIM])
    for task in range(thread_num(), told[PIECES] * kv_heads, num_threads()):
        _place_keys(told, task // kv_heads, task % kv_heads, memory)
        _place_values(told, task // kv_heads, task % kv_heads, memory)
