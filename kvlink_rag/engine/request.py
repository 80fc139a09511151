"""What an engine is asked, and whether it can be asked that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from kvlink_rag.adapters.load import shipped_adapters
from kvlink_rag.chunk import Chunk, as_chunks
from kvlink_rag.engine.choice import Choice, StrategyOption
from kvlink_rag.engine.fidelity import check_limit, check_rate, check_tokens
from kvlink_rag.engine.options import AnswerOptions, filled, merged
from kvlink_rag.engine.report import Report
from kvlink_rag.errors import AdapterRequiredError, InputError, UnsupportedModelError
from kvlink_rag.prompt.conversation import Message, as_messages
from kvlink_rag.prompt.segments import RecomputeBy, Strategy
from kvlink_rag.runners.base import GenerateSettings, ModelRunner


@dataclass(frozen=True)
class Request:
    """What was asked, checked. Options are those of :class:`AnswerOptions`.

    Attributes:
        asked: the strategy that was asked for; ``strategy`` is the one that it comes to.
        why: the reason, where that was chosen.
    """

    messages: list[Message]
    chunks: list[Chunk]
    asked: StrategyOption
    strategy: Strategy
    why: str
    recompute: float
    recompute_by: RecomputeBy
    tools: Sequence[Mapping[str, Any]]
    fidelity_rate: float
    fidelity_limit: float | None
    fidelity_tokens: int
    settings: GenerateSettings

    @classmethod
    def of(
        cls,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        given: AnswerOptions,
        defaults: AnswerOptions,
        runner: ModelRunner,
        auto: Choice | None = None,
    ) -> Request:
        """A question with its chunks and options.

        Args:
            given: options of this one; ``defaults`` are the engine's.
            auto: what that strategy comes to, where it may be asked for. A share that is given
                goes before its.

        Raises:
            InputError: question, chunks or an option have no meaning.
            AdapterRequiredError, UnsupportedModelError: the strategy cannot be had.
        """
        known = merged(defaults, given)
        options = filled(known)
        choice = _chosen(options.strategy, runner, auto)
        share = options.recompute if "recompute" in known else choice.recompute
        return cls(
            messages=_messages(question, given.get("system"), defaults.get("system")),
            chunks=as_chunks(chunks),
            asked=options.strategy,
            strategy=choice.strategy,
            why=choice.why,
            recompute=check_recompute(share),
            recompute_by=check_recompute_by(options.recompute_by),
            tools=options.tools,
            fidelity_rate=check_rate(options.fidelity_rate),
            fidelity_limit=check_limit(options.fidelity_limit),
            fidelity_tokens=check_tokens(options.fidelity_tokens),
            settings=options.settings,
        )

    def report(self, **values: Any) -> Report:
        """A report of its answer, with what is known before."""
        share = self.recompute if self.strategy == "recompute" else 0.0
        return Report(self.strategy, asked=self.asked, recompute=share, why=self.why, **values)


def check_options(options: AnswerOptions, runner: ModelRunner) -> AnswerOptions:
    """Options that an engine is to have as its defaults.

    Raises:
        as :meth:`Request.of`.
    """
    Request.of("any question", (), options, {}, runner, Choice("full", "it can always be had"))
    return merged({}, options)


def _messages(
    question: str | Sequence[Message], system: str | None, default: str | None
) -> list[Message]:
    """The conversation; a default system prompt yields to a message."""
    messages = as_messages(question, system)
    if system is None and default is not None and messages[0]["role"] != "system":
        return as_messages(messages, default)
    return messages


def _chosen(asked: str, runner: ModelRunner, auto: Choice | None) -> Choice:
    if asked == "auto" and auto is not None:
        return auto
    return Choice(check_strategy(asked, runner), "")


def check_strategy(strategy: str, runner: ModelRunner) -> Strategy:
    """The strategy, which a runner has.

    Raises:
        InputError: there is no such strategy.
        AdapterRequiredError: it is `link`, and there are no link tokens.
        UnsupportedModelError: the runner does not have it.
    """
    if strategy == "link" and (runner.adapter is None or runner.adapter.links is None):
        raise AdapterRequiredError(
            "strategy 'link' needs an adapter with trained link tokens, and the engine has none: "
            f"give adapter= one of {', '.join(shipped_adapters()) or 'your own'} or a folder made "
            "by kvlink train, or use 'reuse' or 'recompute'"
        )
    if strategy not in get_args(Strategy):
        raise InputError(f"strategy must be one of {get_args(StrategyOption)}, not {strategy!r}")
    if strategy not in runner.abilities.strategies:
        raise UnsupportedModelError(
            f"{runner.name} cannot be run with strategy {strategy!r} here: use one of "
            f"{', '.join(sorted(runner.abilities.strategies))}. (A model of transformers has them "
            "all if it is loaded with attn_implementation='sdpa' or 'eager'.)"
        )
    return strategy


def check_logits(runner: ModelRunner, what: str) -> None:
    """Refuse what needs the first token's distribution where a runner does not show it.

    Raises:
        UnsupportedModelError: it does not.
    """
    if not runner.abilities.logits:
        raise UnsupportedModelError(
            f"{what} needs the logits of the first token, and what runs {runner.name} shows none: "
            "use engine.answer or engine.stream, or run the model with transformers"
        )


def check_recompute(share: float) -> float:
    """The share of the chunks' tokens that `recompute` computes anew.

    Raises:
        InputError: it is none.
    """
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise InputError(
            "recompute is the share of the chunks' tokens that is computed anew, from 0 to 1 "
            f"(0.15 is 15 %), not {share!r}"
        )
    return float(share)


def check_recompute_by(by: str) -> RecomputeBy:
    """What `recompute` chooses tokens by.

    Raises:
        InputError: there is no such choice.
    """
    if by not in get_args(RecomputeBy):
        raise InputError(f"recompute_by must be one of {get_args(RecomputeBy)}, not {by!r}")
    return cast("RecomputeBy", by)
