"""From a request to the first token of its answer: lay out, load, compute, start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.engine.caches import Caches, Computed, Found, Made
from kvlink_rag.engine.fidelity import Fidelity, FidelityMonitor, compare
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.engine.prompts import Prompts
from kvlink_rag.engine.report import Observers, Report, Stopwatch
from kvlink_rag.engine.request import Request, check_logits
from kvlink_rag.prompt.segments import Prompt
from kvlink_rag.runners.base import GenerateSettings, Generation, Job, ModelRunner
from kvlink_rag.store import KVStore


@dataclass(frozen=True)
class Started:
    """A prompt that was read, with the records it had to compute (not yet stored)."""

    prompt: Prompt
    generation: Generation
    report: Report
    computed: list[Computed]

    @property
    def logits(self) -> torch.Tensor:
        """Of the first answer token, ``[vocab]`` float32."""
        logits = self.generation.prefilled[0].logits
        assert logits is not None, "check_logits comes first"
        return logits

    def along(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of the first answer token, and behind each of these, ``[1 + tokens, vocab]``."""
        first = self.logits[None]
        if not token_ids:
            return first
        return torch.cat([first, self.generation.look_ahead(0, token_ids)])

    def prefill(self) -> Prefill:
        """It as users see it."""
        its, token_ids = self.generation.prefilled[0], self.prompt.token_ids
        positions = list(range(len(token_ids)))
        return Prefill(self.logits, token_ids, positions, its.segments, self.report, its.state)


@dataclass
class Pipeline:
    """What one engine's answers are made with."""

    runner: ModelRunner
    prompts: Prompts
    caches: Caches
    monitor: FidelityMonitor
    observers: Observers
    stop_ids: frozenset[int]

    @classmethod
    def of(
        cls,
        runner: ModelRunner,
        store: KVStore,
        prompts: Prompts,
        monitor: FidelityMonitor | None,
        observers: Observers,
    ) -> Pipeline:
        """Of a runner and a store."""
        caches, watch = Caches(runner, store, prompts), monitor or FidelityMonitor()
        return cls(runner, prompts, caches, watch, observers, runner.stop_ids)

    @property
    def unwatched(self) -> Pipeline:
        """One whose work nobody is told of."""
        return replace(self, observers=Observers())

    def start(
        self,
        request: Request,
        watch: Stopwatch,
        settings: GenerateSettings | None,
        new_tokens: int | None = None,
    ) -> Started:
        """Everything up to the choice of the first answer token.

        Args:
            settings: how to go on; None where nothing will be generated.
            new_tokens: room behind the prompt; None takes what the settings say.

        Raises:
            InputError: the prompt is too long or does not fit the chat template.
        """
        room = settings.max_new_tokens if new_tokens is None and settings else new_tokens or 0
        report = request.report(started=watch.started)
        prompt = self.prompts.of(request, room)
        report.context_tokens = len(prompt.token_ids)
        report.tokenize_s = watch.lap()
        records: list[ChunkKV | None] = []
        computed: list[Computed] = []
        if request.strategy != "full":
            found = self.caches.load(prompt.wanted)
            report.load_s = watch.lap()
            made = self.caches.compute(found)
            report.encode_s = watch.lap()
            records = parts_of(prompt, found, made, report)
            computed = self.caches.computed(prompt, request.chunks, made)
        generation = self.runner.start([job_of(request, prompt, records, settings)])
        report.link_s = generation.link_s
        report.forward_s = watch.lap() - generation.link_s
        report.computed_tokens += generation.prefilled[0].computed_tokens
        report.ttft_s = watch.laps()
        return Started(prompt, generation, report, computed)

    def to_check(self, request: Request) -> bool:
        """Whether this answer is one of those that are compared with full prefill."""
        if request.strategy == "full" or not request.chunks:
            return False
        if request.fidelity_rate:
            check_logits(self.runner, "fidelity_rate")
        return self.monitor.choose(request.fidelity_rate)

    def compare(
        self,
        request: Request,
        logits: torch.Tensor,
        token_ids: Sequence[int],
        settings: GenerateSettings | None = None,
    ) -> tuple[Fidelity, Started]:
        """How far an answer is from full prefill, and the full prefill itself.

        Args:
            logits: ``[1 + tokens, vocab]``, of the answer's first tokens.
            token_ids: the answer up to the last of those, which full prefill reads as well.
            settings: of the answer that may go on from it.
        """
        room = max(len(token_ids), settings.max_new_tokens if settings else 0)
        full = self.start(replace(request, strategy="full"), Stopwatch(), settings, room)
        return compare(full.along(token_ids), logits), full


def job_of(
    request: Request,
    prompt: Prompt,
    records: Sequence[ChunkKV | None],
    settings: GenerateSettings | None,
) -> Job:
    """What a runner is given of a request."""
    return Job(prompt, request.strategy, records, request.recompute, request.recompute_by, settings)


def parts_of(prompt: Prompt, found: Found, made: Made, report: Report) -> list[ChunkKV | None]:
    """The caches that a prompt is made of; reports where they are from.

    Args:
        found, made: at least what the prompt wants: from the store, and computed.
    """
    records: list[ChunkKV | None] = []
    for segment, wanted in zip(prompt.cached, prompt.wanted, strict=True):
        record, text = found[wanted], wanted[0]
        if segment.kind == "chunk":
            report.hits += record is not None
            report.misses += record is None
        if record is not None:
            report.reused_tokens += len(text)
        records.append((record or made.records[wanted]) if text else None)
    mine = dict.fromkeys(prompt.wanted)
    report.bytes_read = sum(record.nbytes for each in mine if (record := found[each]))
    missing = [wanted for wanted in mine if found[wanted] is None]
    report.computed_tokens = sum(len(text) for text, _ in missing)
    report.computed_tokens += sum(made.before.get(its, 0) for its in {its for _, its in missing})
    return records
