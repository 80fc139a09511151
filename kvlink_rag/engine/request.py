"""What an engine is asked, and whether it can be asked that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from kvlink_rag.adapters.adapter import Adapter, shipped_adapters
from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.prefill import RecomputeBy, Strategy
from kvlink_rag.errors import AdapterRequiredError, InputError
from kvlink_rag.prompt.conversation import Message


@dataclass(frozen=True)
class Request:
    """What was asked, checked."""

    messages: list[Message]
    chunks: list[Chunk]
    strategy: Strategy
    recompute: int
    recompute_by: RecomputeBy = "first"
    tools: Sequence[Mapping[str, Any]] = ()


def check_strategy(strategy: str, adapter: Adapter | None) -> Strategy:
    """The strategy, which an engine with this adapter has.

    Raises:
        InputError: there is no such strategy.
        AdapterRequiredError: it is `link`, and there are no link tokens.
    """
    if strategy == "link" and (adapter is None or adapter.links is None):
        raise AdapterRequiredError(
            "strategy 'link' needs an adapter with trained link tokens, and the engine has none: "
            f"give adapter= one of {', '.join(shipped_adapters()) or 'your own'} or a folder made "
            "by kvlink train, or use 'reuse' or 'recompute'"
        )
    if strategy not in get_args(Strategy):
        raise InputError(f"strategy must be one of {get_args(Strategy)}, not {strategy!r}")
    return cast("Strategy", strategy)


def check_recompute_by(by: str) -> RecomputeBy:
    """What `recompute` chooses tokens by.

    Raises:
        InputError: there is no such choice.
    """
    if by not in get_args(RecomputeBy):
        raise InputError(f"recompute_by must be one of {get_args(RecomputeBy)}, not {by!r}")
    return cast("RecomputeBy", by)
