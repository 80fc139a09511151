"""A prompt whose context is in a cache: what it consists of, and the logits behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlink_rag.engine.report import Report
from kvlink_rag.prompt.segments import Segment

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvlink_rag.adapters.links import LinkTokens
    from kvlink_rag.runners.transformers.context import ContextCache
    from kvlink_rag.runners.transformers.in_place import LinkedContext


@dataclass(eq=False)
class Prefill:
    """The state right before the first answer token.

    Attributes:
        logits: ``[vocab]`` float32, for the first answer token.
        token_ids: the whole prompt.
        positions: of each token, ``0 ... len(token_ids) - 1``.
        segments: the parts of ``token_ids``, in order.
        report: what it cost; ``ttft_s`` here ends with the logits.
        state: what the runner keeps of it. All below is of that of transformers
            (:class:`kvlink_rag.runners.transformers.state.PromptState`).
    """

    logits: torch.Tensor
    token_ids: list[int]
    positions: list[int]
    segments: list[Segment]
    report: Report
    state: Any

    @property
    def context(self) -> ContextCache | LinkedContext:
        """Keys and values of the whole prompt, as they are kept."""
        context: ContextCache | LinkedContext = self.state.context
        return context

    @property
    def cache(self) -> ContextCache:
        """Keys and values of the whole prompt as a transformers ``Cache``.

        It can be given to ``model.generate(past_key_values=...)``, which then owns it. Chunks that
        were attended where they lie are copied into it when it is first asked for.
        """
        cache: ContextCache = self.state.cache
        return cache

    @property
    def model(self) -> PreTrainedModel:
        """What link tokens and question ran through, and the answer runs through."""
        model: PreTrainedModel = self.state.model
        return model

    @property
    def links(self) -> LinkTokens | None:
        """The link tokens among ``token_ids``, whose ids are at or above the vocabulary's size
        unless they are part of it."""
        links: LinkTokens | None = self.state.links
        return links

    def run(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run more tokens behind the prompt; nobody else may run the model meanwhile.

        Returns:
            logits of the last token, ``[vocab]`` float32.
        """
        logits: torch.Tensor = self.state.run(token_ids)
        return logits

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings of tokens, ``[tokens, hidden]``, as the model was given them."""
        embedded: torch.Tensor = self.state.embed(token_ids)
        return embedded
