"""Choosing the next token from logits."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from kvlink_rag.runners.base import GenerateSettings


class Sampler:
    """Chooses the next token from logits."""

    def __init__(self, settings: GenerateSettings, device: torch.device) -> None:
        self._warpers: LogitsProcessorList | None = None
        if settings.temperature > 0:
            self._warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(settings.temperature), TopPLogitsWarper(settings.top_p)]
            )
            self._generator = torch.Generator(device)
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token for ``logits [vocab]``."""
        if self._warpers is None:
            return int(logits.argmax())
        rows = logits[None].float()
        no_tokens = cast("torch.LongTensor", torch.empty((1, 0), dtype=torch.long))
        warped = self._warpers(no_tokens, cast("torch.FloatTensor", rows))
        return int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, else the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
