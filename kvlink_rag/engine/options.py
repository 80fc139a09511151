"""What an answer takes besides question and chunks: one typed set of options for all that answers.

Given to ``KVLinkEngine.from_pretrained`` they are the defaults of every answer, given to a method
they override them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from typing_extensions import TypedDict

from kvlink_rag.engine.choice import StrategyOption
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.segments import DEFAULT_RECOMPUTE, RecomputeBy
from kvlink_rag.runners.base import GenerateSettings


class AnswerOptions(TypedDict, total=False):
    """Keyword arguments of everything that answers; None is as if it had not been given.

    Attributes:
        strategy: how chunk caches become one context: `recompute`, `reuse`, `full`, or with an
            adapter `link`; `auto` (default) is the cheapest one whose answers are meant to be
            those of full prefill (:mod:`kvlink_rag.engine.choice`); the report says which.
        system: replaces the model's default system prompt; caches stay usable. As a default of the
            engine it yields to a system message.
        tools: JSON schemas of functions that the model may call, if its chat template shows tools
            (``engine.layout.supports_tools``); its calls are part of the text.
        recompute: with `recompute` and `auto`, the share of the chunks' tokens that is computed
            anew, 0 ... 1; 0.15.
        recompute_by: with `recompute`, which: those of all chunks that the `question` (default)
            attends to most, which costs one more forward pass over the question, or the `first` of
            each chunk.
        fidelity_rate: share of the answers, 0 ... 1, chosen at random, that are compared with full
            prefill (:mod:`kvlink_rag.engine.fidelity`): in ``report.fidelity`` and
            ``engine.fidelity_stats``. After the answer, unless there is a limit. Answers with
            strategy `full` or without chunks are never checked. 0.
        fidelity_limit: divergence from full prefill (KL, nats) above which a checked answer is that
            of full prefill instead. The check then comes before the first token.
        fidelity_tokens: how many tokens of a checked answer are compared, if it has as many: full
            prefill reads the answer's own. With a limit they are made before the first is handed
            out. 1.
        max_new_tokens: the most tokens to produce; 64.
        temperature: 0 (default) is greedy; above it, sampling.
        top_p: sample from the smallest set of tokens with this probability (nucleus sampling); 1.
        stop: the answer ends before the first of these strings.
        seed: makes sampling repeatable; None draws a new one.
    """

    strategy: StrategyOption | None
    system: str | None
    tools: Sequence[Mapping[str, Any]] | None
    recompute: float | None
    recompute_by: RecomputeBy | None
    fidelity_rate: float | None
    fidelity_limit: float | None
    fidelity_tokens: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    stop: str | Sequence[str] | None
    seed: int | None


@dataclass(frozen=True)
class Options:
    """:class:`AnswerOptions` with every value, defaults filled in; attributes as there."""

    strategy: StrategyOption = "auto"
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    recompute: float = DEFAULT_RECOMPUTE
    recompute_by: RecomputeBy = "question"
    fidelity_rate: float = 0.0
    fidelity_limit: float | None = None
    fidelity_tokens: int = 1
    settings: GenerateSettings = field(default_factory=GenerateSettings)


_SETTINGS = tuple(each.name for each in fields(GenerateSettings))
_NAMES = (*(each.name for each in fields(Options) if each.name != "settings"), *_SETTINGS)
_OF_THE_STORE = ("budget", "cache_after", "codec", "encryption_key", "ram_bytes", "remote")


def merged(defaults: AnswerOptions, given: AnswerOptions) -> AnswerOptions:
    """Options with defaults where nothing is given.

    Raises:
        InputError: there is no such option.
    """
    for name in given:
        if name in _OF_THE_STORE:
            raise InputError(
                f"{name} is said to the store: store=open_store(folder, {name}=...) "
                "(from kvlink_rag.store import open_store)"
            )
        if name == "recompute_tokens":
            raise InputError(
                "what is computed anew is a share of the chunks' tokens now, not tokens a chunk: "
                "recompute=0.15 for 15 %"
            )
        if name not in _NAMES:
            raise InputError(f"there is no option {name!r}: options are {', '.join(_NAMES)}")
    known = {name: value for name, value in given.items() if value is not None}
    return cast("AnswerOptions", {**defaults, **known})


def filled(options: AnswerOptions) -> Options:
    """Every option; values that have none at its default.

    Raises:
        InputError: a value is out of range.
    """
    values: dict[str, Any] = dict(options)
    settings = {name: values.pop(name) for name in _SETTINGS if name in values}
    return Options(**values, settings=GenerateSettings(**settings))
