"""What `auto` comes to: the cheapest way whose answers are meant to be those of full prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvlink_rag.prompt.segments import Strategy
from kvlink_rag.runners.base import ModelRunner

StrategyOption = Literal["auto", "full", "reuse", "link", "recompute"]
"""What can be asked for: a strategy, or the choice of one."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and how it came to be.

    Attributes:
        why: a sentence for people.
    """

    strategy: Strategy
    why: str


def choose(runner: ModelRunner) -> Choice:
    """The strategy of `auto` for a model.

    Plain `reuse` answers worse than full prefill unless the model itself was trained for it, and a
    cache-preserving adapter restores a part only; `recompute` by question comes nearer for both
    (docs/accuracy.md has how near, as far as it was measured).
    """
    adapter, strategies = runner.adapter, runner.abilities.strategies
    if adapter is not None and adapter.kind == "whole-model" and "reuse" in strategies:
        return Choice("reuse", f"the weights of {adapter.name} were trained for chunks read apart")
    if "recompute" in strategies:
        return Choice("recompute", "plain reuse answers worse than full prefill")
    return Choice(
        "full",
        f"{runner.name} can compute no part of a chunk anew here, and plain reuse answers worse",
    )
