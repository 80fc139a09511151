"""A prompt that was read: its context, and more tokens behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.forward import run_behind
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.step import Step
from kvlink_rag.runners.transformers.together import Tokens, run_together


@dataclass(eq=False)
class PromptState:
    """The state right before the first answer token, or behind any later one.

    Attributes:
        context: keys and values of the whole prompt.
        model: what link tokens and question ran through, and the answer runs through: the base
            model, with the LoRA of a cache-preserving adapter.
        links: the link tokens of the prompt, whose ids are at or above the vocabulary's size unless
            they are part of it.
        fast: whether it goes on by :mod:`kvlink_rag.runners.transformers.attention`.
        stepped: whether it goes on token by token by :mod:`kvlink_rag.runners.transformers.step`,
            where chunks are attended where they lie.
    """

    context: ContextCache | LinkedContext
    model: PreTrainedModel
    links: LinkTokens | None
    fast: bool
    stepped: bool = False

    @cached_property
    def _step(self) -> Step | None:
        if not self.stepped:
            return None
        try:
            return Step(self.model)
        except UnsupportedModelError:  # somebody has put a hook or an adapter into it since
            return None

    @property
    def cache(self) -> ContextCache:
        """Keys and values of the whole prompt as a transformers ``Cache``.

        It can be given to ``model.generate(past_key_values=...)``, which then owns it. Chunks that
        were attended where they lie are copied into it when it is first asked for.
        """
        if isinstance(self.context, LinkedContext):
            self.context = self.context.copied()
        return self.context

    def run(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run more tokens behind the prompt; hold the model's lock.

        Returns:
            logits of the last token, ``[vocab]`` float32.
        """
        if isinstance(self.context, LinkedContext):
            if len(token_ids) == 1 and self._step is not None:
                logits = self._step.run(self.context, token_ids[0])
                if logits is not None:
                    return logits
            start = self.context.stop
            places = range(start, start + len(token_ids))
            return run_together(self.model, [Tokens(self.context, token_ids, places)])[0]
        return run_behind(self.model, self.context, token_ids, fast=self.fast)

    def look_ahead(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens behind the prompt, and forget them again; hold the model's lock.

        Returns:
            logits behind each of them, ``[tokens, vocab]`` float32.
        """
        count, context = len(token_ids), self.context
        if isinstance(context, LinkedContext):
            known, start = len(context.positions), context.stop
            parts = [Tokens(context, token_ids, range(start, start + count))]
            logits = run_together(self.model, parts, every=True)
            context.forget(known)
            return logits
        known = context.get_seq_length()
        logits = run_behind(self.model, context, token_ids, fast=self.fast, last=count)
        context.set_length(known)
        return logits.view(count, -1)

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings of tokens, ``[tokens, hidden]``, as the model was given them."""
        ids = torch.tensor(list(token_ids), device=self.model.device)
        with torch.inference_mode():
            if self.links is not None:
                return self.links.embed(ids, self.model)
            embedded: torch.Tensor = self.model.get_input_embeddings()(ids)
        return embedded
