"""Attention of queries at any positions over keys that lie at theirs.

For prompts with many tokens to compute: what it costs to move a layer's keys is little beside the
products, and those are few and large then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvlink_rag.runners.transformers import softmax
from kvlink_rag.runners.transformers.scratch import Scratch
from kvlink_rag.runners.transformers.visibility import bias_of

Weigh = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Scores to weights, whose sums over rows are added to what is paid, if it is asked for."""

BLOCK_QUERIES = 128
"""Queries that attention is computed for at once: their scores stay in the processor's cache."""

BLOCK_KEYS = 128
"""Keys are taken in multiples of so many: oneDNN makes code for each size of a product that it
meets, and the sizes would be others for every question."""


def attend_at(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: Sequence[int],
    window: int | None,
    scratch: Scratch,
    paid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped-query attention in which a query sees every key up to its own position.

    Args:
        query: scaled, ``[heads, queries, head_dim]``.
        keys: ``[kv_heads, positions, head_dim]``; ``values`` alike.
        positions: of the queries, increasing.
        window: so many positions at most, its own among them; None is all.
        scratch: to compute in.
        paid: to which the weights are added, summed over queries and heads, ``[up to positions]``
            float32.

    Returns:
        ``[queries, heads, value_dim]``.
    """
    kv_heads, group = len(keys), len(query) // len(keys)
    mixed = query.new_empty(len(positions), len(query), values.shape[2])
    result = mixed.view(-1, kv_heads, group, values.shape[2]).permute(1, 2, 0, 3)
    weigher = _compiled if softmax.available(query.dtype) else _by_torch
    for start in range(0, len(positions), BLOCK_QUERIES):
        at = positions[start : start + BLOCK_QUERIES]
        stop = min(-(-(at[-1] + 1) // BLOCK_KEYS) * BLOCK_KEYS, keys.shape[1])
        seen = slice(0 if window is None else max(at[0] - window + 1, 0), stop)
        weigh = weigher(at, seen, window, group, scratch)
        for head in range(kv_heads):
            rows = query[head * group : (head + 1) * group, start : start + len(at)].flatten(0, 1)
            shape = (len(rows), seen.stop - seen.start)
            scores = scratch.tensor("scores", shape, rows.dtype)
            torch.mm(rows, keys[head, seen].T, out=scores)
            out = weigh(scores, None if paid is None else paid[seen]) @ values[head, seen]
            result[head, :, start : start + len(at)] = out.view(group, len(at), -1)
    return mixed


def _compiled(
    at: Sequence[int], seen: slice, window: int | None, group: int, scratch: Scratch
) -> Weigh:
    """How scores ``[group * queries, columns]`` of positions ``seen`` become weights."""
    stop = np.tile(np.array(at, dtype=np.int64) + 1 - seen.start, group)
    first = np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)

    def weigh(scores: torch.Tensor, paid: torch.Tensor | None) -> torch.Tensor:
        softmax.softmax_seen(scores, first, stop, scratch, paid)
        return scores

    return weigh


def _by_torch(
    at: Sequence[int], seen: slice, window: int | None, group: int, scratch: Scratch
) -> Weigh:
    """As :func:`_compiled`, where nothing can be compiled."""
    # the first column that one of the queries may not see
    first = seen.start if window is not None else min(at[0] + 1, seen.stop - 1)
    bias: torch.Tensor | None = None

    def weigh(scores: torch.Tensor, paid: torch.Tensor | None) -> torch.Tensor:
        nonlocal bias
        bias = bias_of(at, range(first, seen.stop), window, scores.dtype) if bias is None else bias
        if bias is not None:
            scores.view(group, len(at), -1)[..., first - seen.start :] += bias
        weights = scratch.tensor("weights", tuple(scores.shape), scores.dtype)
        torch.softmax(scores, -1, out=weights)
        if paid is not None:
            paid += weights.sum(0, dtype=torch.float32)[: len(paid)]
        return weights

    return weigh
