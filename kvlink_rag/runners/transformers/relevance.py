"""Which tokens of a context matter to a question: those that it attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.runners.transformers.attention import use_attention
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.forward import run_behind

MEASURED = (1 / 4, 2 / 3)
"""Which part of the layers is measured. ProphetKV takes all (arXiv 2602.02579); those in front and
behind add time, and nothing to the choice (docs/research.md). Single ones are poor at some depths,
and not at the same ones in each model (CLAA, arXiv 2602.16054)."""


class Measured(Exception):
    """Raised within a forward pass when all has been seen that it was run for."""


def measured(layers: int) -> range:
    """Which of a model's layers are measured."""
    first, stop = (round(share * layers) for share in MEASURED)
    return range(first, max(stop, first + 1))


@torch.inference_mode()
def attention_paid(
    model: PreTrainedModel, cache: ContextCache, token_ids: Sequence[int]
) -> torch.Tensor:
    """How much attention a question pays to each token of the context in a cache.

    The question is run once behind the context; softmax weights are summed over its tokens, the
    heads and the layers of :func:`measured`.

    Hold the model's lock, and give it an attention that takes a mask.

    Args:
        cache: holds the context, and nothing else afterwards.
        token_ids: the question.

    Returns:
        ``[context]`` float32.

    Raises:
        UnsupportedModelError: a layer of the model does not give its attention weights.
    """
    context, layers = cache.get_seq_length(), measured(len(model.get_decoder().layers))
    paid = torch.zeros(context, device=cache.key_buffer.device)
    seen = 0

    def add(weights: torch.Tensor) -> None:
        """Add one layer's weights ``[1, heads, question, context + question]``."""
        nonlocal seen
        paid.add_(weights[0, :, :, :context].sum((0, 1), dtype=torch.float32))
        seen += 1
        if seen == len(layers):
            raise Measured

    # The model's own eager attention gives weights, with whatever it has of windows, soft caps and
    # shared heads; they are added up layer by layer, so that one layer's are in memory at a time.
    try:
        with use_attention(model, "eager"), _watch_weights(model, layers, add), suppress(Measured):
            run_behind(model, cache, token_ids)
    finally:
        cache.set_length(context)
    if seen != len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} gave attention weights in {seen} of the layers "
            f"{layers.start} to {layers.stop - 1}, and recompute_by='question' needs them: use "
            "recompute_by='first'"
        )
    return paid


@contextmanager
def _watch_weights(
    model: PreTrainedModel, layers: range, see: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Show ``see`` the attention weights of some layers as their attention returns them."""

    def hook(_: Any, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1:
            weights = output[1]
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                see(weights)

    # Models name their attention differently; it is that part of a layer which returns weights.
    handles = [
        part.register_forward_hook(hook)
        for layer in model.get_decoder().layers[layers.start : layers.stop]
        for part in layer.children()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
