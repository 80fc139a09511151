"""Caches of codec `int8` decoded in one pass over their bytes, compiled by numba.

With torch it is a dozen passes over numbers four times as large, all of which an answer waits for.
The compiled code lets other threads go on, and is kept for later processes. Nothing here computes
with torch: threads that load would each get an OpenMP team, and all teams would sleep and wake.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from kvlink_rag.rope import RopeGroup
from kvlink_rag.store.rooms import Rooms

DTYPES = (torch.float32, torch.bfloat16)
"""That it decodes to."""
ROOMS = Rooms()
"""What it decodes into."""


@cache
def available() -> bool:
    """Whether numba can compile it here; the first call of a process takes up to a second."""
    try:
        _compiled()
    except ImportError as error:
        logging.getLogger("kvlink_rag").info("int8 is not decoded in one pass: %s", error)
        return False
    return True


def decode_int8(
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    position: int,
    rope: Sequence[RopeGroup],
    key_group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, as :func:`kvlink_rag.store.codec.decode` makes them (within rounding).

    Args:
        dtype: of :data:`DTYPES`.
        key_group: neighbouring tokens that share a key's scale.
    """
    keys, values = tensors["keys"], tensors["values"]
    made, mixed = _room(keys.shape, dtype), _room(values.shape, dtype)
    row = np.empty(max(keys.shape[3], values.shape[3]), np.float32)
    positions = np.arange(position, position + keys.shape[2], dtype=np.float32)
    none = np.empty(0, np.float32)
    for layers, inv_freq in _runs(rope, len(keys)):
        angles = positions[:, None] * (none if inv_freq is None else inv_freq.float().numpy())
        _compiled()[dtype](
            _flat(keys[layers]), *_params(tensors, "keys", layers), key_group,
            np.cos(angles), np.sin(angles),
            _flat(values[layers]), *_params(tensors, "values", layers),
            row, row.view(np.uint32), _numbers(made[layers]), _numbers(mixed[layers]),
        )  # fmt: skip
    return made, mixed


def _room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return ROOMS.take(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


def _runs(rope: Sequence[RopeGroup], layers: int) -> list[tuple[slice, torch.Tensor | None]]:
    """Layers with their frequencies; keys whose rotation is not known are decoded as they are."""
    return [(each.layers, each.inv_freq) for each in rope] or [(slice(0, layers), None)]


def _flat(codes: torch.Tensor) -> Any:
    """``[layers * kv_heads, tokens, dim]``."""
    return codes.flatten(0, 1).contiguous().numpy()


def _params(tensors: Mapping[str, torch.Tensor], what: str, layers: slice) -> list[Any]:
    """Scales and offsets, ``[layers * kv_heads, groups or tokens, dim or groups]`` float32."""
    told = [_flat(tensors[f"{what}.{name}"][layers]) for name in ("scale", "offset")]
    return [each.astype(np.float32) for each in told]


def _numbers(made: torch.Tensor) -> Any:
    """Where to write: float32, or the bits of bfloat16. A view of what is made."""
    flat = made.flatten(0, 1)
    return flat.numpy() if made.dtype == torch.float32 else flat.view(torch.uint16).numpy()


@cache
def _compiled() -> dict[torch.dtype, Any]:
    """The function for each type that is decoded to.

    Raises:
        ImportError: numba is not there, or refuses this numpy.
    """
    from kvlink_rag.store.one_pass_kernel import decoder

    made = {torch.float32: decoder(half=False), torch.bfloat16: decoder(half=True)}
    for dtype, decode in made.items():  # all of it at the first call
        codes, one = np.zeros((1, 1, 2), np.uint8), np.zeros((1, 1, 2), np.float32)
        angle, row = np.zeros((1, 1), np.float32), np.empty(2, np.float32)
        out = _numbers(torch.empty(1, 1, 1, 2, dtype=dtype))
        decode(
            codes, one, one, 1, angle, angle, codes, one, one, row, row.view(np.uint32), out, out
        )
    return made
