"""Attention of one new token over chunk caches, compiled: each key and value is read once.

As matrix products it is many small ones, each waiting for all threads, and caches in half precision
have to be converted first. Here threads take pieces of spans, convert as they read, and what the
pieces found is put together at the end: the softmax of a whole from those of its parts
(FlashDecoding). Compiled by numba, which keeps the machine code for later processes, and run by the
OpenMP team that torch computes with: another one would fight with it for the processors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

PIECE = 256
"""Tokens of one key head that a thread takes at once."""

(
    LAYER, PIECES, KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, QUERIES, WHICH_QUERY, KEYS, VALUES,
    KEY_STRIDES, VALUE_STRIDES, HALF, LENGTHS, BIASES, KEY_LAYERS, VALUE_LAYERS, MEMORY, MOST, SUMS,
    MIXED, OUT, FIELDS,
) = range(23)  # fmt: skip
"""What the kernel is told, by its place: numbers, and addresses of arrays.

Of each piece (``[pieces]`` int64): which query it meets; addresses of its keys and values of the
first layer's first head, and the bytes from one head to the next; whether they are bfloat16, not
float32; how many tokens it has; the address of what is added to their scores, float32, or 0; the
bytes from one layer to the next. Queries are ``[.., kv_heads, group, key_dim]`` float32. Of each
task, a piece of one head: memory for :func:`memory_of` numbers, and what was found: the highest
score and the sum of the weights of each query, and the values mixed by them. Out comes ``[kv_heads,
group, value_dim]`` float32.
"""
MATH = {"reassoc", "contract", "nsz", "arcp"}  # not all: the score of a hidden token is -inf


def memory_of(group: int, key_dim: int, value_dim: int) -> int:
    """Numbers (4 bytes) that a task needs: scores of all queries, and a row in float32."""
    return group * PIECE + max(key_dim, value_dim)


def _to_pointer(context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _widened(context: Any, half: Any) -> Any:
    """A bfloat16, given as its bits, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


def _bits_of(context: Any, number: Any) -> Any:
    """The bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _of_bits(context: Any, number: Any) -> Any:
    """The float32 of bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


pointer: Any = intrinsic(_to_pointer)
wide: Any = intrinsic(_widened)
bits: Any = intrinsic(_bits_of)
of_bits: Any = intrinsic(_of_bits)
thread_num: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())


@njit(fastmath=MATH)
def nearest_half(number: Any) -> Any:
    """The bits of the nearest bfloat16, and of the even one between two."""
    b = bits(number)
    return (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(fastmath=MATH)
def widen(halves_at: int, length: int, row_at: int) -> None:
    """Numbers from bfloat16 to float32."""
    halves = carray(pointer(halves_at), (length,), np.uint16)
    row = carray(pointer(row_at), (length,), np.float32)
    for i in range(length):
        row[i] = wide(halves[i])


@njit(fastmath=MATH)
def narrow(row_at: int, length: int, halves_at: int) -> None:
    """Numbers from float32 to the nearest bfloat16."""
    row = carray(pointer(row_at), (length,), np.float32)
    halves = carray(pointer(halves_at), (length,), np.uint16)
    for i in range(length):
        halves[i] = nearest_half(row[i])


@njit(fastmath=MATH)
def _read(address: int, half: bool, dim: int, row: Any, bits: Any) -> None:
    """A key or value to ``row`` in float32; ``bits`` are the same memory."""
    if half:
        numbers = carray(pointer(address), (dim,), np.uint16)
        for i in range(dim):
            bits[i] = np.uint32(numbers[i]) << np.uint32(16)
    else:
        exact = carray(pointer(address), (dim,), np.float32)
        for i in range(dim):
            row[i] = exact[i]


@njit(fastmath=MATH)
def _softmax(scores: Any, length: int, most: Any, sums: Any) -> None:
    """Scores ``[group, PIECE]`` to weights that are still to be divided by their sums."""
    for g in range(len(most)):
        highest = np.float32(-np.inf)
        for t in range(length):
            highest = max(highest, scores[g, t])
        total = np.float32(0)
        for t in range(length):
            weight = np.float32(0)
            if scores[g, t] != -np.inf:
                weight = np.exp(scores[g, t] - highest)
            scores[g, t] = weight
            total += weight
        most[g], sums[g] = highest, total


@njit(fastmath=MATH)
def mix_piece(told: Any, layer: int, task: int) -> None:
    """One piece of one key head in a layer, met by the query heads of its group."""
    pieces, kv_heads, group = told[PIECES], told[KV_HEADS], told[GROUP]
    key_dim, value_dim = told[KEY_DIM], told[VALUE_DIM]
    piece, head = task // kv_heads, task % kv_heads

    def of(field: int) -> Any:
        return carray(pointer(told[field]), (pieces,), np.int64)[piece]

    half, length = of(HALF) != 0, of(LENGTHS)
    room = max(key_dim, value_dim)
    memory = told[MEMORY] + 4 * task * (group * PIECE + room)
    scores = carray(pointer(memory), (group, PIECE), np.float32)
    row = carray(pointer(memory + 4 * group * PIECE), (room,), np.float32)
    bits = carray(pointer(memory + 4 * group * PIECE), (room,), np.uint32)
    query = (of(WHICH_QUERY) * kv_heads + head) * group * key_dim
    queries = carray(pointer(told[QUERIES] + 4 * query), (group, key_dim), np.float32)
    size = 2 if half else 4
    at = of(KEYS) + layer * of(KEY_LAYERS) + head * of(KEY_STRIDES)
    for t in range(length):
        _read(at + t * key_dim * size, half, key_dim, row, bits)
        for g in range(group):
            score = np.float32(0)
            for i in range(key_dim):
                score += queries[g, i] * row[i]
            scores[g, t] = score
    if of(BIASES) != 0:
        bias = carray(pointer(of(BIASES)), (length,), np.float32)
        for g in range(group):
            for t in range(length):
                scores[g, t] += bias[t]
    most = carray(pointer(told[MOST] + 4 * task * group), (group,), np.float32)
    sums = carray(pointer(told[SUMS] + 4 * task * group), (group,), np.float32)
    _softmax(scores, length, most, sums)
    mixed = carray(
        pointer(told[MIXED] + 4 * task * group * value_dim), (group, value_dim), np.float32
    )
    mixed[:] = np.float32(0)
    at = of(VALUES) + layer * of(VALUE_LAYERS) + head * of(VALUE_STRIDES)
    for t in range(length):
        _read(at + t * value_dim * size, half, value_dim, row, bits)
        for g in range(group):
            weight = scores[g, t]
            for i in range(value_dim):
                mixed[g, i] += weight * row[i]


def attend(address: Any) -> None:
    """All tasks, every thread of a team its own; ``address`` is that of what the kernel is told."""
    told = carray(address, (FIELDS,), np.int64)
    for task in range(thread_num(), told[PIECES] * told[KV_HEADS], num_threads()):
        mix_piece(told, told[LAYER], task)


@njit(fastmath=MATH)
def combine_row(told: Any, row: int) -> None:
    """What the pieces found for one query head, put together."""
    pieces, rows, dim = told[PIECES], told[KV_HEADS] * told[GROUP], told[VALUE_DIM]
    most = carray(pointer(told[MOST]), (pieces, rows), np.float32)
    sums = carray(pointer(told[SUMS]), (pieces, rows), np.float32)
    mixed = carray(pointer(told[MIXED]), (pieces, rows, dim), np.float32)
    out = carray(pointer(told[OUT]), (rows, dim), np.float32)
    highest = np.float32(-np.inf)
    for piece in range(pieces):
        highest = max(highest, most[piece, row])
    out[row, :] = np.float32(0)
    total = np.float32(0)
    for piece in range(pieces):
        if most[piece, row] != -np.inf:
            factor = np.exp(most[piece, row] - highest)
            total += factor * sums[piece, row]
            for i in range(dim):
                out[row, i] += factor * mixed[piece, row, i]
    for i in range(dim):
        out[row, i] /= total


def combine(address: Any) -> None:
    """What the pieces found, put together; by one thread."""
    told = carray(address, (FIELDS,), np.int64)
    for row in range(told[KV_HEADS] * told[GROUP]):
        combine_row(told, row)


_KEPT: list[Any] = []


def compiled(function: Any) -> int:
    """The address of a function's machine code, made now or by an earlier process."""
    signature = types.void(types.voidptr)
    try:
        made: Any = cfunc(signature, fastmath=MATH, cache=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        made = cfunc(signature, fastmath=MATH)(function)
    _KEPT.append(made)  # the code lives as long as it does
    return int(made.address)
