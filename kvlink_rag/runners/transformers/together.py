"""Forward passes over several linked contexts at once, each token attending to its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.attention import is_plain, use_attention
from kvlink_rag.runners.transformers.context import new_cache
from kvlink_rag.runners.transformers.forward import inputs
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.relevance import Measured, measured
from kvlink_rag.runners.transformers.scratch import Scratch

NAME = "kvlink_in_place"


@dataclass(frozen=True, eq=False)
class Tokens:
    """New tokens of one context.

    Args:
        token_ids, positions: of the tokens; positions are increasing, and none of them is taken.
    """

    context: LinkedContext
    token_ids: Sequence[int]
    positions: Sequence[int]


@torch.inference_mode()
def run_together(
    model: PreTrainedModel,
    parts: Sequence[Tokens],
    links: LinkTokens | None = None,
    *,
    every: bool = False,
) -> torch.Tensor:
    """Run new tokens of several contexts in one forward pass, and keep them in their contexts.

    Each token sees every token of its context at a position up to its own. All go through the
    linear layers as one sequence: a forward pass over few tokens costs what reading the weights
    costs.

    Args:
        model: hold its lock.
        links: link tokens that may be among the tokens.
        every: of all tokens the logits are wanted.

    Returns:
        logits of each context's last token, ``[contexts, vocab]`` float32; of all, ``[tokens,
        vocab]``.
    """
    token_ids = [token for part in parts for token in part.token_ids]
    positions = [position for part in parts for position in part.positions]
    last = torch.tensor([len(part.token_ids) for part in parts]).cumsum(0) - 1
    for part in parts:
        part.context.expect(part.positions)
    with use_attention(model, NAME), _running(parts):
        out = model(
            **inputs(model, torch.tensor([token_ids]), links),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=0 if every else last,
        )
    logits: torch.Tensor = out.logits[0].float()
    return logits


def paid_together(model: PreTrainedModel, parts: Sequence[Tokens]) -> list[torch.Tensor]:
    """How much attention tokens behind all spans pay to what the spans hold.

    They are run as :func:`run_together` does, through the layers that are measured, and forgotten
    again.

    Returns:
        for each context softmax weights, summed over the tokens, the heads and the layers that
        count (:func:`measured`), ``[positions]`` float32.
    """
    contexts = [part.context for part in parts]
    layers = measured(contexts[0].architecture.layers)
    paid = [torch.zeros(layers.stop, its.stop) for its in contexts]
    try:
        for context, amounts in zip(contexts, paid, strict=True):
            context.paid = amounts
        with suppress(Measured):
            run_together(model, parts)
    finally:
        for context in contexts:
            context.paid = None
            context.forget()
    return [amounts[layers.start :].sum(0) for amounts in paid]


@torch.inference_mode()
def serves(model: PreTrainedModel, architecture: Architecture) -> bool:
    """Whether a model's attention is what is computed here: measured on a few tokens."""
    if not architecture.foldable:
        return False
    token_ids = list(range(1, 6))
    own = new_cache(architecture, len(token_ids))
    try:
        context = LinkedContext(architecture, [], own, Scratch())
        found = run_together(model, [Tokens(context, token_ids, range(5))])[0]
    except UnsupportedModelError:
        return False
    expected = model(input_ids=torch.tensor([token_ids]), logits_to_keep=1).logits[0, -1].float()
    tolerance = 1e-3 if architecture.dtype == torch.float32 else 0.1
    return bool((found - expected).norm() <= tolerance * expected.norm())


_RUNNING: ContextVar[Sequence[Tokens]] = ContextVar("running")


@contextmanager
def _running(parts: Sequence[Tokens]) -> Iterator[None]:
    token = _RUNNING.set(parts)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: attention of the running tokens, context by context.

    Args:
        query: ``[1, heads, tokens, head_dim]``; ``key`` and ``value`` alike with ``kv_heads``.

    Returns:
        ``[1, tokens, heads, value_dim]``, and None for the weights.

    Raises:
        UnsupportedModelError: the model's scores are changed on their way.
        Measured: no context waits for what another layer pays.
    """
    if not is_plain(options):
        raise UnsupportedModelError(f"{type(module).__name__} is no plain attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, start, mixed = int(module.layer_idx), 0, []  # type: ignore[arg-type]
    for part in _RUNNING.get():
        mine = slice(start, start + len(part.token_ids))
        mixed.append(
            part.context.attend(layer, query[:, :, mine], key[:, :, mine], value[:, :, mine], scale)
        )
        start = mine.stop
    counted = [part.context.paid for part in _RUNNING.get()]
    if all(paid is not None and len(paid) == layer + 1 for paid in counted):
        raise Measured
    return torch.cat(mixed)[None], None


def _no_mask(**_: Any) -> None:
    """Who sees whom is the contexts' business."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
