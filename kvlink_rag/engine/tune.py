"""Which way to answer suits a model and its documents: each one measured against full prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import median

import torch

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.choice import Choice
from kvlink_rag.engine.fidelity import compare
from kvlink_rag.engine.options import AnswerOptions
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.questions import Case, write_cases
from kvlink_rag.engine.report import Report, way_in_words
from kvlink_rag.engine.request import Request, check_logits
from kvlink_rag.engine.trial import Trial
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.segments import Strategy
from kvlink_rag.runners.base import ModelRunner

SHARES = (0.02, 0.04, 0.08, 0.15, 0.3)
"""Of the chunks' tokens, computed anew with `recompute`."""
LEAST_SAME = 0.95
"""Share of tokens whose likeliest is full prefill's, from which on answers are taken for its; as
far as the tokens compared can tell: of 191 such a share is off by 1.6 points, its standard error.
"""
FEW_TOKENS = 100
"""Fewer than so many excuse no more than so many do: little evidence must not let more pass."""
MOST_NATS = 0.025
"""And the most mean divergence from full prefill, a token: it moves at most 11 % of a token's
probability on average (Pinsker's inequality).

Strict, since each way reads full prefill's answer and is led back by it at each token. Of chunks
behind the prefix, the default model's questions to its own index, four chunks each: `reuse` 96 %
of the tokens and 0.036 nats, yet answers of its own that went round in circles; 8 % 96 and 0.020,
15 % 97 and 0.015, 30 % 98 and 0.008. Twenty questions of five sets, ten documents each: `reuse`
85 % and 0.179, 4 % 90 and 0.084, 8 % 93 and 0.061, 15 % 95 and 0.045, 30 % 97 and 0.024; by exact
match over 955 such questions 8 % was 2.4 points below full prefill and 15 % 1.7.
"""


@dataclass(frozen=True)
class TuneSettings:
    """How much is tried.

    Args:
        questions: how many the model writes, where none are given.
        k: how many chunks each of those is answered from.
        tokens: of each answer, to compare.

    Raises:
        InputError: a number is no int >= 1.
    """

    questions: int = 12
    k: int = 4
    tokens: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}: pass how many, an int >= 1")


@dataclass(frozen=True)
class Measured:
    """What was measured of one way to answer.

    Attributes:
        strategy, recompute: the way; the share is 0 but for `recompute`.
        same_tokens: share of the answers' tokens whose likeliest is full prefill's.
        same_first: the same of first tokens.
        same_answers: share of the answers that are full prefill's, as far as they were compared.
        kl_nats: divergence from full prefill, the mean over all tokens (:class:`Fidelity`).
        ttft_s: median time to the first token, wall seconds.
        tokens: how many were compared, one or more.
    """

    strategy: Strategy
    recompute: float
    same_tokens: float
    same_first: float
    same_answers: float
    kl_nats: float
    ttft_s: float
    tokens: int

    @property
    def way(self) -> str:
        """Strategy and share in words."""
        return way_in_words(self.strategy, self.recompute)

    @property
    def is_good(self) -> bool:
        """Whether its answers are taken for full prefill's."""
        error = sqrt(LEAST_SAME * (1 - LEAST_SAME) / max(self.tokens, FEW_TOKENS))
        close = self.kl_nats <= MOST_NATS and self.same_tokens >= LEAST_SAME - error
        return self.strategy == "full" or close


@dataclass(frozen=True)
class Tuning:
    """The quickest way whose answers are full prefill's, and what all were measured as.

    Attributes:
        choice: for ``strategy="auto"``.
        measured: all ways, by the time they take; `full` is among them.
        questions, tokens: how many questions were asked, and how many tokens compared of all
            answers together.
        context_tokens: median length of the prompts.
    """

    choice: Choice
    measured: tuple[Measured, ...]
    questions: int
    tokens: int
    context_tokens: int

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people: a heading, and a row for each way."""
        heading = ("way", "same tokens", "same answers", "nats a token", "first token", "of full")
        full = next(each.ttft_s for each in self.measured if each.strategy == "full")
        return [
            (*heading, ""),
            *(
                (
                    each.way,
                    f"{each.same_tokens:.0%}",
                    f"{each.same_answers:.0%}",
                    f"{each.kl_nats:.4f}",
                    f"{1000 * each.ttft_s:.0f} ms",
                    f"{each.ttft_s / full:.0%}",
                    self._said_of(each),
                )
                for each in self.measured
            ),
        ]

    def _said_of(self, each: Measured) -> str:
        if each.way == self.choice.way:
            return "chosen"
        return "" if each.is_good else "too far off"


def tune(
    pipeline: Pipeline,
    chunks: Sequence[Chunk],
    asked: Sequence[Case],
    options: AnswerOptions,
    settings: TuneSettings,
    progress: bool = True,
) -> Tuning:
    """Measure each way that the runner has with questions and their chunks.

    Args:
        chunks: to write questions about, where none are ``asked``.
        options: the engine's; strategy and share do not count.

    Raises:
        InputError: there are neither chunks nor questions, or one cannot be asked.
        UnsupportedModelError: the runner shows no logits.
    """
    pipeline.runner.check_unchanged()
    check_logits(pipeline.runner, "tune")
    cases = asked or write_cases(
        pipeline, chunks, settings.questions, settings.k, progress=progress
    )
    if not cases:
        raise InputError("there is nothing to tune by: pass chunks, or questions with theirs")
    ways = _ways(pipeline.runner)
    found = {way: _Sum() for way in ways}
    full = _Sum()
    with bar("Trying each way", len(cases), enabled=progress) as done:
        for number, case in enumerate(cases):
            requests = {way: _request(pipeline, case, way, options) for way in ways}
            trial = _trial(pipeline, list(requests.values()), settings.tokens, warm=number == 0)
            full.add(trial, trial.logits, trial.report)
            turn = number % len(ways)  # nobody is always behind the same one
            for way in ways[turn:] + ways[:turn]:
                found[way].add(trial, *trial.read(requests[way]))
            done(number + 1)
    measured = [its.measured(*way) for way, its in found.items()]
    measured = sorted([*measured, full.measured("full", 0.0)], key=lambda each: each.ttft_s)
    return Tuning(
        best_of(measured, len(cases)), tuple(measured), len(cases), full.tokens,
        int(median(full.context_tokens)),
    )  # fmt: skip


def _ways(runner: ModelRunner) -> list[tuple[Strategy, float]]:
    """Strategies and shares that a runner can be asked for, `full` aside."""
    strategies = runner.abilities.strategies
    if runner.adapter is None or runner.adapter.links is None:
        strategies -= {"link"}
    ways: list[tuple[Strategy, float]] = [("reuse", 0.0), ("link", 0.0)]
    ways += [("recompute", share) for share in SHARES]
    return [(strategy, share) for strategy, share in ways if strategy in strategies]


def _request(
    pipeline: Pipeline, case: Case, way: tuple[Strategy, float], options: AnswerOptions
) -> Request:
    given: AnswerOptions = {"strategy": way[0], "recompute": way[1]}
    return Request.of(*case, given, options, pipeline.runner)


def _trial(pipeline: Pipeline, requests: Sequence[Request], tokens: int, *, warm: bool) -> Trial:
    """Full prefill's answer, after everything is stored and, if asked for, ran once."""
    trial = Trial(pipeline, requests[0], tokens)
    for request in requests if warm else requests[:1]:
        trial.read(request)
    return Trial(pipeline, requests[0], tokens) if warm else trial


def best_of(measured: Sequence[Measured], questions: int) -> Choice:
    """The quickest of the good ones, and why.

    Args:
        measured: by the time they take; `full` is among them.
    """
    best = next(each for each in measured if each.is_good)
    full = next(each.ttft_s for each in measured if each.strategy == "full")
    asked = f"tuned by {questions} question{'' if questions == 1 else 's'}"
    its = f"{best.same_tokens:.0%} of its tokens are full prefill's, {best.kl_nats:.3f} nats apart"
    if best.strategy != "full":
        why = f"{asked}: {its}, in {best.ttft_s / full:.0%} of its time"
    elif any(each.is_good for each in measured if each.strategy != "full"):
        why = f"{asked}: nothing as good is quicker here"
    else:
        next_best = min(measured, key=lambda each: (each.strategy == "full", each.kl_nats))
        why = (
            f"{asked}: caches are bad for this model; even by {next_best.way} only "
            f"{next_best.same_tokens:.0%} of the tokens are full prefill's "
            f"({next_best.kl_nats:.3f} nats apart)"
        )
    return Choice(best.strategy, why, best.recompute)


class _Sum:
    """What is added up of one way."""

    def __init__(self) -> None:
        self.tokens = self._same = self._first = self._answers = 0
        self._kl = 0.0
        self._times: list[float] = []
        self.context_tokens: list[int] = []

    def add(self, trial: Trial, logits: torch.Tensor, report: Report) -> None:
        """One answer more, as this way would choose it."""
        found = compare(trial.logits, logits)
        self.tokens += found.tokens
        self._same += found.tokens - found.other_tokens
        self._first += bool(trial.logits[0].argmax() == logits[0].argmax())
        self._answers += found.same_token
        self._kl += found.kl_nats * found.tokens
        self._times.append(report.ttft_s)
        self.context_tokens.append(report.context_tokens)

    def measured(self, strategy: Strategy, recompute: float) -> Measured:
        """The means, and the median time."""
        asked, tokens = len(self._times), self.tokens
        return Measured(
            strategy, recompute, self._same / tokens, self._first / asked, self._answers / asked,
            self._kl / tokens, median(self._times), tokens,
        )  # fmt: skip
