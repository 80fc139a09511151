"""A prompt as tokens: which parts come from caches, which are computed, and who sees what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Strategy = Literal["full", "reuse", "link", "recompute"]
"""How chunk caches become one context."""

RecomputeBy = Literal["first", "question"]
"""Which tokens `recompute` computes anew: the first of each chunk (EPIC, arXiv 2410.15332), or
those of all chunks that the question attends to most (ProphetKV, arXiv 2602.02579)."""

DEFAULT_RECOMPUTE = 0.15
"""Share of the chunks' tokens that `recompute` computes anew unless told otherwise."""

SegmentKind = Literal["prefix", "chunk", "link", "question"]

Wanted = tuple[tuple[int, ...], tuple[int, ...]]
"""A cache that a prompt asks for: token ids, and what they are encoded behind."""


def tokens_of(share: float, tokens: int) -> int:
    """How many of these tokens a share is: at least one, unless it is 0."""
    return min(tokens, max(round(share * tokens), 1)) if share else 0


@dataclass(frozen=True)
class Segment:
    """A part of the prompt: ``token_ids[start:stop]``.

    Attributes:
        kind: `prefix`, `chunk`, `link` or `question` (everything behind the last chunk).
        slot: rank of the chunk, or of the chunk that a link token stands behind; None for prefix
            and question.
        behind: tokens the chunk was encoded behind: it saw a private copy of them, at the positions
            just before its own, and itself, nothing else. Empty when encoded alone, and for `full`,
            where a chunk sees everything before it (``slot`` and ``full_view`` tell).
        full_view: the tokens of the segment, as increasing offsets in it, that see everything
            before them in the prompt. The others of a chunk are as the chunk was encoded: they see
            ``behind`` and each other and, of the chunk's tokens in full view, the first version.
    """

    kind: SegmentKind
    start: int
    stop: int
    slot: int | None = None
    behind: tuple[int, ...] = ()
    full_view: Sequence[int] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        token_ids: from its first token to where the answer begins.
        segments: the parts of ``token_ids``, in order: prefix, chunks (and link tokens), question.
        room: tokens of prompt and answer.
        lasting: whether other questions have the same prefix.
    """

    token_ids: list[int]
    segments: list[Segment]
    room: int
    lasting: bool

    @cached_property
    def cached(self) -> list[Segment]:
        """Prefix and chunks, whose caches may be stored."""
        return [segment for segment in self.segments if segment.kind in ("prefix", "chunk")]

    @property
    def computed(self) -> list[int]:
        """Positions of link tokens and question."""
        computed = [s for s in self.segments if s.kind in ("link", "question")]
        return [place for segment in computed for place in range(segment.start, segment.stop)]

    @cached_property
    def wanted(self) -> list[Wanted]:
        """Of prefix and chunks the token ids, and what they are encoded behind."""
        return [(tuple(self.token_ids[s.start : s.stop]), s.behind) for s in self.cached]
