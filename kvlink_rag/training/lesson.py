"""Lessons: what one step of training shows the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvlink_rag.chunk import Chunk

View = Literal["link", "reuse", "full"]
"""What the questions of a lesson read: linked chunk caches, reused ones, or full prefill."""


@dataclass(frozen=True)
class Turn:
    """A question and the answer that is to be learnt."""

    question: str
    answer: str


@dataclass(frozen=True)
class Lesson:
    """Chunks (maybe none) and one or more independent questions behind them.

    Attributes:
        source: the kind of data it is from, for the books.
        distill: learn the base model's own distribution under full prefill, not the tokens alone.
    """

    chunks: tuple[Chunk, ...]
    turns: tuple[Turn, ...]
    view: View = "link"
    source: str = ""
    distill: bool = False
