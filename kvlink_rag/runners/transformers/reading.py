"""Reading prompts: what of a prompt runs through which model, up to the first answer token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.prompt.segments import Segment, Strategy, tokens_of
from kvlink_rag.runners.base import Job, Prefilled
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.forward import run_at, run_behind
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.relevance import attention_paid
from kvlink_rag.runners.transformers.state import PromptState
from kvlink_rag.runners.transformers.together import Tokens, paid_together, run_together


@dataclass(frozen=True, eq=False)
class Readers:
    """Who reads what of a prompt; hold their lock.

    Attributes:
        architecture: of both.
        model: tokens of prefix and chunks.
        reader: link tokens and question, after all of the context; often the same model.
        links: the link tokens that are part of the prompt.
        stepped: whether the reader goes on by :mod:`kvlink_rag.runners.transformers.step`.
    """

    architecture: Architecture
    model: PreTrainedModel
    reader: PreTrainedModel
    links: LinkTokens | None
    stepped: bool

    def steps(
        self, anew: list[list[int]], rest: list[list[int]]
    ) -> list[tuple[PreTrainedModel, LinkTokens | None, list[list[int]]]]:
        """Forward passes: whose, and at which positions of each prompt.

        Args:
            anew: of prefix and chunks; ``rest``: of link tokens and question.
        """
        if self.reader is self.model:
            both = [[*its, *more] for its, more in zip(anew, rest, strict=True)]
            return [(self.reader, self.links, both)]
        return [(self.model, None, anew), (self.reader, self.links, rest)]


def read_in_place(
    jobs: Sequence[Job], contexts: Sequence[LinkedContext], readers: Readers
) -> list[Prefilled]:
    """Prompts of one strategy whose caches are attended where they lie, all in each forward pass.

    Args:
        contexts: nothing but spans.
    """
    segments, measured = _chosen_in_place(jobs, contexts, readers.reader)
    active = [_active(its, job.strategy) for its, job in zip(segments, jobs, strict=True)]
    anew, rest = [each for each, _ in active], [each for _, each in active]
    for context, places in zip(contexts, anew, strict=True):
        context.replace(places)
    logits = torch.empty(0)
    for model, links, each in readers.steps(anew, rest):
        parts = [
            Tokens(context, [job.prompt.token_ids[place] for place in its], its)
            for job, context, its in zip(jobs, contexts, each, strict=True)
            if its
        ]
        if parts:  # every prompt has its question in the last one
            logits = run_together(model, parts, links)
    return [
        Prefilled(
            segments[row],
            measured[row] + len(anew[row]) + len(rest[row]),
            logits[row],
            PromptState(context, readers.reader, readers.links, fast=True, stepped=readers.stepped),
        )
        for row, context in enumerate(contexts)
    ]


def _chosen_in_place(
    jobs: Sequence[Job], contexts: Sequence[LinkedContext], reader: PreTrainedModel
) -> tuple[list[list[Segment]], list[int]]:
    """The prompts' segments with what `recompute` chose in full view.

    Returns:
        also how many tokens of each ran through the model to find it.
    """
    rows = [row for row, job in enumerate(jobs) if _is_open(job)]
    parts = [Tokens(contexts[row], *_question(jobs[row])) for row in rows]
    paid = dict(zip(rows, paid_together(reader, parts), strict=True)) if rows else {}
    segments = [_in_view(job, paid.get(row)) for row, job in enumerate(jobs)]
    return segments, [len(_question(job)[0]) if row in paid else 0 for row, job in enumerate(jobs)]


def read_copied(job: Job, context: ContextCache, readers: Readers) -> Prefilled:
    """One prompt whose caches are copied into one, or that has none (`full`).

    Args:
        context: prefix and chunks in their places; empty for `full`.
    """
    paid, measured = None, 0
    if _is_open(job):
        question, _ = _question(job)
        paid, measured = attention_paid(readers.reader, context, question), len(question)
    segments, fast = _in_view(job, paid), job.strategy != "full"
    anew, rest = _active(segments, job.strategy)
    logits = torch.empty(0)
    for model, links, (places,) in readers.steps([anew], [rest]):
        if not places:
            continue
        ids = [job.prompt.token_ids[place] for place in places]
        if places[-1] - places[0] + 1 == len(places):
            context.set_length(places[0])
            logits = run_behind(model, context, ids, links, fast=fast)
        else:
            logits = run_at(model, readers.architecture, context, ids, places, links)
    state = PromptState(context, readers.reader, readers.links, fast)
    return Prefilled(segments, measured + len(anew) + len(rest), logits, state)


def computed_anew(job: Job) -> int:
    """How many tokens of chunks `recompute` computes anew."""
    if job.strategy != "recompute":
        return 0
    chunks = [segment for segment in job.prompt.segments if segment.kind == "chunk"]
    if job.recompute_by == "first":
        return sum(len(segment.full_view) for segment in chunks)
    wanted = tokens_of(job.recompute, sum(s.stop - s.start for s in chunks))
    return min(wanted, len(_incomplete(job)))


def _incomplete(job: Job) -> list[int]:
    """Positions of the chunks' tokens whose caches have not seen all that stands before them.

    A first chunk has, if it was encoded behind the prompt's own prefix.
    """
    token_ids = job.prompt.token_ids
    return [
        place
        for segment in job.prompt.segments
        if segment.kind == "chunk" and segment.behind != tuple(token_ids[: segment.start])
        for place in range(segment.start, segment.stop)
    ]


def _is_open(job: Job) -> bool:
    """Whether it has to be measured which tokens are computed anew: not if it is none, or all."""
    by_question = job.strategy == "recompute" and job.recompute_by == "question"
    return by_question and 0 < computed_anew(job) < len(_incomplete(job))


def _question(job: Job) -> tuple[list[int], range]:
    """Token ids and positions of everything behind the last chunk."""
    start, token_ids = job.prompt.segments[-1].start, job.prompt.token_ids
    return token_ids[start:], range(start, len(token_ids))


def _in_view(job: Job, paid: torch.Tensor | None) -> list[Segment]:
    """A prompt's segments, with those tokens of chunks in full view that `recompute` computes anew.

    Args:
        paid: attention of the question to each position before it; None where all or none are
            chosen, or others than by the question.
    """
    segments = job.prompt.segments
    if job.strategy != "recompute" or job.recompute_by != "question":
        return segments
    places = _incomplete(job)
    chosen = set(places[: computed_anew(job)])
    if paid is not None:
        chosen = {places[i] for i in paid[places].topk(len(chosen)).indices.tolist()}
    return [
        replace(s, full_view=tuple(i for i in range(s.stop - s.start) if s.start + i in chosen))
        if s.kind == "chunk"
        else s
        for s in segments
    ]


def _active(segments: Sequence[Segment], strategy: Strategy) -> tuple[list[int], list[int]]:
    """Positions that run through a model: context that is to see everything, and the rest."""
    context: list[int] = []
    rest: list[int] = []
    for segment in segments:
        places = [segment.start + offset for offset in segment.full_view]
        if segment.kind in ("link", "question"):
            rest += places
        elif segment.kind == "chunk" or strategy == "full":
            context += places
    return context, rest
