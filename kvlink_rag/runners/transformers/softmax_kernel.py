"""The softmax of scores of which each query may see some, compiled.

torch reads and writes the scores once to hide what may not be seen and twice more for the softmax,
all columns in bfloat16 as if they were float32 with a conversion around. Here a row is read once,
only as far as its query sees, and stays in the processor's first cache until its weights are
written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from kvlink_rag.runners.transformers.kernel import (
    MATH,
    bits,
    num_threads,
    pointer,
    thread_num,
    wide,
)

ROWS, COLUMNS, HALF, SCORES, FIRST, STOP, MEMORY, FIELDS = range(8)
"""What the kernel is told, by its place.

Scores ``[rows, columns]`` become weights where they lie; whether they are bfloat16, not float32.
Which columns each row sees, from ``FIRST`` up to ``STOP``, ``[rows]`` int64 each, at least one; the
others become 0. Memory for ``columns`` numbers a thread.
"""

_LOG2_E = np.float32(1.4426950408889634)
_LEAST = np.float32(-126)
"""Exponent of the smallest normal float32: what is smaller, 1e-38 of the highest, is that."""


def _of_bits(context: Any, number: Any) -> Any:
    """The float32 of bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


_float: Any = intrinsic(_of_bits)


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
    return rest * _float((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(fastmath=MATH)
def _half(number: Any) -> Any:
    """The bits of the nearest bfloat16."""
    b = bits(number)
    return (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit
def _ordered(b: Any) -> Any:
    """Bits of a float32 to an integer that is in order with others, and back."""
    return b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit
def _highest(row: Any, length: int) -> Any:
    """The highest, :func:`_ordered`; as numbers, compilers compare one pair at a time."""
    highest = np.int32(-(2**31))
    for i in range(length):
        highest = max(highest, _ordered(np.int32(bits(row[i]))))
    return highest


@njit(fastmath=MATH)
def _weigh(address: int, length: int) -> None:
    """The softmax of float32 numbers, in place."""
    row = carray(pointer(address), (length,), np.float32)
    highest = _float(_ordered(_highest(row, length)))
    total = np.float32(0)
    for i in range(length):
        weight = _exp(row[i] - highest)
        row[i] = weight
        total += weight
    factor = np.float32(1) / total
    for i in range(length):
        row[i] *= factor


@njit(fastmath=MATH)
def _widen(halves_at: int, length: int, row_at: int) -> None:
    halves = carray(pointer(halves_at), (length,), np.uint16)
    row = carray(pointer(row_at), (length,), np.float32)
    for i in range(length):
        row[i] = wide(halves[i])


@njit(fastmath=MATH)
def _narrow(row_at: int, length: int, halves_at: int) -> None:
    row = carray(pointer(row_at), (length,), np.float32)
    halves = carray(pointer(halves_at), (length,), np.uint16)
    for i in range(length):
        halves[i] = _half(row[i])


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
    half = told[HALF] != 0
    size = 2 if half else 4
    for row in range(thread, rows, num_threads()):
        first, stop = firsts[row], stops[row]
        start = told[SCORES] + size * row * columns
        seen = start + size * first
        if half:
            _widen(seen, stop - first, memory)
            _weigh(memory, stop - first)
            _narrow(memory, stop - first, seen)
        else:
            _weigh(seen, stop - first)
        _clear(start, size * first)
        _clear(start + size * stop, size * (columns - stop))
