"""Several answers at once: shared chunks are loaded once, the runner answers all together."""

from __future__ import annotations

from collections.abc import Sequence

from kvlink_rag.engine.answer import Answer, AnswerStream, Writing
from kvlink_rag.engine.pipeline import Pipeline, job_of, parts_of
from kvlink_rag.engine.report import Report, Stopwatch
from kvlink_rag.engine.request import Request


def answer_all(pipeline: Pipeline, requests: Sequence[Request]) -> list[Answer]:
    """Answers in the order of the requests, which all have the same options: together, or in turn.

    Raises:
        InputError: one of them is refused, and nothing is answered.
    """
    if not requests:
        return []
    first, abilities = requests[0], pipeline.runner.abilities
    if first.strategy in abilities.together and not first.fidelity_rate:
        return answer_together(pipeline, requests)
    for request in requests:  # refuse before the first is answered
        pipeline.prompts.of(request, request.settings.max_new_tokens)
    return [AnswerStream(pipeline, request).finished() for request in requests]


def answer_together(pipeline: Pipeline, requests: Sequence[Request]) -> list[Answer]:
    """Answers in the order of the requests, which all have one strategy and the same settings.

    Each report has the parts of the time to the first token that all of them waited for.
    """
    watch, caches = Stopwatch(), pipeline.caches
    prompts = [pipeline.prompts.of(each, each.settings.max_new_tokens) for each in requests]
    times = requests[0].report(started=watch.started)
    times.tokenize_s = watch.lap()
    found = caches.load(wanted for prompt in prompts for wanted in prompt.wanted)
    times.load_s = watch.lap()
    made = caches.compute(found)
    times.encode_s = watch.lap()
    reports, jobs = [], []
    for request, prompt in zip(requests, prompts, strict=True):
        report = request.report(context_tokens=len(prompt.token_ids))
        records = parts_of(prompt, found, made, report)
        reports.append(report)
        jobs.append(job_of(request, prompt, records, request.settings))
    generation = pipeline.runner.start(jobs)
    times.link_s = generation.link_s
    times.forward_s = watch.lap() - generation.link_s
    for report, prefilled in zip(reports, generation.prefilled, strict=True):
        report.computed_tokens += prefilled.computed_tokens
    writings = [Writing(pipeline, request) for request in requests]
    going = list(range(len(requests)))
    while going:
        for row, token in zip(going, generation.next_tokens(going), strict=True):
            writings[row].push(token)
        if not times.ttft_s:
            times.sample_s, times.ttft_s = watch.lap(), watch.laps()
            pairs = zip(prompts, requests, strict=True)
            caches.keep([c for p, r in pairs for c in caches.computed(p, r.chunks, made)])
        ended = [row for row in going if not writings[row].going]
        for row in ended:
            reports[row].new_tokens = len(writings[row].token_ids)
            reports[row].total_s = watch.total()
        going = [row for row in going if writings[row].going]
    for report in reports:
        report.add_times(times)
        pipeline.observers.tell(report)
    return [_answer(*each) for each in zip(requests, writings, reports, strict=True)]


def _answer(request: Request, writing: Writing, report: Report) -> Answer:
    writing.finish()
    return Answer(writing.text, writing.token_ids, report, request.chunks, writing.finish_reason)
