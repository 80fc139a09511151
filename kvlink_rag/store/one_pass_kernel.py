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
