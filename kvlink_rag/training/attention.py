"""Attention of packed training examples: new tokens over frozen context, many packs in a row.

The tokens of all packs go through the linear layers as one sequence; only attention is per pack.
What a token sees is given by the pack, so link tokens, several questions behind one context and
plain text need no code of their own, and no mask over the whole batch is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvlink_packed"


@dataclass(eq=False)
class PackContext:
    """What the attention of one pack needs.

    Args:
        keys, values: ``[layers, kv_heads, context, dim]``, frozen, at their positions.
        bias: per layer ``[tokens, context + tokens]``, 0 where a token sees another, else -inf.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: Sequence[torch.Tensor]

    @property
    def tokens(self) -> int:
        """New tokens."""
        return int(self.bias[0].shape[0])


_PACKS: ContextVar[Sequence[PackContext]] = ContextVar("packs")


@contextmanager
def packed(packs: Sequence[PackContext]) -> Iterator[None]:
    """Let models whose attention implementation is :data:`NAME` run these packs meanwhile."""
    token = _PACKS.set(packs)
    try:
        yield
    finally:
        _PACKS.reset(token)


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
    """Attention pack by pack.

    Args:
        query: ``[1, heads, tokens of all packs, head_dim]``; ``key``, ``value`` alike with
            ``kv_heads``.

    Returns:
        ``[1, tokens, heads, value_dim]``, and None for the weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, start, parts = int(module.layer_idx), 0, []  # type: ignore[arg-type]
    for pack in _PACKS.get():
        stop = start + pack.tokens
        parts.append(
            _PackAttention.apply(  # type: ignore[no-untyped-call]
                query[0, :, start:stop],
                key[0, :, start:stop],
                value[0, :, start:stop],
                pack.keys[layer],
                pack.values[layer],
                pack.bias[layer],
                scale,
                softcap,
            )
        )
        start = stop
    return torch.cat(parts, dim=1).transpose(0, 1)[None], None


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
