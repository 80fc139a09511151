"""Attention for forward passes over a cache: the numbers of torch's kernel, by a faster way.

On CPU, torch's kernel repeats key and value heads for each query head and is slow for few queries
over many keys. Here the query heads of a group are folded into the queries of one matrix product
with their key head, a block of queries at a time, and the cache is read where it lies: measured 1.4
times (batches of chunks) to 9 times faster (one query over 5,000 tokens).

On other devices it is torch's, whose fast causal attention needs as many keys as queries. Chunks
that are encoded behind a prefix have a few more, for which transformers builds a mask, and with a
mask come a slower kernel and repeated heads. A few queries of no account in front make the numbers
equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvlink"
BLOCK_ROWS = 384
"""Rows of a matrix product of scores: small enough for a block of scores to stay in cache."""
FOLDED_DTYPES = (torch.float32, torch.bfloat16)
"""Number types whose matrix products are fast on CPU."""
FEW_ROWS, FEW_TOKENS = 12, 256
"""Up to these sizes a half-precision matrix product costs less in float32: for half precision a
kernel of 0.7 MB is made for every size that a process meets, in 0.5 ms and more."""


@contextmanager
def fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that uses torch's attention use this one meanwhile.

    Only for forward passes in which every cached token lies at its position and nothing is padded
    on the left. Hold the model's lock.
    """
    own = model.get_decoder().config._attn_implementation
    with use_attention(model, NAME if own == "sdpa" else own):
        yield


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model use another attention implementation meanwhile.

    Hold the model's lock: the setting is the model's, not the thread's.
    """
    config = model.get_decoder().config
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention; without a mask it is causal and the last query sees the last key.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``, ``tokens >= queries``; ``value`` alike.
        attention_mask: ``[batch or 1, 1, queries, tokens]``, true or 0 where a query may look.

    Returns:
        ``[batch, queries, heads, value_dim]``, and None for the weights.
    """
    if query.device.type == "cpu" and query.dtype in FOLDED_DTYPES and is_plain(options):
        return attend_folded(query, key, value, attention_mask, options.get("scaling")), None
    before = key.shape[2] - query.shape[2]
    if attention_mask is None and query.shape[2] > 1 and before > 0:
        # torch aligns the first query with the first key
        query = F.pad(query, (0, 0, before, 0))
        out, _ = sdpa_attention_forward(module, query, key, value, None, **options)
        return out[:, before:], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def is_plain(options: Mapping[str, Any]) -> bool:
    """Whether no scores are changed on the way; if so, torch's attention does it, or refuses."""
    odd = ("softcap", "s_aux", "position_bias", "cache")
    return not options.get("dropout") and all(options.get(name) is None for name in odd)


def attend_folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Grouped-query attention as matrix products of two dimensions; see :func:`attend`.

    torch multiplies batches of matrices at once only where they lie in one piece; a cache with room
    for more tokens does not, so there it is one product for each key head.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group, before = heads // kv_heads, tokens - queries
    folded = (query * (dim**-0.5 if scaling is None else scaling)).view(
        batch, kv_heads, group, queries, dim
    )
    mixed = query.new_empty(batch, queries, heads, value.shape[3])
    result = mixed.view(batch, queries, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    step = max(BLOCK_ROWS // group, 1)
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        seen = before + stop if mask is None else tokens
        keys, values = key[:, :, :seen], value[:, :, :seen]
        rows = folded[:, :, :, start:stop]
        bias = _bias(mask, start, stop, seen, query)
        if keys.is_contiguous() and values.is_contiguous():
            result[:, :, :, start:stop] = _mix(rows, keys, values, bias)
            continue
        for row in range(batch):
            for head in range(kv_heads):
                one = (slice(row, row + 1), slice(head, head + 1))
                its = bias if bias is None or len(bias) == 1 else bias[row : row + 1]
                out = _mix(rows[one], keys[one], values[one], its)
                result[row, head, :, start:stop] = out[0, 0]
    return mixed


def _mix(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention of a block of queries.

    Args:
        rows: scaled queries ``[batch, kv_heads, group, queries, dim]``.
        keys, values: ``[batch, kv_heads, tokens, dim]``.
        bias: added to the scores of the last tokens, ``[batch or 1, queries, up to tokens]``; what
            all queries of a block see needs none.

    Returns:
        shaped as ``rows``.
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.bmm(rows.reshape(len(keys), -1, rows.shape[-1]), keys.transpose(1, 2))
    if bias is not None:
        scores.view(*rows.shape[:4], -1)[..., -bias.shape[2] :] += bias[:, None, None]
    return torch.bmm(scores.softmax(-1), values).view(*rows.shape[:4], -1)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, few: bool) -> None:
    """Batched ``out = a @ b``.

    Args:
        few: tokens of which there are few, or another number of each time.
    """
    if few and a.shape[1] <= FEW_ROWS:
        out.copy_(torch.bmm(a.float(), b.float()))
    else:
        torch.bmm(a, b, out=out)


def _bias(
    mask: torch.Tensor | None, start: int, stop: int, seen: int, like: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the last columns of a block's scores, ``[batch or 1, queries, columns]``."""
    count = stop - start
    if mask is None:
        if count == 1:
            return None
        return like.new_full((1, count, count), float("-inf")).triu_(1)
    block = mask[:, 0, start:stop, :seen]
    if block.dtype == torch.bool:
        least = torch.finfo(like.dtype).min  # -inf would give no number where nothing is seen
        block = like.new_zeros(block.shape).masked_fill_(~block, least)
    return block.to(like.dtype)


def make_mask(**options: Any) -> torch.Tensor | None:
    """transformers' mask, or None where :func:`attend` needs none and is faster without."""
    queries, tokens = options["q_length"], options["kv_length"]
    window = options.get("local_size")
    plain = options.get("allow_is_causal_skip", True) and options.get("attention_mask") is None
    on_cpu = torch.device(options.get("device", "cpu")).type == "cpu"
    few = on_cpu or tokens <= 2 * queries  # padded queries cost as much as real ones
    if plain and queries > 1 and few and (window is None or tokens < window):
        return None
    mask: torch.Tensor | None = sdpa_mask(**options)
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
