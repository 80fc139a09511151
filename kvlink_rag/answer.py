"""Answers, whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvlink_rag.chunk import Chunk
from kvlink_rag.generate import GenerateSettings, Sampler, TextStream
from kvlink_rag.prefill import Strategy
from kvlink_rag.report import Report, Stopwatch

if TYPE_CHECKING:
    from kvlink_rag.engine import KVLinkEngine


@dataclass(frozen=True)
class Answer:
    """An answer with the chunks it was made from and what it cost.

    Attributes:
        text: without special tokens and without a stop string.
        token_ids: as decoded, the end token included when the model produced one.
    """

    text: str
    token_ids: list[int]
    report: Report
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What was asked, checked."""

    question: str
    chunks: list[Chunk]
    strategy: Strategy
    system: str | None
    recompute: int


class AnswerStream:
    """Text pieces of one answer, for ``for`` and ``async for``. Work starts with the first piece.

    Attributes:
        report: complete once the stream has ended; ``ttft_s`` from the first piece on.
        text: what has been produced so far.
        token_ids: its tokens.
    """

    def __init__(self, engine: KVLinkEngine, request: Request, settings: GenerateSettings) -> None:
        self.report = Report(request.strategy)
        self.token_ids: list[int] = []
        self._engine = engine
        self._request = request
        self._settings = settings
        self._texts = TextStream(engine.tokenizer, settings.stops)
        self._pieces = self._run()

    @property
    def text(self) -> str:
        """The text produced so far."""
        return self._texts.text

    @property
    def answer(self) -> Answer:
        """The answer, once the stream has ended."""
        return Answer(self.text, self.token_ids, self.report, self._request.chunks)

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
        engine, settings, watch = self._engine, self._settings, Stopwatch()
        prefill, computed = engine._prefill(self._request, settings.max_new_tokens, watch)
        self.report = report = prefill.report
        sampler = Sampler(settings, engine.architecture.device)
        token = sampler.choose(prefill.logits)
        report.sample_s, report.ttft_s = watch.lap(), watch.laps()
        tokens = engine._tokens(prefill, sampler, token, settings.max_new_tokens)
        pieces = self._text_pieces(tokens)
        try:
            piece = next(pieces)
            if piece:
                yield piece
        finally:  # storing what was missing waits for the first piece, not for a reader who left
            engine._keep(computed)
        yield from filter(None, pieces)
        report.new_tokens = len(self.token_ids)
        report.total_s = watch.total()

    def _text_pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """One piece a token (may be empty), then what was held back."""
        for token in tokens:
            self.token_ids.append(token)
            yield self._texts.push(token)
            if self._texts.stopped:
                return
        yield self._texts.finish()
