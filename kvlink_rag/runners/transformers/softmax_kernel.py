"""The softmax of scores of which each query may see some, compiled.

torch reads and writes the scores once to hide what may not be seen and twice more for the softmax,
all columns in bfloat16 as if they were float32 with a conversion around. Here a row is read once,
only as far as its query sees, and stays in the processor's first cache until its weights are
written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kvlink_rag.runners.transformers.kernel import (
    MATH,
    bits,
    nearest_half,
    num_threads,
    of_bits,
    pointer,
    thread_num,
    wide,
)

ROWS, COLUMNS, HALF, SCORES, FIRST, STOP, MEMORY, PAID, FIELDS = range(9)
"""What the kernel is told, by its place.

Scores ``[rows, columns]`` become weights where they lie; whether they are bfloat16, not float32.
Which columns each row sees, from ``FIRST`` up to ``STOP``, ``[rows]`` int64 each, at least one; the
others become 0. Memory for ``columns`` numbers a thread; and where each thread adds up the weights
of its rows, ``[threads, columns]`` float32, or 0.
"""

_LOG2_E = np.float32(1.4426950408889634)
_LEAST = np.float32(-126)
"""Exponent of the smallest normal float32: what is smaller, 1e-38 of the highest, is that."""


@njit(fastmath=MATH)
def _exp(x: Any) -> Any:
    """``e ** x`` for ``x <= 0``, off by 3e-7 of it where it is not very small.

    A whole power of two, and a polynomial for the rest: processors do eight or sixteen of these at
    a time, where the C library's function is called for one.
    """
    power = max(x * _LOG2_E, _LEAST)
    whole = np.floor(power + np.float32(0.5))
    f = power - whole  # the coefficients are ln(2) ** n / n!
    rest = np.float32(1.5403530e-4)
    rest = rest * f + np.float32(1.3333558e-3)
    rest = rest * f + np.float32(9.6181291e-3)
    rest = rest * f + np.float32(5.5504109e-2)
    rest = rest * f + np.float32(2.4022651e-1)
    rest = rest * f + np.float32(6.9314718e-1)
    rest = rest * f + np.float32(1)
    return rest * of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit
def _ordered(b: Any) -> Any:
    """Bits of a float32 to an integer that is in order with others, and back."""
    return b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit
def _highest(at: int, length: int) -> Any:
    """The highest of float32 numbers; compilers compare one pair at a time, but as integers."""
    row = carray(pointer(at), (length,), np.float32)
    highest = np.int32(-(2**31))
    for i in range(length):
        highest = max(highest, _ordered(np.int32(bits(row[i]))))
    return of_bits(_ordered(highest))


@njit
def _highest_widened(halves_at: int, length: int, row_at: int) -> Any:
    """The highest of bfloat16 numbers, which are written in float32."""
    halves = carray(pointer(halves_at), (length,), np.uint16)
    row = carray(pointer(row_at), (length,), np.float32)
    highest = np.int32(-(2**31))
    for i in range(length):
        number = wide(halves[i])
        row[i] = number
        highest = max(highest, _ordered(np.int32(bits(number))))
    return of_bits(_ordered(highest))


@njit(fastmath=MATH)
def _exponents(at: int, length: int, highest: Any) -> Any:
    """Powers of e instead of numbers, beside that of the highest; their sum."""
    row = carray(pointer(at), (length,), np.float32)
    total = np.float32(0)
    for i in range(length):
        weight = _exp(row[i] - highest)
        row[i] = weight
        total += weight
    return total


@njit(fastmath=MATH)
def _scale(at: int, length: int, factor: Any) -> None:
    row = carray(pointer(at), (length,), np.float32)
    for i in range(length):
        row[i] *= factor


@njit(fastmath=MATH)
def _scale_narrowed(row_at: int, length: int, factor: Any, halves_at: int) -> None:
    row = carray(pointer(row_at), (length,), np.float32)
    halves = carray(pointer(halves_at), (length,), np.uint16)
    for i in range(length):
        halves[i] = nearest_half(row[i] * factor)


@njit(fastmath=MATH)
def _add(row_at: int, length: int, factor: Any, to: int) -> None:
    row = carray(pointer(row_at), (length,), np.float32)
    sums = carray(pointer(to), (length,), np.float32)
    for i in range(length):
        sums[i] += row[i] * factor


@njit(fastmath=MATH)
def _clear(address: int, nbytes: int) -> None:
    row = carray(pointer(address), (nbytes,), np.uint8)
    for i in range(nbytes):
        row[i] = np.uint8(0)


def softmax(address: Any) -> None:
    """All rows, every thread of a team its own; ``address`` is that of what the kernel is told."""
    told = carray(address, (FIELDS,), np.int64)
    rows, columns = told[ROWS], told[COLUMNS]
    firsts = carray(pointer(told[FIRST]), (rows,), np.int64)
    stops = carray(pointer(told[STOP]), (rows,), np.int64)
    thread = thread_num()
    memory = told[MEMORY] + 4 * thread * columns
    paid = told[PAID] + 4 * thread * columns
    half = told[HALF] != 0
    size = 2 if half else 4
    for row in range(thread, rows, num_threads()):
        first = firsts[row]
        length = stops[row] - first
        start = told[SCORES] + size * row * columns
        seen = start + size * first
        at = memory if half else seen
        highest = _highest_widened(seen, length, at) if half else _highest(at, length)
        factor = np.float32(1) / _exponents(at, length, highest)
        if told[PAID] != 0:
            _add(at, length, factor, paid + 4 * first)
        if half:
            _scale_narrowed(at, length, factor, seen)
        else:
            _scale(at, length, factor)
        _clear(start, size * first)
        _clear(seen + size * length, size * (columns - first - length))
