"""Greedy decoding of many answers at once, each from a cache of its own.

A forward pass for one token costs about as much as one for ten: most of it is reading the weights.
So the rows of a batch share the linear layers, while attention goes from row to row over that row's
own cache. Contexts are neither padded nor copied, and rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvlink_rag.errors import InputError, UnsupportedModelError
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.context import ContextCache

NAME = "kvlink_rows"

_ROWS: ContextVar[tuple[Architecture, Sequence[ContextCache]]] = ContextVar("rows")


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    architecture: Architecture,
    caches: Sequence[ContextCache],
    first: Sequence[int],
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Answers as token ids, an end token included when the model produced one.

    Args:
        model: what the answers run through.
        caches: of each row everything up to the end of the prompt, with room for the answer.
        first: the first token of each answer.

    Raises:
        InputError: a cache has no room for the answer.
    """
    for cache in caches:
        used = cache.get_seq_length()
        if cache.capacity < used + max_new_tokens - 1:
            raise InputError(
                f"a cache of {cache.capacity} tokens, {used} used, has too little room"
            )
        cache.value_buffer[:, :, :, used:] = 0  # counts nothing there, but must be a number
    answers = [[token] for token in first]
    while going := [
        row
        for row, answer in enumerate(answers)
        if answer[-1] not in stop_ids and len(answer) < max_new_tokens
    ]:
        last = torch.tensor([[answers[row][-1]] for row in going], device=architecture.device)
        with _rows(model, architecture, [caches[row] for row in going]) as positions:
            logits = model(input_ids=last, position_ids=positions, use_cache=False).logits
        for row, token in zip(going, logits[:, -1].float().argmax(-1).tolist(), strict=True):
            answers[row].append(token)
    return answers


@contextmanager
def _rows(
    model: PreTrainedModel, architecture: Architecture, caches: Sequence[ContextCache]
) -> Iterator[torch.Tensor]:
    """Let a model attend row by row; yields the rows' next positions ``[rows, 1]``."""
    config = model.get_decoder().config
    before, config._attn_implementation = config._attn_implementation, NAME
    token = _ROWS.set((architecture, caches))
    lengths = [[cache.get_seq_length()] for cache in caches]
    try:
        yield torch.tensor(lengths, device=architecture.device)
    finally:
        _ROWS.reset(token)
        config._attn_implementation = before


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention of one token a row; its key and value go to the row's cache.

    Goes over all of a cache's buffer, with what is not filled left out afterwards: on CPU, matrix
    products copy what does not lie in one piece.

    Args:
        query: ``[rows, heads, 1, head_dim]``; ``key`` and ``value`` alike with ``kv_heads``.

    Returns:
        ``[rows, 1, heads, value_dim]``, and None for the weights.
    """
    if s_aux is not None:
        raise UnsupportedModelError("models with attention sinks cannot be evaluated in batches")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    architecture, caches = _ROWS.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    window, mixed = architecture.windows[layer], []
    for row, cache in enumerate(caches):
        cache.update(key[row : row + 1], value[row : row + 1], layer)
        tokens = cache.get_seq_length(layer)
        keys, values = cache.key_buffer[layer, 0], cache.value_buffer[layer, 0]
        folded = (query[row] * scale).reshape(keys.shape[0], -1, query.shape[3])
        scores = torch.bmm(folded, keys.transpose(1, 2))  # [kv_heads, heads a group, capacity]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores[..., tokens:] = float("-inf")
        if window is not None and tokens > window:
            scores[..., : tokens - window] = float("-inf")
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        mixed.append(torch.bmm(weights, values).flatten(0, 1))
    return torch.stack(mixed)[:, None], None


def _no_mask(**_: Any) -> None:
    """Each row sees all of its cache."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
