"""Caches of codec `int8` coded and decoded in a pass or two over their bytes, compiled by numba.

With torch it is a dozen passes over numbers four times as large, all of which an answer waits for.
The compiled code lets other threads go on, and is kept for later processes. Nothing here computes
with torch: threads that load would each get an OpenMP team, and all teams would sleep and wake.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from kvlink_rag.rope import RopeGroup
from kvlink_rag.store.rooms import Rooms

DTYPES = (torch.float32, torch.bfloat16)
"""That it codes, and decodes to."""
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
    for layers, inv_freq in _runs(rope, len(keys)):
        angles = _angles(positions, inv_freq)
        _compiled()[dtype](
            _flat(keys[layers]), *_params(tensors, "keys", layers), key_group,
            np.cos(angles), np.sin(angles),
            _flat(values[layers]), *_params(tensors, "values", layers),
            row, row.view(np.uint32), _numbers(made[layers]), _numbers(mixed[layers]),
        )  # fmt: skip
    return made, mixed


@dataclass(frozen=True, eq=False)
class FreeKeys:
    """Keys as they were before their rotation, all float32.

    Attributes:
        numbers: ``[layers, kv_heads, tokens, head_dim]``.
        low, high: bounds of each channel over the neighbouring tokens that share a scale,
            ``[layers, kv_heads, groups, head_dim]``.
    """

    numbers: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(
        cls, keys: torch.Tensor, position: int, rope: Sequence[RopeGroup], key_group: int
    ) -> FreeKeys:
        """Of keys of :data:`DTYPES`, the first of them at ``position``."""
        layers, heads, tokens, dim = keys.shape
        free = torch.empty(keys.shape)
        low, high = torch.empty(2, layers, heads, -(-tokens // key_group), dim)
        positions = np.arange(position, position + tokens, dtype=np.float32)
        for its, inv_freq in _runs(rope, layers):
            angles = _angles(positions, inv_freq)
            out, *bounds = (each[its].flatten(0, 1).numpy() for each in (free, low, high))
            _measurers()[keys.dtype](
                _numbers(keys[its].contiguous()), np.cos(angles), np.sin(angles), key_group,
                out.view(np.uint32), out, *bounds,
            )  # fmt: skip
        return cls(free, low, high)


def int8_keys(
    free: FreeKeys, key_group: int, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Codes of keys, ``uint8``; scales and offsets shaped as their bounds."""
    from kvlink_rag.store.one_pass_kernel import code_keys

    codes = torch.empty(free.numbers.shape, dtype=torch.uint8)
    params = [each.float().flatten(0, 1).numpy() for each in (scale, offset)]
    code_keys(free.numbers.flatten(0, 1).numpy(), *params, key_group, _flat(codes))
    return codes


def int8_values(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Codes of float32 values, ``uint8``; scales and offsets ``[layers, kv_heads, tokens,
    groups]``."""
    from kvlink_rag.store.one_pass_kernel import code_values

    codes = torch.empty(values.shape, dtype=torch.uint8)
    params = [each.float().flatten(0, 1).numpy() for each in (scale, offset)]
    code_values(values.flatten(0, 1).numpy(), *params, _flat(codes))
    return codes


def _angles(positions: Any, inv_freq: torch.Tensor | None) -> Any:
    """``[tokens, pairs]``; no pairs where nothing turns."""
    none = np.empty(0, np.float32)
    return positions[:, None] * (none if inv_freq is None else inv_freq.float().numpy())


@cache
def _measurers() -> dict[torch.dtype, Any]:
    """The function for each type of keys."""
    from kvlink_rag.store.one_pass_kernel import measurer

    return {torch.float32: measurer(half=False), torch.bfloat16: measurer(half=True)}


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
