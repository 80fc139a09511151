"""A question answered by full prefill, and read by other ways along the same answer."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvlink_rag.engine.answer import Drawing
from kvlink_rag.engine.fidelity import Fidelity, compare
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.report import Report, Stopwatch
from kvlink_rag.engine.request import Request
from kvlink_rag.runners.base import GenerateSettings


class Trial:
    """What full prefill answers to a question, greedily, to compare other ways with.

    Other ways read that answer instead of making one of their own: so every token is compared, and
    one early difference does not hide the others. Where the likeliest token is the same at every
    place, the whole answer is.

    Args:
        request: its strategy does not count.
        tokens: the most to compare.

    Attributes:
        token_ids: full prefill's answer.
        logits: what it was chosen from, ``[tokens, vocab]`` float32.
        report: of its first token.
    """

    def __init__(self, pipeline: Pipeline, request: Request, tokens: int) -> None:
        self._pipeline = pipeline
        settings = GenerateSettings(max_new_tokens=tokens)
        full = pipeline.start(replace(request, strategy="full"), Stopwatch(), settings)
        drawing = Drawing(full.generation, tokens)
        drawing.ahead(pipeline.stop_ids, tokens)
        self.token_ids, self.report = drawing.token_ids, full.report
        self.logits = torch.stack(drawing.chosen_from)

    def read(
        self, request: Request, pipeline: Pipeline | None = None
    ) -> tuple[torch.Tensor, Report]:
        """The answer's tokens as another way would choose them, ``[tokens, vocab]`` logits.

        Args:
            request: the same question and chunks.
            pipeline: with other caches; None is the trial's own. What they lack is stored.
        """
        pipeline, before = pipeline or self._pipeline, self.token_ids[:-1]
        started = pipeline.start(request, Stopwatch(), None, len(before))
        pipeline.caches.keep(started.computed)
        return started.along(before), started.report

    def fidelity(self, request: Request) -> tuple[Fidelity, Report]:
        """How far another way is from full prefill, and what its first token took."""
        logits, report = self.read(request)
        return compare(self.logits, logits), report
