"""Attention of one new token over chunk caches, compiled: each key and value is read once.

As matrix products it is many small ones, each waiting for all threads, and caches in half precision
have to be converted first. Here threads take pieces of spans, convert as they read, and what the
pieces found is put together at the end: the softmax of a whole from those of its parts
(FlashDecoding). Compiled by numba, which keeps the machine code for later processes, and run by the
OpenMP team that torch computes with: another one would fight with it for the processors.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kvlink_rag.runners.transformers import part

(
    LAYER, PIECES, KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, PAIRS, VALUE_GROUPS, QUERIES, WHICH_QUERY,
    BIASES, MEMORY, MOST, SUMS, MIXED, OUT, OF_PIECES,
) = range(17)  # fmt: skip
FIELDS = OF_PIECES + part.FIELDS
"""What the kernel is told, by its place: numbers, and addresses of arrays.

Of each piece (``[pieces]`` int64): which query it meets; the address of what is added to its
scores, float32, or 0; and from ``OF_PIECES`` on what is told of pieces
(:mod:`kvlink_rag.runners.transformers.part`), whose keys are turned where there are cosines.
Queries are ``[.., kv_heads, group, key_dim]`` float32. Of each task, a piece of one head: memory
for :func:`memory_of` numbers, and what was found: the highest score and the sum of the weights of
each query, and the values mixed by them. Out comes ``[kv_heads, group, value_dim]`` float32.
"""
MATH = {"reassoc", "contract", "nsz", "arcp"}  # not all: the score of a hidden token is -inf


def memory_of(group: int, key_dim: int, value_dim: int) -> int:
    """Numbers (4 bytes) that a task needs: scores of all queries, and a row in float32 with its
    scales and offsets."""
    return group * part.PIECE + 3 * max(key_dim, value_dim)


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
def _of_float16(bits: Any) -> Any:
    """A finite float16, given as its bits, as float32."""
    size = of_bits(np.int32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13)))
    size *= np.float32(2.0**112)  # the exponents' biases differ by as much
    return -size if bits & np.uint16(0x8000) else size


@njit(fastmath=MATH)
def read(address: int, kind: int, dim: int, row_at: int, scales_at: int, offsets_at: int) -> None:
    """A row of numbers as float32; ``scales`` and ``offsets`` of codes, a number each."""
    row = carray(pointer(row_at), (dim,), np.float32)
    if kind == part.HALF:
        widen(address, dim, row_at)
    elif kind == part.FLOAT:
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
def turn(row_at: int, pairs: int, cosines_at: int, sines_at: int) -> None:
    first = carray(pointer(row_at), (pairs,), np.float32)
    second = carray(pointer(row_at + 4 * pairs), (pairs,), np.float32)
    cosines = carray(pointer(cosines_at), (pairs,), np.float32)
    sines = carray(pointer(sines_at), (pairs,), np.float32)
    for i in range(pairs):
        a, b = first[i], second[i]
        first[i] = a * cosines[i] - b * sines[i]
        second[i] = b * cosines[i] + a * sines[i]


@njit(fastmath=MATH)
def read_turned(
    address: int, dim: int, row_at: int, scales_at: int, offsets_at: int, pairs: int,
    cosines_at: int, sines_at: int,
) -> None:  # fmt: skip
    """A key from its codes, turned: :func:`read` and :func:`turn` at once."""
    codes = carray(pointer(address), (dim,), np.uint8)
    row = carray(pointer(row_at), (dim,), np.float32)
    scales = carray(pointer(scales_at), (dim,), np.float32)
    offsets = carray(pointer(offsets_at), (dim,), np.float32)
    cosines = carray(pointer(cosines_at), (pairs,), np.float32)
    sines = carray(pointer(sines_at), (pairs,), np.float32)
    for i in range(pairs):
        a = np.float32(codes[i]) * scales[i] + offsets[i]
        b = np.float32(codes[pairs + i]) * scales[pairs + i] + offsets[pairs + i]
        row[i] = a * cosines[i] - b * sines[i]
        row[pairs + i] = b * cosines[i] + a * sines[i]
    for i in range(2 * pairs, dim):
        row[i] = np.float32(codes[i]) * scales[i] + offsets[i]


@njit(fastmath=MATH)
def _add_codes(address: int, dim: int, scale: Any, offset: Any, mixed_at: int) -> None:
    codes = carray(pointer(address), (dim,), np.uint8)
    mixed = carray(pointer(mixed_at), (dim,), np.float32)
    for i in range(dim):
        mixed[i] += np.float32(codes[i]) * scale + offset


@njit
def read_params(address: int, count: int, width: int, at: int) -> None:
    """``count`` float16 as float32, each ``width`` times."""
    kept = carray(pointer(address), (count,), np.uint16)
    row = carray(pointer(at), (count * width,), np.float32)
    for n in range(count):
        number = _of_float16(kept[n])
        for i in range(width):
            row[n * width + i] = number


@njit
def row_size(kind: int, dim: int) -> int:
    """Bytes of a row of numbers."""
    return dim * (4 if kind == part.FLOAT else 2 if kind == part.HALF else 1)


@njit(fastmath=MATH)
def _softmax(scores: Any, length: int, most: Any, sums: Any) -> None:
    """Scores ``[group, pieces' tokens]`` to weights that are still to be divided by their sums."""
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
def _score_piece(told: Any, layer: int, piece: int, head: int, scores: Any, memory: int) -> None:
    """Scores of a piece's keys ``[group, tokens]``, met by the query heads of one key head."""
    pieces, kv_heads, group = told[PIECES], told[KV_HEADS], told[GROUP]
    dim, pairs = told[KEY_DIM], told[PAIRS]

    def of(field: int) -> Any:
        return carray(pointer(told[OF_PIECES + field]), (pieces,), np.int64)[piece]

    which = carray(pointer(told[WHICH_QUERY]), (pieces,), np.int64)[piece]
    query = told[QUERIES] + 4 * (which * kv_heads + head) * group * dim
    queries = carray(pointer(query), (group, dim), np.float32)
    kind, step = of(part.KIND), of(part.TURN_STEP)
    row = carray(pointer(memory), (dim,), np.float32)
    scales, offsets = memory + 4 * dim, memory + 8 * dim
    if kind == part.CODES:
        at = of(part.KEY_PARAMS) + (layer * kv_heads + head) * of(part.KEY_PARAM_HEADS)
        read_params(at, dim, 1, scales)
        read_params(at + of(part.KEY_OFFSETS), dim, 1, offsets)
    size = row_size(kind, dim)
    at = of(part.KEYS) + layer * of(part.KEY_LAYERS) + head * of(part.KEY_HEADS)
    cosines, sines = of(part.COSINES), of(part.SINES)
    tokens = of(part.TOKENS)
    for t in range(tokens):
        if kind == part.CODES and cosines != 0:
            its = (cosines + t * step, sines + t * step)
            read_turned(at + t * size, dim, memory, scales, offsets, pairs, its[0], its[1])
        else:
            read(at + t * size, kind, dim, memory, scales, offsets)
        for g in range(group):
            score = np.float32(0)
            for i in range(dim):
                score += queries[g, i] * row[i]
            scores[g, t] = score
    bias_at = carray(pointer(told[BIASES]), (pieces,), np.int64)[piece]
    if bias_at != 0:
        bias = carray(pointer(bias_at), (tokens,), np.float32)
        for g in range(group):
            for t in range(tokens):
                scores[g, t] += bias[t]


@njit(fastmath=MATH)
def _mix_values(told: Any, layer: int, piece: int, head: int, weights: Any, memory: int) -> None:
    """A piece's values, mixed by weights ``[group, tokens]`` and added to what is mixed."""
    pieces, group, dim = told[PIECES], told[GROUP], told[VALUE_DIM]

    def of(field: int) -> Any:
        return carray(pointer(told[OF_PIECES + field]), (pieces,), np.int64)[piece]

    kind, tokens = of(part.KIND), of(part.TOKENS)
    row = carray(pointer(memory), (dim,), np.float32)
    task = piece * told[KV_HEADS] + head
    mixed = carray(pointer(told[MIXED] + 4 * task * group * dim), (group, dim), np.float32)
    size = row_size(kind, dim)
    at = of(part.VALUES) + layer * of(part.VALUE_LAYERS) + head * of(part.VALUE_HEADS)
    for t in range(tokens):
        read(at + t * size, kind, dim, memory, memory, memory)
        for g in range(group):
            weight = weights[g, t]
            for i in range(dim):
                mixed[g, i] += weight * row[i]


@njit(fastmath=MATH)
def _mix_codes(told: Any, layer: int, piece: int, head: int, weights: Any) -> None:
    """:func:`_mix_values` of codes: it is the weights that are multiplied by the scales."""
    pieces, kv_heads, group, dim = told[PIECES], told[KV_HEADS], told[GROUP], told[VALUE_DIM]

    def of(field: int) -> Any:
        return carray(pointer(told[OF_PIECES + field]), (pieces,), np.int64)[piece]

    tokens, groups = of(part.TOKENS), told[VALUE_GROUPS]
    width = dim // groups
    mixed = told[MIXED] + 4 * (piece * kv_heads + head) * group * dim
    at = of(part.VALUES) + layer * of(part.VALUE_LAYERS) + head * of(part.VALUE_HEADS)
    params = of(part.VALUE_PARAMS) + (layer * kv_heads + head) * of(part.VALUE_PARAM_HEADS)
    scales = carray(pointer(params), (tokens, groups), np.uint16)
    offsets = carray(pointer(params + of(part.VALUE_OFFSETS)), (tokens, groups), np.uint16)
    for t in range(tokens):
        for v in range(groups):
            scale, offset = _of_float16(scales[t, v]), _of_float16(offsets[t, v])
            codes = at + t * dim + v * width
            for g in range(group):
                weight = weights[g, t]
                to = mixed + 4 * (g * dim + v * width)
                _add_codes(codes, width, weight * scale, weight * offset, to)


@njit(fastmath=MATH)
def mix_piece(told: Any, layer: int, task: int) -> None:
    """One piece of one key head in a layer, met by the query heads of its group."""
    kv_heads, group, value_dim = told[KV_HEADS], told[GROUP], told[VALUE_DIM]
    piece, head = task // kv_heads, task % kv_heads
    room = group * part.PIECE + 3 * max(told[KEY_DIM], value_dim)
    memory = told[MEMORY] + 4 * task * room
    scores = carray(pointer(memory), (group, part.PIECE), np.float32)
    memory += 4 * group * part.PIECE
    _score_piece(told, layer, piece, head, scores, memory)
    most = carray(pointer(told[MOST] + 4 * task * group), (group,), np.float32)
    sums = carray(pointer(told[SUMS] + 4 * task * group), (group,), np.float32)
    tokens = carray(pointer(told[OF_PIECES + part.TOKENS]), (told[PIECES],), np.int64)[piece]
    _softmax(scores, tokens, most, sums)
    mixed = carray(
        pointer(told[MIXED] + 4 * task * group * value_dim), (group * value_dim,), np.float32
    )
    mixed[:] = np.float32(0)
    kinds = carray(pointer(told[OF_PIECES + part.KIND]), (told[PIECES],), np.int64)
    if kinds[piece] == part.CODES:
        _mix_codes(told, layer, piece, head, scores)
    else:
        _mix_values(told, layer, piece, head, scores, memory)


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


@cache
def _sources() -> str:
    """A digest of what kernels are made of. numba keeps machine code as long as the file of its
    function is as it was, whatever becomes of what that calls."""
    files = sorted(Path(__file__).parent.glob("*kernel.py"))
    files.append(Path(part.__file__))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compiled(function: Any) -> int:
    """The address of a function's machine code, made now or by an earlier process."""
    signature = types.void(types.voidptr)
    function = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    function.__qualname__ += f"_{_sources()}"  # which the kept file is named by
    try:
        made: Any = cfunc(signature, fastmath=MATH, cache=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        made = cfunc(signature, fastmath=MATH)(function)
    _KEPT.append(made)  # the code lives as long as it does
    return int(made.address)
