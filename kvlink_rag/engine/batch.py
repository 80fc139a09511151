"""Several answers at once: shared chunks are loaded once, forward passes are for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvlink_rag.engine.answer import Answer, FinishReason
from kvlink_rag.engine.prefill import Prompt
from kvlink_rag.engine.report import Report, Stopwatch
from kvlink_rag.engine.request import Request
from kvlink_rag.runners.transformers.generate import GenerateSettings, Sampler, TextStream
from kvlink_rag.runners.transformers.in_place import LinkedContext, Tokens, run_together

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine


class _Row:
    """One answer in the making."""

    def __init__(
        self,
        engine: KVLinkEngine,
        request: Request,
        prompt: Prompt,
        report: Report,
        settings: GenerateSettings,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.report = report
        self.token_ids: list[int] = []
        self._settings = settings
        self._stop_ids = engine.stop_ids
        self._texts = TextStream(engine.tokenizer, settings.stops)
        self.sampler = Sampler(settings, engine.architecture.device)

    def push(self, token: int) -> None:
        self.token_ids.append(token)
        self._texts.push(token)

    @property
    def going(self) -> bool:
        """Whether another token is to come."""
        return len(self.token_ids) < self._settings.max_new_tokens and not self._stopped

    @property
    def _stopped(self) -> bool:
        return self.token_ids[-1] in self._stop_ids or self._texts.stopped

    def answer(self) -> Answer:
        self._texts.finish()
        reason: FinishReason = "stop" if self._stopped else "length"
        return Answer(self._texts.text, self.token_ids, self.report, self.request.chunks, reason)


def answer_together(
    engine: KVLinkEngine, requests: Sequence[Request], settings: GenerateSettings
) -> list[Answer]:
    """Answers in the order of the requests, which all are `reuse` or all `link`.

    Each report has the parts of the time to the first token that all of them waited for.
    """
    watch = Stopwatch()
    prompts = [engine._prompt(request, settings.max_new_tokens) for request in requests]
    times = Report(requests[0].strategy, started=watch.started)
    times.tokenize_s = watch.lap()
    found = engine._load(wanted for prompt in prompts for wanted in prompt.wanted)
    times.load_s = watch.lap()
    made = engine._compute(found)
    times.encode_s = watch.lap()
    rows, parts = [], []
    for request, prompt in zip(requests, prompts, strict=True):
        report = Report(request.strategy, context_tokens=len(prompt.token_ids))
        context = engine._link(request, prompt, found, made, report)
        assert isinstance(context, LinkedContext)
        places = prompt.computed
        report.computed_tokens += len(places)
        rows.append(_Row(engine, request, prompt, report, settings))
        parts.append(Tokens(context, [prompt.token_ids[place] for place in places], places))
    times.link_s = watch.lap()
    with engine._model_lock:
        logits = run_together(engine.reader, parts, engine._links(requests[0]))
        times.forward_s = watch.lap()
        for row, its in zip(rows, logits, strict=True):
            row.push(row.sampler.choose(its))
    times.sample_s, times.ttft_s = watch.lap(), watch.laps()
    kept = [c for row in rows for c in engine._computed(row.request, row.prompt, made)]
    engine._keep(kept)
    contexts = {row: part.context for row, part in zip(rows, parts, strict=True)}
    _decode(engine, contexts, watch)
    for row in rows:
        row.report.add_times(times)
        engine.observers.tell(row.report)
    return [row.answer() for row in rows]


def _decode(engine: KVLinkEngine, contexts: dict[_Row, LinkedContext], watch: Stopwatch) -> None:
    """Token by token; rows that have ended leave."""
    while True:
        for row in list(contexts):
            if not row.going:
                row.report.new_tokens = len(row.token_ids)
                row.report.total_s = watch.total()
                del contexts[row]
        if not contexts:
            return
        parts = [
            Tokens(context, row.token_ids[-1:], [context.stop]) for row, context in contexts.items()
        ]
        with engine._model_lock:
            logits = run_together(engine.reader, parts)
            for row, its in zip(contexts, logits, strict=True):
                row.push(row.sampler.choose(its))
