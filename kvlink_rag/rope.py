"""Rotary position embedding (RoPE): cached keys, or queries, moved to other positions.

RoPE is relative (Su et al., arXiv 2104.09864): rotating a key by ``position * inv_freq`` is all
that a position does to it. A chunk whose keys are rotated on by ``shift * inv_freq`` therefore
holds exactly the keys that it would have had ``shift`` positions later (KVLink, arXiv 2502.16002,
3.1), and a query that is rotated back as far meets the keys where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RopeGroup:
    """Layers that share one set of frequencies.

    Args:
        layers: a run of neighbouring layers, so that indexing gives views.
        inv_freq: ``[rotary_dim / 2]`` float32, or None for layers without RoPE.
    """

    layers: slice
    inv_freq: torch.Tensor | None


def group_layers(inv_freqs: Sequence[torch.Tensor | None]) -> list[RopeGroup]:
    """Runs of neighbouring layers with the same frequencies, one group each."""
    groups: list[RopeGroup] = []
    start = 0
    for stop in range(1, len(inv_freqs) + 1):
        if stop == len(inv_freqs) or inv_freqs[stop] is not inv_freqs[start]:
            groups.append(RopeGroup(slice(start, stop), inv_freqs[start]))
            start = stop
    return groups


def rotate(
    keys: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate keys by ``positions``, which are forward if positive and back if negative.

    The angles and the products are float32 whatever the keys' type. A yarn model's attention
    factor is part of its cached keys already and is not applied here.

    Args:
        keys: ``[..., tokens, head_dim]``; dimensions beyond ``2 * len(inv_freq)`` do not rotate
            (partial rotary).
        positions: ``[tokens]`` or, the same for all, ``[1]`` integers.
        inv_freq: ``[rotary_dim / 2]`` float32.
        out: where to write, same shape as ``keys``; may be ``keys`` itself. None makes a new one.
    """
    angles = positions.to(torch.float32)[:, None] * inv_freq.to(torch.float32)  # [tokens, half]
    if out is None:
        out = torch.empty_like(keys)
    return turn(keys, angles.cos(), angles.sin(), out)


def turn(
    vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Turn vectors ``[..., head_dim]`` by angles ``[..., half]`` that broadcast with them.

    Args:
        out: where to write; the shape that the broadcast gives. May be ``vectors`` itself.
    """
    half = cos.shape[-1]
    first, second = vectors[..., :half], vectors[..., half : 2 * half]
    to_first, to_second = out[..., :half], out[..., half : 2 * half]
    aside = out.data_ptr() != vectors.data_ptr()
    if aside and out.dtype == torch.float32:
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    else:
        first, second = first.to(torch.float32), second.to(torch.float32)
        rotated = (first * cos).addcmul_(second, sin, value=-1)
        to_second.copy_((second * cos).addcmul_(first, sin))
        to_first.copy_(rotated)
    if aside and 2 * half < vectors.shape[-1]:
        out[..., 2 * half :].copy_(vectors[..., 2 * half :])
    return out


def shift_groups(
    keys: torch.Tensor,
    positions: torch.Tensor,
    groups: Sequence[RopeGroup],
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rotate` over all layers; ``keys`` and ``out``: ``[layers, ..., tokens, head_dim]``."""
    if out is None:
        out = torch.empty_like(keys)
    for group in groups:
        if group.inv_freq is None:
            out[group.layers].copy_(keys[group.layers])
        else:
            rotate(keys[group.layers], positions, group.inv_freq, out=out[group.layers])
    return out
