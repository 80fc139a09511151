"""Attention of packed training examples: new tokens over frozen context, many packs in a row.

The tokens of all packs go through the linear layers as one sequence; only attention is per pack.
What a token sees is given by the pack, so link tokens, several questions behind one context and
plain text need no code of their own, and no mask over the whole batch is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvlink_packed"


@dataclass(eq=False)
class PackContext:
    """Keys and values of one pack's frozen context, and who sees whom.

    A token sees those at positions up to its own that are of its group, and if it is open also the
    shared ones; in a layer with a sliding window only the nearest.

    Args:
        keys, values: ``[layers, kv_heads, context, dim]``, frozen, at their positions.
        positions, groups, shared: ``[context + tokens]``, of frozen and new tokens.
        open: ``[tokens]``, of the new ones.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    groups: torch.Tensor
    shared: torch.Tensor
    open: torch.Tensor

    @property
    def tokens(self) -> int:
        """New tokens."""
        return int(self.open.shape[0])

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """``[tokens, context + tokens]``, 0 where a token sees another, else -inf."""
        own = slice(self.keys.shape[2], None)
        seen = self.groups[None] == self.groups[own, None]
        seen |= self.shared[None] & self.open[:, None]
        distance = self.positions[own, None] - self.positions[None]
        seen &= distance >= 0
        if window is not None:
            seen &= distance < window
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return bias.masked_fill_(~seen, float("-inf"))


class Batch:
    """Packs of one forward pass; masks are made once for all layers of the same window.

    Args:
        packs: in the order of their tokens.
        windows: per layer its sliding window, or None.
    """

    def __init__(self, packs: Sequence[PackContext], windows: Sequence[int | None]) -> None:
        self.packs = packs
        self.windows = windows
        self._biases: dict[tuple[int | None, torch.dtype], list[torch.Tensor]] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def biases(self, layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """For each pack its mask in a layer."""
        window = self.windows[layer]
        if (window, dtype) not in self._biases:
            self._biases[window, dtype] = [pack.bias(window, dtype) for pack in self.packs]
        return self._biases[window, dtype]

    def block_mask(self, layer: int) -> BlockMask:
        """The mask of all packs in a layer, for flex attention: only blocks are kept."""
        window = self.windows[layer]
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(window)
        return self._block_masks[window]

    def _make_block_mask(self, window: int | None) -> BlockMask:
        packs = self.packs
        positions = torch.cat([pack.positions for pack in packs])
        groups = torch.cat([pack.groups for pack in packs])
        shared = torch.cat([pack.shared for pack in packs])
        opens = torch.cat([pack.open for pack in packs])
        sizes = torch.tensor([len(pack.positions) for pack in packs], device=positions.device)
        owner = torch.arange(len(packs), device=positions.device).repeat_interleave(sizes)
        starts = sizes.cumsum(0) - sizes
        new = [  # where the new tokens are among the keys
            torch.arange(pack.keys.shape[2], len(pack.positions), device=positions.device) + start
            for pack, start in zip(packs, starts, strict=True)
        ]
        places = torch.cat(new)

        def sees(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = places[query]
            distance = positions[own] - positions[key]
            seen = (groups[own] == groups[key]) | (shared[key] & opens[query])
            seen = seen & (owner[own] == owner[key]) & (distance >= 0)
            return seen if window is None else seen & (distance < window)

        tokens, device = len(places), str(positions.device)
        return create_block_mask(sees, None, None, tokens, len(positions), device=device)


_BATCH: ContextVar[Batch] = ContextVar("batch")


@contextmanager
def packed(batch: Batch) -> Iterator[None]:
    """Let models whose attention implementation is :data:`NAME` run these packs meanwhile."""
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention pack by pack; on a GPU over all packs at once, by flex attention.

    Args:
        query: ``[1, heads, tokens of all packs, head_dim]``; ``key``, ``value`` alike with
            ``kv_heads``.

    Returns:
        ``[1, tokens, heads, value_dim]``, and None for the weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if query.is_cuda:
        flex = _compiled_flex_attention()
        mixed = attend_flex(query, key, value, _BATCH.get(), layer, scale, softcap, flex)
    else:
        mixed = attend_packs(query, key, value, _BATCH.get(), layer, scale, softcap)
    return mixed.transpose(1, 2), None


def attend_packs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    layer: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """One pack after the other; shapes as in :func:`attend`, heads first in the result."""
    start, parts = 0, []
    for pack, bias in zip(batch.packs, batch.biases(layer, query.dtype), strict=True):
        stop = start + pack.tokens
        parts.append(
            _PackAttention.apply(  # type: ignore[no-untyped-call]
                query[0, :, start:stop],
                key[0, :, start:stop],
                value[0, :, start:stop],
                pack.keys[layer],
                pack.values[layer],
                bias,
                scale,
                softcap,
            )
        )
        start = stop
    return torch.cat(parts, dim=1)[None]


def attend_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    layer: int,
    scale: float,
    softcap: float | None,
    flex: Callable[..., Any] = flex_attention,
) -> torch.Tensor:
    """All packs in one sequence, without a mask of its size (FlexAttention, arXiv 2412.05496)."""
    keys, values, start = [], [], 0
    for pack in batch.packs:
        stop = start + pack.tokens
        keys += [pack.keys[layer].to(key.dtype), key[0, :, start:stop]]
        values += [pack.values[layer].to(value.dtype), value[0, :, start:stop]]
        start = stop

    def cap(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap) if softcap else score

    mixed: torch.Tensor = flex(
        query,
        torch.cat(keys, dim=1)[None],
        torch.cat(values, dim=1)[None],
        score_mod=cap if softcap else None,
        block_mask=batch.block_mask(layer),
        scale=scale,
        enable_gqa=True,
    )
    return mixed


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


class _PackAttention(torch.autograd.Function):
    """Grouped-query attention of new tokens over frozen context and themselves.

    Written out because the frozen context needs no gradient, key and value heads need no repeating,
    and one tensor of scores is all that has to be kept: three to four times faster on CPU than
    torch's attention with a mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        kv_heads, tokens, _ = key.shape
        folded = (query * scale).reshape(kv_heads, -1, query.shape[2])
        keys = torch.cat([context_keys.to(key.dtype), key], dim=1)
        values = torch.cat([context_values.to(value.dtype), value], dim=1)
        scores = torch.bmm(folded, keys.transpose(1, 2))
        slope = None
        if softcap is not None:
            capped = torch.tanh(scores / softcap)
            slope, scores = 1 - capped * capped, capped * softcap
        scores.view(kv_heads, -1, *bias.shape).add_(bias)
        weights = torch.softmax(scores, -1)
        mixed = torch.bmm(weights, values)
        ctx.save_for_backward(folded, keys, values, weights, mixed, slope)
        ctx.scale, ctx.shape = scale, query.shape
        return mixed.view(query.shape[0], tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded, keys, values, weights, mixed, slope = ctx.saved_tensors
        grad = grads[0].reshape(mixed.shape)
        context = keys.shape[1] - ctx.shape[1]
        grad_value = torch.bmm(weights[..., context:].transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, values.transpose(1, 2))
        grad_scores.sub_((grad * mixed).sum(-1, keepdim=True)).mul_(weights)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_query = torch.bmm(grad_scores, keys).mul_(ctx.scale).view(ctx.shape)
        grad_key = torch.bmm(grad_scores[..., context:].transpose(1, 2), folded)
        return grad_query, grad_key, grad_value, None, None, None, None, None


def _no_mask(**_: Any) -> None:
    """What a token sees is the packs' business."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
