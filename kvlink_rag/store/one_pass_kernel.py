"""What :mod:`kvlink_rag.store.one_pass` compiles; importing it needs numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

_OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "nsz", "arcp"},
    "nogil": True,
    "cache": True,
}


def decoder(half: bool) -> Callable[..., None]:
    """A function that decodes keys and values of some layers.

    It is given codes ``[rows, tokens, dim]``; scales and offsets of the keys, ``[rows, groups,
    dim]``, each for ``size`` neighbouring tokens, and of the values, ``[rows, tokens, groups]``,
    each for neighbouring channels; the angles that keys are turned by, ``[tokens, half]``
    (dimensions beyond ``2 * half`` do not turn); and room for one row, as float32 and as bits.

    Args:
        half: writes the bits of bfloat16 (uint16), rounded to even; else float32.
    """

    @njit(**_OPTIONS)
    def decode(
        keys: Any, key_scales: Any, key_offsets: Any, size: int, cos: Any, sin: Any,
        values: Any, scales: Any, offsets: Any, row: Any, bits: Any, made: Any, mixed: Any,
    ) -> None:  # fmt: skip
        turning, dim, value_dim = cos.shape[1], keys.shape[2], values.shape[2]
        groups = scales.shape[2]
        width = value_dim // groups
        for n in range(keys.shape[0]):
            for t in range(keys.shape[1]):
                g = t // size
                for i in range(turning):
                    a = np.float32(keys[n, t, i]) * key_scales[n, g, i] + key_offsets[n, g, i]
                    b = (
                        np.float32(keys[n, t, i + turning]) * key_scales[n, g, i + turning]
                        + key_offsets[n, g, i + turning]
                    )
                    row[i] = a * cos[t, i] - b * sin[t, i]
                    row[i + turning] = b * cos[t, i] + a * sin[t, i]
                for i in range(2 * turning, dim):
                    row[i] = np.float32(keys[n, t, i]) * key_scales[n, g, i] + key_offsets[n, g, i]
                if half:
                    for i in range(dim):
                        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                        made[n, t, i] = np.uint16(
                            (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
                        )
                else:
                    for i in range(dim):
                        made[n, t, i] = row[i]
                for v in range(groups):
                    scale, offset = scales[n, t, v], offsets[n, t, v]
                    for i in range(width):
                        row[i] = np.float32(values[n, t, v * width + i]) * scale + offset
                    if half:
                        for i in range(width):
                            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                            mixed[n, t, v * width + i] = np.uint16(
                                (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
                            )
                    else:
                        for i in range(width):
                            mixed[n, t, v * width + i] = row[i]

    return decode  # type: ignore[no-any-return]


def measurer(half: bool) -> Callable[..., None]:
    """A function that frees keys of their rotation, and finds the bounds of what shares a scale.

    It is given keys ``[rows, tokens, dim]``, as float32 or, if they are ``half``, as the bits of
    bfloat16; the angles that they are turned back by, ``[tokens, half]``; and where to write: the
    free keys, and the lowest and highest number of each channel over each ``size`` neighbouring
    tokens, ``[rows, groups, dim]``, all float32.
    """

    @njit(**_OPTIONS)
    def measure(
        keys: Any, cos: Any, sin: Any, size: int, bits: Any, free: Any, low: Any, high: Any
    ) -> None:
        turning, dim = cos.shape[1], keys.shape[2]
        for n in range(keys.shape[0]):
            for t in range(keys.shape[1]):
                g = t // size
                for i in range(dim):
                    if half:
                        bits[n, t, i] = np.uint32(keys[n, t, i]) << np.uint32(16)
                    else:
                        free[n, t, i] = keys[n, t, i]
                for i in range(turning):
                    a, b = free[n, t, i], free[n, t, i + turning]
                    free[n, t, i] = a * cos[t, i] + b * sin[t, i]
                    free[n, t, i + turning] = b * cos[t, i] - a * sin[t, i]
                if t % size == 0:
                    for i in range(dim):
                        low[n, g, i] = high[n, g, i] = free[n, t, i]
                for i in range(dim):
                    low[n, g, i] = min(low[n, g, i], free[n, t, i])
                    high[n, g, i] = max(high[n, g, i], free[n, t, i])

    return measure  # type: ignore[no-any-return]


@njit(**_OPTIONS)
def code_keys(free: Any, scales: Any, offsets: Any, size: int, codes: Any) -> None:
    """Keys ``[rows, tokens, dim]`` as codes of a byte; scales and offsets ``[rows, groups, dim]``,
    each for ``size`` neighbouring tokens. All but the codes are float32."""
    most = np.float32(255)
    for n in range(free.shape[0]):
        for t in range(free.shape[1]):
            g = t // size
            for i in range(free.shape[2]):
                share = np.rint((free[n, t, i] - offsets[n, g, i]) / scales[n, g, i])
                codes[n, t, i] = np.uint8(min(max(share, np.float32(0)), most))


@njit(**_OPTIONS)
def code_values(values: Any, scales: Any, offsets: Any, codes: Any) -> None:
    """Values ``[rows, tokens, dim]`` as codes of a byte; scales and offsets ``[rows, tokens,
    groups]``, each for neighbouring channels. All but the codes are float32."""
    most = np.float32(255)
    groups = scales.shape[2]
    width = values.shape[2] // groups
    for n in range(values.shape[0]):
        for t in range(values.shape[1]):
            for v in range(groups):
                scale, offset = scales[n, t, v], offsets[n, t, v]
                for i in range(v * width, (v + 1) * width):
                    share = np.rint((values[n, t, i] - offset) / scale)
                    codes[n, t, i] = np.uint8(min(max(share, np.float32(0)), most))
