"""Attention for forward passes over a cache: the numbers of torch's kernel, by its fast way.

torch's fast causal attention needs as many keys as queries. Chunks that are encoded behind a
prefix have a few more, for which transformers builds a mask, and with a mask come a slower kernel
and repeated key and value heads. A few queries of no account in front make the numbers equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvlink"


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

    Returns:
        ``[batch, queries, heads, value_dim]``, and None for the weights.
    """
    before = key.shape[2] - query.shape[2]
    if attention_mask is None and query.shape[2] > 1 and before > 0:
        # torch aligns the first query with the first key
        query = F.pad(query, (0, 0, before, 0))
        out, _ = sdpa_attention_forward(module, query, key, value, None, **options)
        return out[:, before:], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def make_mask(**options: Any) -> torch.Tensor | None:
    """transformers' mask, or None where :func:`attend` needs none and is faster without."""
    queries, tokens = options["q_length"], options["kv_length"]
    window = options.get("local_size")
    plain = options.get("allow_is_causal_skip", True) and options.get("attention_mask") is None
    if plain and queries > 1 and tokens <= 2 * queries and (window is None or tokens < window):
        return None
    mask: torch.Tensor | None = sdpa_mask(**options)
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
