"""Answers, whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.report import Report, Stopwatch
from kvlink_rag.engine.request import Request
from kvlink_rag.engine.text import TextStream
from kvlink_rag.runners.base import Generation

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """An answer with the chunks it was made from and what it cost.

    Attributes:
        text: without special tokens and without a stop string.
        token_ids: as decoded, the end token included when the model produced one.
        finish_reason: `stop` (an end token or a stop string) or `length` (``max_new_tokens``).
    """

    text: str
    token_ids: list[int]
    report: Report
    chunks: list[Chunk] = field(default_factory=list)
    finish_reason: FinishReason = "stop"


class Writing:
    """The text of one answer in the making.

    Attributes:
        token_ids: of what has been produced so far.
    """

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        self.token_ids: list[int] = []
        self._stop_ids = pipeline.stop_ids
        self._most = request.settings.max_new_tokens
        self._texts = TextStream(pipeline.runner.tokenizer, request.settings.stops)

    @property
    def text(self) -> str:
        """What has been produced so far."""
        return self._texts.text

    def push(self, token: int) -> str:
        """One more token; the text that is certain now (may be empty)."""
        self.token_ids.append(token)
        return self._texts.push(token)

    def finish(self) -> str:
        """The text that was held back."""
        return "" if self._texts.stopped else self._texts.finish()

    @property
    def going(self) -> bool:
        """Whether another token is to come."""
        return self.finish_reason == "length" and len(self.token_ids) < self._most

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        ended = bool(self.token_ids) and self.token_ids[-1] in self._stop_ids
        return "stop" if ended or self._texts.stopped else "length"


class Drawing:
    """The tokens of one answer, as they come.

    Args:
        watched: of so many tokens it is kept what they were chosen from.

    Attributes:
        token_ids, chosen_from: of the tokens watched, and their logits ``[vocab]``.
    """

    def __init__(self, generation: Generation, watched: int = 0) -> None:
        self.token_ids: list[int] = []
        self.chosen_from: list[torch.Tensor] = []
        self._generation, self._watched = generation, watched
        self._given = 0

    def next(self) -> int:
        """The next token."""
        self._given += 1
        return self.token_ids[self._given - 1] if self._given <= self.drawn else self._draw()

    def ahead(self, stop_ids: frozenset[int], most: int) -> None:
        """Draw the tokens that are watched now; fewer where the answer ends before."""
        while self.drawn < min(self._watched, most) and not stop_ids & {*self.token_ids[-1:]}:
            self._draw()

    @property
    def drawn(self) -> int:
        """How many tokens are watched so far."""
        return len(self.token_ids)

    def _draw(self) -> int:
        token = self._generation.next_tokens([0])[0]
        if self.drawn < self._watched:
            logits = self._generation.logits(0)
            assert logits is not None, "check_logits comes first"
            self.token_ids.append(token)
            self.chosen_from.append(logits)
        return token


class AnswerStream:
    """Text pieces of one answer, for ``for`` and ``async for``. Work starts with the first piece.

    Attributes:
        report: complete once the stream has ended; ``ttft_s`` from the first piece on.
    """

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        self.report = request.report()
        self._pipeline = pipeline
        self._request = request
        self._writing = Writing(pipeline, request)
        self._pieces = self._run()

    @property
    def text(self) -> str:
        """The text produced so far."""
        return self._writing.text

    @property
    def token_ids(self) -> list[int]:
        """Its tokens."""
        return self._writing.token_ids

    def finished(self) -> Answer:
        """The whole answer: what is left of the stream is produced."""
        for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The answer, once the stream has ended."""
        chunks = self._request.chunks
        return Answer(self.text, self.token_ids, self.report, chunks, self.finish_reason)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the stream ended."""
        return self._writing.finish_reason

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(next, self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def _run(self) -> Iterator[str]:
        pipeline, request, watch = self._pipeline, self._request, Stopwatch()
        checked = pipeline.to_check(request)
        started = pipeline.start(request, watch, request.settings)
        self.report = report = started.report
        drawing = Drawing(started.generation, request.fidelity_tokens if checked else 0)
        if checked and request.fidelity_limit is not None:
            drawing = self._check(drawing, watch)
        token = drawing.next()
        report.sample_s, report.ttft_s = watch.lap(), watch.laps()
        pieces = self._text_pieces(token, drawing)
        try:
            piece = next(pieces)
            if piece:
                yield piece
        finally:  # storing what was missing waits for the first piece, not for a reader who left
            pipeline.caches.keep(started.computed)
        yield from filter(None, pieces)
        report.new_tokens = len(self.token_ids)
        report.total_s = watch.total()
        if checked and request.fidelity_limit is None:  # every piece is out, none waits for it
            logits = torch.stack(drawing.chosen_from)
            report.fidelity, _ = pipeline.compare(request, logits, drawing.token_ids[:-1])
            pipeline.monitor.count(report.fidelity, fell_back=False)
            report.after_s = watch.total() - report.total_s
        pipeline.observers.tell(report)

    def _check(self, drawing: Drawing, watch: Stopwatch) -> Drawing:
        """What the answer goes on from: full prefill where the strategy is too far from it."""
        pipeline, request, report = self._pipeline, self._request, self.report
        drawing.ahead(pipeline.stop_ids, request.settings.max_new_tokens)
        logits, read = torch.stack(drawing.chosen_from), drawing.token_ids[:-1]
        found, full = pipeline.compare(request, logits, read, request.settings)
        limit = request.fidelity_limit
        report.fidelity, report.fell_back = found, limit is not None and found.is_beyond(limit)
        pipeline.monitor.count(found, fell_back=report.fell_back)
        report.computed_tokens += full.report.computed_tokens
        report.fidelity_s = watch.lap()
        if not report.fell_back:
            return drawing
        report.strategy, report.reused_tokens, report.recompute = full.report.strategy, 0, 0.0
        report.context_tokens = full.report.context_tokens  # no link tokens among them
        return Drawing(full.generation)

    def _text_pieces(self, token: int, drawing: Drawing) -> Iterator[str]:
        """One piece a token (may be empty), then what was held back."""
        writing = self._writing
        yield writing.push(token)
        while writing.going:
            yield writing.push(drawing.next())
        yield writing.finish()
