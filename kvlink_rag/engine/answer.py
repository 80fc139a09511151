"""Answers, whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.engine.report import Report, Stopwatch
from kvlink_rag.engine.request import Request
from kvlink_rag.runners.transformers.generate import GenerateSettings, Sampler, TextStream
from kvlink_rag.runners.transformers.model_lock import let_go

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine


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
        self._stop_ids = engine.stop_ids
        self._texts = TextStream(engine.tokenizer, settings.stops)
        self._pieces = self._run()

    @property
    def text(self) -> str:
        """The text produced so far."""
        return self._texts.text

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
        ended = bool(self.token_ids) and self.token_ids[-1] in self._stop_ids
        return "stop" if ended or self._texts.stopped else "length"

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
        checked = engine._to_check(self._request)
        if checked and engine._monitor.limit is not None:
            prefill = self._check(prefill, watch)
        sampler = Sampler(settings, engine.architecture.device)
        token = sampler.choose(prefill.logits)
        let_go()  # large vocabularies take a team
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
        if checked and engine._monitor.limit is None:  # every piece is out, none waits for it
            report.fidelity, _ = engine._compare(self._request, prefill, 0)
            engine._monitor.count(report.fidelity, fell_back=False)
            report.after_s = watch.total() - report.total_s
        engine.observers.tell(report)

    def _check(self, prefill: Prefill, watch: Stopwatch) -> Prefill:
        """What the answer goes on from: full prefill where the strategy is too far from it."""
        engine, report = self._engine, prefill.report
        found, full = engine._compare(self._request, prefill, self._settings.max_new_tokens)
        report.fidelity, report.fell_back = found, engine._monitor.too_far(found)
        engine._monitor.count(found, fell_back=report.fell_back)
        report.computed_tokens += full.report.computed_tokens
        report.fidelity_s = watch.lap()
        if not report.fell_back:
            return prefill
        report.strategy, report.reused_tokens = full.report.strategy, 0
        report.context_tokens = full.report.context_tokens  # no link tokens among them
        return replace(full, report=report)

    def _text_pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """One piece a token (may be empty), then what was held back."""
        for token in tokens:
            self.token_ids.append(token)
            yield self._texts.push(token)
            if self._texts.stopped:
                return
        yield self._texts.finish()
