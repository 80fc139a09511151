"""Questions about texts that nobody asked any about: the model writes them itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.answer import AnswerStream
from kvlink_rag.engine.options import AnswerOptions
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.request import Request
from kvlink_rag.prompt.conversation import CHUNKS, Message

ASK: Message = {
    "role": "user",
    "content": [CHUNKS, "Write a question about a fact in this text."],
}
"""A message of its own: behind the engine's words for a brief answer small models ask in circles,
and so they do when told to write the question only."""
MAX_TOKENS = 32
FALLBACK = "What does this text say?"
"""Where a model writes nothing."""

T = TypeVar("T")

Case = tuple[str | Sequence[Message], Sequence[str | Chunk]]
"""A question and its chunks."""


def write_question(pipeline: Pipeline, chunk: Chunk) -> str:
    """A question about a chunk, which the model reads in full; may be empty."""
    asked: AnswerOptions = {"strategy": "full", "max_new_tokens": MAX_TOKENS, "stop": "\n"}
    request = Request.of([ASK], [chunk], asked, {}, pipeline.runner)
    return AnswerStream(pipeline, request).finished().text.strip()


def write_questions(
    pipeline: Pipeline, chunks: Sequence[Chunk], *, progress: bool = True
) -> list[str]:
    """One question about each chunk."""
    asked = []
    with bar("Writing questions", len(chunks), enabled=progress) as done:
        for number, chunk in enumerate(chunks, 1):
            asked.append(write_question(pipeline, chunk) or FALLBACK)
            done(number)
    return asked


def spread(things: Sequence[T], count: int) -> list[T]:
    """So many of them, from all over."""
    count = min(count, len(things))
    return [things[number * len(things) // count] for number in range(count)]


def write_cases(
    pipeline: Pipeline, chunks: Sequence[Chunk], count: int, k: int, *, progress: bool = True
) -> list[Case]:
    """Questions about some of the chunks, each with that chunk and others, in any order.

    Args:
        count: of questions, or as many as there are chunks.
        k: chunks to a question.
    """
    picked, cases = spread(chunks, count), list[Case]()
    asked = write_questions(pipeline, picked, progress=progress)
    for number, (chunk, question) in enumerate(zip(picked, asked, strict=True)):
        dice = random.Random(number)
        others = [each for each in chunks if each is not chunk]
        its = [chunk, *dice.sample(others, min(k - 1, len(others)))]
        dice.shuffle(its)
        cases.append((question, its))
    return cases
