"""Forward passes over a linked context: at its end, or at chosen places in its middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.attention import fast_attention
from kvlink_rag.runners.transformers.context import ContextCache


@torch.inference_mode()
def run_behind(
    model: PreTrainedModel,
    cache: ContextCache,
    token_ids: Sequence[int],
    links: LinkTokens | None = None,
    *,
    fast: bool = True,
    last: int = 1,
) -> torch.Tensor:
    """Run tokens right behind what the cache holds; they see everything before them.

    Needs no mask of ours: the model's own causal (and sliding-window) mask is right, since every
    cached token lies at its position.

    Args:
        links: link tokens that may be among ``token_ids``.
        fast: by our own attention (:func:`fast_attention`); without, by the model's, whose rounding
            makes half-precision answers those of ``model.generate`` to the last token.
        last: of so many tokens the logits are wanted.

    Returns:
        logits of the last token, ``[vocab]`` float32; of several, ``[last, vocab]``.
    """
    start = cache.get_seq_length()
    ids = torch.tensor([list(token_ids)], device=cache.key_buffer.device)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with fast_attention(model) if fast else nullcontext():
        out = model(
            **inputs(model, ids, links),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
    logits: torch.Tensor = out.logits[0, -last:].float()
    return logits[0] if last == 1 else logits


@torch.inference_mode()
def run_at(
    model: PreTrainedModel,
    architecture: Architecture,
    cache: ContextCache,
    token_ids: Sequence[int],
    positions: Sequence[int],
    links: LinkTokens | None = None,
) -> torch.Tensor:
    """Run tokens at given positions of the context, each seeing every position up to its own.

    Their keys and values replace what the cache held there, layer by layer, so that a token sees
    the new keys of the ones before it (EPIC, arXiv 2410.15332; CacheBlend, arXiv 2405.16444).

    Args:
        positions: increasing; the cache ends with the last one afterwards.
        links: link tokens that may be among ``token_ids``.

    Returns:
        logits of the last token, ``[vocab]`` float32.

    Raises:
        UnsupportedModelError: the model's attention implementation takes no mask.
    """
    if not architecture.maskable:
        raise UnsupportedModelError(
            f"{architecture.name} runs with attention {model.config._attn_implementation!r}, which "
            "takes no custom mask: load it with attn_implementation='sdpa' or 'eager' for this "
            "strategy, or use 'reuse'"
        )
    device = cache.key_buffer.device
    where = torch.tensor(list(positions), device=device)
    length = int(positions[-1]) + 1
    cache.set_length(length)
    cache.set_scatter(where)
    masks = _masks(architecture, where, length)
    try:
        with fast_attention(model), _layer_masks(model, masks):
            out = model(
                **inputs(model, torch.tensor([list(token_ids)], device=device), links),
                position_ids=where[None],
                # An empty 4-D mask is passed on untouched by transformers and fits no attention:
                # were a layer to miss its own mask, it would fail instead of seeing too much.
                attention_mask=torch.empty((1, 1, len(positions), 0), device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    finally:
        cache.set_scatter(None)
    logits: torch.Tensor = out.logits[0, -1].float()
    return logits


def inputs(
    model: PreTrainedModel, token_ids: torch.Tensor, links: LinkTokens | None
) -> dict[str, torch.Tensor]:
    """Ids, or embeddings where link tokens of the adapter's own may be among them."""
    if links is None:
        return {"input_ids": token_ids}
    return {"inputs_embeds": links.embed(token_ids, model)}


def _masks(architecture: Architecture, where: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Per layer an additive mask ``[1, 1, tokens, length]``: 0 where a token may look.

    Additive, not boolean: eager attention would silently add a boolean mask as 0 and 1.
    """
    columns = torch.arange(length, device=where.device)
    made: dict[int | None, torch.Tensor] = {}
    for window in set(architecture.windows):
        seen = columns[None] <= where[:, None]
        if window is not None:
            seen &= columns[None] > where[:, None] - window
        mask = torch.zeros(seen.shape, dtype=architecture.dtype, device=where.device)
        mask.masked_fill_(~seen, torch.finfo(architecture.dtype).min)
        made[window] = mask[None, None]
    return [made[window] for window in architecture.windows]


@contextmanager
def _layer_masks(model: PreTrainedModel, masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give each decoder layer its own mask.

    Done by hooks because models differ in what their forward pass accepts: some take a mask for
    each kind of layer, others only one, which would switch off their sliding window.
    """

    def give(mask: torch.Tensor) -> Any:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        return hook

    layers = model.get_decoder().layers
    handles = [
        layer.register_forward_pre_hook(give(mask), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
