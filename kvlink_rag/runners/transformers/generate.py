"""From a prefilled cache to text: choosing tokens, and turning them into text piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from kvlink_rag.errors import InputError


@dataclass(frozen=True)
class GenerateSettings:
    """How an answer is decoded.

    Args:
        max_new_tokens: the most tokens to produce.
        temperature: 0 is greedy; above it, sampling.
        top_p: sample from the smallest set of tokens with this probability (nucleus sampling).
        stop: the answer ends before the first of these strings.
        seed: makes sampling repeatable; None draws a new one.

    Raises:
        InputError: naming the value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if "" in self.stops:
            raise InputError("a stop string must not be empty")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> GenerateSettings:
        """These settings by name, the others at their defaults.

        Raises:
            InputError: there is no such setting, or a value is out of range.
        """
        try:
            return cls(**settings)
        except TypeError as error:
            names = ", ".join(cls.__dataclass_fields__)
            raise InputError(f"{str(error).split('() ')[-1]}: settings are {names}") from error

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


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


class TextStream:
    """Tokens in, text pieces out; holds back what may yet become a stop string or a character.

    Args:
        tokenizer: special tokens are left out of the text.
        stops: the text ends before the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token (may be empty)."""
        self._ids.append(token_id)
        self.text = self._decode()
        found = [place for place in map(self.text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
            return self._take(len(self.text))
        if self.text.endswith("\ufffd"):  # in the middle of a character
            return ""
        return self._take(len(self.text) - self._held())

    def finish(self) -> str:
        """What was held back."""
        return self._take(len(self.text))

    def _decode(self) -> str:
        return str(
            self._tokenizer.decode(
                self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return min(length, len(self.text))
        return 0

    def _take(self, stop: int) -> str:
        piece, self._sent = self.text[self._sent : stop], max(self._sent, stop)
        return piece
