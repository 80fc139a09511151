"""Who sees what, where chunk caches are attended where they lie: by blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvlink_rag.chunk import ChunkKV

BLOCK_QUERIES = 64
"""Queries that attention is computed for at once: their scores stay in the processor's cache."""
LEAST_QUERIES = 12
"""Below, another block costs more than it saves."""


@dataclass(frozen=True, eq=False)
class Span:
    """A chunk cache that a prompt reads.

    Args:
        record: keys and values; nothing changes them.
        start: position of the first token in the prompt.
    """

    record: ChunkKV
    start: int

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + len(self.record.token_ids)

    @property
    def shift(self) -> int:
        """How far the keys would have to move."""
        return self.start - self.record.position


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring queries that attention is computed for at once.

    Attributes:
        queries: which of the forward pass.
        seen: indices of spans that some of them see, and what is added to the scores
            (``[queries or 1, tokens]``), or None where each sees all.
        own: the same for the tokens that the prompt adds.
    """

    queries: slice
    seen: list[tuple[int, torch.Tensor | None]]
    own: torch.Tensor | None

    @cached_property
    def indices(self) -> torch.Tensor:
        """Of the spans seen."""
        return torch.tensor([index for index, _ in self.seen])


class Visibility:
    """What the tokens of a prompt see of its spans, and of each other.

    Args:
        spans: prefix and chunks, in any order.
        dtype: of scores.
    """

    def __init__(self, spans: Sequence[Span], dtype: torch.dtype) -> None:
        self._spans, self._dtype = spans, dtype
        self._hidden: dict[int, torch.Tensor] = {}  # by span, what is added to its scores
        self._gone: set[int] = set()  # spans of which nothing is seen

    def hide(self, positions: Sequence[int]) -> None:
        """Let nobody see what spans hold at these positions."""
        where = torch.tensor(positions, dtype=torch.long)
        for index, span in enumerate(self._spans):
            inside = where[(where >= span.start) & (where < span.stop)] - span.start
            if len(inside) == span.stop - span.start:
                self._gone.add(index)
            elif len(inside):
                hidden = torch.zeros(1, span.stop - span.start, dtype=self._dtype)
                self._hidden[index] = hidden.index_fill_(1, inside, float("-inf"))

    def blocks(
        self, positions: Sequence[int], own: Sequence[int], window: int | None
    ) -> Iterator[Block]:
        """Queries at these positions in layers with this window.

        Args:
            positions: increasing.
            own: positions of the tokens that the prompt adds, the queries among them; increasing.
        """
        for queries in _cut(positions):
            at = positions[queries]
            seen = []
            for index, span in enumerate(self._spans):
                if index not in self._gone and _sees_some(at, span.start, span.stop, window):
                    bias = bias_of(at, range(span.start, span.stop), window, self._dtype)
                    if (hidden := self._hidden.get(index)) is not None:
                        bias = hidden if bias is None else bias + hidden
                    seen.append((index, bias))
            yield Block(queries, seen, bias_of(at, own, window, self._dtype))


def _cut(positions: Sequence[int]) -> Iterator[slice]:
    """Blocks of queries; link tokens of different slots apart, since the first see few chunks."""
    start = 0
    for stop in range(1, len(positions) + 1):
        last = stop == len(positions)
        gap = not last and positions[stop] != positions[stop - 1] + 1
        if last or stop - start == BLOCK_QUERIES or (gap and stop - start >= LEAST_QUERIES):
            yield slice(start, stop)
            start = stop


def _sees_some(at: Sequence[int], start: int, stop: int, window: int | None) -> bool:
    """Whether one of the positions ``at`` (increasing) sees one of ``start ... stop - 1``."""
    return start <= at[-1] and (window is None or at[0] - (stop - 1) < window)


def bias_of(
    at: Sequence[int], keys: Sequence[int], window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """``[queries, keys]``: 0 where a position sees another, else -inf; None if each sees all."""
    if keys[-1] <= at[0] and (window is None or at[-1] - keys[0] < window):
        return None
    distance = torch.tensor(at)[:, None] - torch.tensor(keys)[None]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
