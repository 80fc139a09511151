"""A model of transformers in this process as a :class:`kvlink_rag.runners.base.ModelRunner`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.errors import InputError, UnsupportedModelError
from kvlink_rag.prompt.segments import Strategy
from kvlink_rag.runners.base import Abilities, Encoded, Job, ModelRunner
from kvlink_rag.runners.transformers import part, placement, step
from kvlink_rag.runners.transformers.architecture import Architecture, inspect_model
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.encode import Encoder
from kvlink_rag.runners.transformers.generation import TransformersGeneration
from kvlink_rag.runners.transformers.identity import adapter_state
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.load import Source, load
from kvlink_rag.runners.transformers.model_lock import lock_of
from kvlink_rag.runners.transformers.reading import (
    Readers,
    computed_anew,
    read_copied,
    read_in_place,
)
from kvlink_rag.runners.transformers.sampling import stop_ids
from kvlink_rag.runners.transformers.scratch import Scratch, give_back
from kvlink_rag.runners.transformers.together import serves
from kvlink_rag.runners.transformers.visibility import Span

BATCH_TOKENS = {"cpu": 1536}
"""Padded tokens in one forward pass while indexing; other devices than these take 16,384."""


class TransformersRunner:
    """Runs a causal language model of transformers.

    Runners over one model take turns; who runs that model without a runner must not do it
    meanwhile.

    Args:
        base: the model, which is not changed.
        name: what it was named by.
        merge_adapter: add the adapter's LoRA to a copy of the weights that it changes. A
            whole-model adapter always is merged.
        scratch: what the contexts of one model compute in; shared by all its runners.

    Attributes:
        model: what chunks are encoded with.
        reader: what link tokens, question and answer run through: the model, or its twin with the
            LoRA of a cache-preserving adapter, which shares its weights.
        architecture: the model's sizes and identity.
        in_place: whether prompts attend to chunk caches where they lie, instead of
            copying them into one; on where model and device allow it.
        stepped: whether answers go on by the compiled step of
            :mod:`kvlink_rag.runners.transformers.step`, where prompts are read in place.
        batch_tokens: padded tokens in one forward pass of :meth:`encode`.
        lock: hold it to run model or reader oneself.

    Raises:
        UnsupportedModelError: chunk caches are not exact for it.
        AdapterError: the adapter does not fit it.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        adapter: Adapter | None = None,
        merge_adapter: bool = False,
        scratch: Scratch | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.merge_adapter = merge_adapter
        self._base = base
        self._scratch = scratch or Scratch()  # used under the lock
        self.model = self.reader = base
        self.lock = lock_of(base)
        if adapter is not None:
            adapter.check_vocabulary(base, tokenizer)
        with self.lock:  # another runner may be using it
            if adapter is not None:
                self.model, self.reader = adapter.apply(base, merge=merge_adapter)
            self.architecture: Architecture = inspect_model(self.model, name)
            self.in_place = serves(self.reader, self.architecture)
            # compiled now, once a machine, and not within an answer
            self.stepped = self.in_place and step.serves(
                self.reader, self.architecture, self._scratch
            )
        self._adapters_in_model = adapter_state(self.model)
        self.stop_ids = stop_ids(base, tokenizer)
        self.batch_tokens = BATCH_TOKENS.get(self.architecture.device.type, 16_384)
        self.encoder = Encoder(self.model, self.architecture)

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        adapter: Adapter | None = None,
        merge_adapter: bool = False,
    ) -> TransformersRunner:
        """Load a model; arguments and errors as ``KVLinkEngine.from_pretrained``."""
        model, tokenizer, name = load(source, device, dtype)
        return cls(model, tokenizer, name=name, adapter=adapter, merge_adapter=merge_adapter)

    def with_adapter(
        self, adapter: Adapter | None, *, merge: bool | None = None
    ) -> TransformersRunner:
        """As :meth:`kvlink_rag.runners.base.ModelRunner.with_adapter`; the weights are shared."""
        return TransformersRunner(
            self._base,
            self.tokenizer,
            name=self.name,
            adapter=adapter,
            merge_adapter=self.merge_adapter if merge is None else merge,
            scratch=self._scratch,  # one for all that share the lock
        )

    @property
    def fingerprint(self) -> str:
        """Identity of the model that encodes."""
        return self.architecture.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.architecture.cache_dtype

    @property
    def max_tokens(self) -> int:
        """The longest prompt with its answer."""
        return self.architecture.max_tokens

    @property
    def abilities(self) -> Abilities:
        """Everything, but where the model's attention takes no mask."""
        strategies: set[Strategy] = {"full", "reuse"}
        if self.architecture.maskable or self.in_place:
            strategies.add("recompute")
        links = self.adapter.links if self.adapter else None
        if links is not None and (self.architecture.maskable or links.layout == "tail"):
            strategies.add("link")
        in_place: set[Strategy] = {"reuse", "link", "recompute"} if self.in_place else set()
        codes = self.in_place and placement.available(self.architecture.dtype)
        return Abilities(
            frozenset(strategies),
            together=frozenset(in_place & strategies),
            codecs=part.CODECS if codes else frozenset(),
        )

    def check_unchanged(self) -> None:
        """As :meth:`kvlink_rag.runners.base.ModelRunner.check_unchanged`: peft's adapters."""
        if self._adapters_in_model and adapter_state(self.model) != self._adapters_in_model:
            raise InputError(
                f"an adapter of {self.name} was switched, merged or scaled since the engine was "
                "made, and caches of one are wrong for the other: make an engine for it "
                "(KVLinkEngine.from_pretrained((model, tokenizer), store=...)), or switch it back"
            )

    def encode(
        self, texts: Sequence[Sequence[int]], behind: Sequence[int] = ()
    ) -> Iterator[Encoded]:
        """As :meth:`kvlink_rag.runners.base.ModelRunner.encode`; longest texts first."""
        batches = self.encoder.encode(texts, behind, max_batch_tokens=self.batch_tokens)
        before: int | None = None  # what texts stand behind runs with the first batch, if at all
        while True:
            with self.lock:
                start = time.perf_counter()
                if before is None:
                    before = 0 if self.encoder.has_encoded(tuple(behind)) else len(behind)
                batch = next(batches, None)
                seconds = time.perf_counter() - start
            if batch is None:
                return
            yield Encoded(batch, before, seconds)
            before = 0

    def start(self, jobs: Sequence[Job]) -> TransformersGeneration:
        """As :meth:`kvlink_rag.runners.base.ModelRunner.start`."""
        start = time.perf_counter()
        contexts = [self._context(job) for job in jobs]
        link_s = time.perf_counter() - start if any(job.records for job in jobs) else 0.0
        linked = [context for context in contexts if isinstance(context, LinkedContext)]
        copied = [context for context in contexts if isinstance(context, ContextCache)]
        links = self.adapter.links if self.adapter and jobs[0].strategy == "link" else None
        readers = Readers(self.architecture, self.model, self.reader, links, self.stepped)
        with self.lock:
            if linked:
                prefilled = read_in_place(jobs, linked, readers)
            else:
                each = zip(jobs, copied, strict=True)
                prefilled = [read_copied(job, context, readers) for job, context in each]
        give_back()
        return TransformersGeneration(jobs, prefilled, link_s, self.lock)

    def _context(self, job: Job) -> ContextCache | LinkedContext:
        """Prefix and chunks in their places; those of link tokens are left to the forward pass."""
        prompt = job.prompt
        if job.strategy == "full":
            return self.encoder.new_cache(prompt.room)
        spans = [
            Span(record, segment.start)
            for segment, record in zip(prompt.cached, job.records, strict=True)
            if record is not None
        ]
        if self.in_place:
            stored = sum(span.stop - span.start for span in spans)
            own = self.encoder.new_cache(prompt.room - stored + computed_anew(job))
            return LinkedContext(self.architecture, spans, own, self._scratch)
        cache = self.encoder.new_cache(prompt.room)
        for span in spans:
            cache.place(span.record, span.start, self.architecture.groups)
        cache.set_length(prompt.segments[-1].start)
        return cache


def in_process(runner: ModelRunner) -> TransformersRunner:
    """A runner as one whose model can be shown.

    Raises:
        UnsupportedModelError: it is another kind.
    """
    if not isinstance(runner, TransformersRunner):
        raise UnsupportedModelError(
            f"{runner.name} is run by {type(runner).__name__}, which has no model of transformers "
            "to show: use engine.runner"
        )
    return runner
