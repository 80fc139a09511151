"""The engine: index chunks once, answer questions from their linked caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from kvlink_rag.adapters.adapter import Adapter, kept_behind
from kvlink_rag.adapters.load import load_adapter
from kvlink_rag.chunk import Chunk, as_chunks
from kvlink_rag.common.asynchronous import in_thread
from kvlink_rag.common.progress import TokenProgress
from kvlink_rag.engine.answer import Answer, AnswerStream
from kvlink_rag.engine.batch import answer_all
from kvlink_rag.engine.choice import Choices, choose
from kvlink_rag.engine.fidelity import Fidelity, FidelityMonitor, FidelityStats
from kvlink_rag.engine.indexing import Indexing
from kvlink_rag.engine.options import AnswerOptions, merged
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.engine.prompts import Prompts
from kvlink_rag.engine.report import IndexReport, Observers, Stopwatch
from kvlink_rag.engine.request import Request, check_logits, check_options
from kvlink_rag.engine.trial import Trial
from kvlink_rag.engine.tune import TuneSettings, Tuning, tune
from kvlink_rag.prompt.conversation import Message
from kvlink_rag.prompt.layout import DEFAULT_BEHIND, EncodeBehind, PromptLayout, PromptTemplate
from kvlink_rag.runners.base import ModelRunner
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.load import Source
from kvlink_rag.runners.transformers.runner import TransformersRunner, in_process
from kvlink_rag.store import KVStore, open_store
from kvlink_rag.store.memory import UnnamedMemory

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KVLinkEngine:
    """A causal language model with a store of chunk caches.

    Make one with :meth:`from_pretrained`. Safe to use from several threads: forward passes run one
    at a time, everything else of an answer is its own. Engines over one model take turns, too; who
    runs that model without an engine must not do it meanwhile.

    Args:
        layout, monitor, observers: of a twin, those of the engine that it was made of. All else is
            as in :meth:`from_pretrained`.

    Attributes:
        runner: what runs the model.
        name, tokenizer, adapter, fingerprint: the runner's; the last is part of every cache's key.
        store: where chunk caches are kept.
        layout: the prompt's parts as token ids.
        encode_behind, behind: what chunks are encoded behind: its name, and token ids.
        options: the defaults of every answer.
        tuned: what :meth:`tune` chose for ``strategy="auto"``, here or beside the store, or None.
        pipeline: what answers are made with, for those who take a part in it themselves.
        observers: called with the :class:`~kvlink_rag.Report` of each complete answer (none of one
            that fails, or is left) and the :class:`~kvlink_rag.IndexReport` of each indexing run,
            in its thread (:mod:`kvlink_rag.engine.observe`). Append to it; twins share it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: KVStore,
        *,
        encode_behind: EncodeBehind | None = None,
        prompt: PromptTemplate | None = None,
        layout: PromptLayout | None = None,
        monitor: FidelityMonitor | None = None,
        observers: Observers | None = None,
        **options: Unpack[AnswerOptions],
    ) -> None:
        adapter = runner.adapter
        self.runner, self.store, self.fingerprint = runner, store, runner.fingerprint
        self.name, self.tokenizer, self.adapter = runner.name, runner.tokenizer, adapter
        self.options = check_options(options, runner)
        self.layout = PromptLayout(
            runner.tokenizer, prompt or (adapter.prompt if adapter else None)
        )
        self._chosen = (encode_behind, prompt)
        own = adapter.encode_behind if adapter else DEFAULT_BEHIND
        self.encode_behind = own if encode_behind is None else encode_behind
        self.behind = tuple(self.layout.behind(self.encode_behind))
        self.observers = Observers() if observers is None else observers
        prompts = Prompts(runner, self.layout, self.behind)
        self.pipeline = Pipeline.of(runner, store, prompts, monitor, self.observers)
        self.choices = Choices(store, runner, self.behind)
        self.tuned = self.choices.find()

    @classmethod
    def from_pretrained(
        cls,
        model: Source,
        *,
        store: str | Path | KVStore | None = None,
        adapter: str | Path | Adapter | None = None,
        merge_adapter: bool = False,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        encode_behind: EncodeBehind | None = None,
        prompt: PromptTemplate | None = None,
        **options: Unpack[AnswerOptions],
    ) -> KVLinkEngine:
        """Load a model and check that chunk caches are exact for it.

        Args:
            model: hub id, folder, GGUF file (loaded dense), or a ``(model, tokenizer)`` pair.
            store: folder for chunk caches, URL, or any store; None keeps them in memory. Codec,
                budget, encryption, a remote are said to :func:`kvlink_rag.store.open_store`.
            adapter: trained link tokens and LoRA: the folder that ``kvlink train`` made, or the
                name of one that comes with the package, such as `smollm2-135m-link5`, or of a
                preset (:mod:`kvlink_rag.adapters.presets`). It is active in every strategy.
            merge_adapter: add the adapter's LoRA to a copy of the weights that it changes: where no
                compiled step runs them, answers come about a fifth faster, for nearly the memory of
                another model, rounded to its dtype. Caches stay. A whole-model one is always so.
            device: `auto` takes an accelerator when there is one.
            dtype: what the model computes in and keeps caches in. `auto`: caches in the
                checkpoint's, and on a CPU computation in float32 where that is faster.
            encode_behind: what chunks are encoded behind, and part of a cache's identity: the
                default system prefix and made-up `documents`, that prefix (`system`), the bare chat
                `header`, or `alone`. None takes the adapter's, else `documents`.
            prompt: the words around chunks and question; None takes the adapter's.
            options: the defaults of every answer (:class:`AnswerOptions`).

        Raises:
            ModelNotFoundError, UnsupportedModelError, StoreError, InputError, AdapterError,
            AdapterRequiredError
        """
        merged({}, options)  # a mistyped one is said before a model is loaded
        trained = None if adapter is None else load_adapter(adapter)
        runner = TransformersRunner.from_pretrained(
            model, device=device, dtype=dtype, adapter=trained, merge_adapter=merge_adapter
        )
        its = open_store(UnnamedMemory() if store is None else store)
        return cls(runner, its, encode_behind=encode_behind, prompt=prompt, **options)

    def with_store(self, store: str | Path | KVStore | None) -> KVLinkEngine:
        """A twin with another store; it shares the model and :attr:`fidelity_stats`."""
        return self._twin(self.runner, open_store(store), *self._chosen)

    def with_encode_behind(self, behind: EncodeBehind, *, override: bool = True) -> KVLinkEngine:
        """A twin with the model and store, whose chunks are encoded behind something else; without
        ``override``, this one where it was told what."""
        if self._chosen[0] is not None and not override:
            return self
        return self._twin(self.runner, self.store, behind, self._chosen[1])

    def with_adapter(
        self, adapter: str | Path | Adapter | None, *, merge_adapter: bool | None = None
    ) -> KVLinkEngine:
        """A twin with another adapter, or none, that shares the base model's weights and the store.

        It keeps the strategy; `link` becomes `reuse` where the other has no link tokens. ``prompt``
        stays if this one was given it, what chunks are encoded behind where the other can read it,
        and ``merge_adapter`` None as it is. Errors as :meth:`from_pretrained`.
        """
        trained = None if adapter is None else load_adapter(adapter)
        runner = self.runner.with_adapter(trained, merge=merge_adapter)
        cannot = self.options.get("strategy") == "link" and not (trained and trained.links)
        changes: AnswerOptions = {"strategy": "reuse"} if cannot else {}
        behind = kept_behind(trained, self.encode_behind, self._chosen[0])
        return self._twin(runner, self.store, behind, self._chosen[1], **changes)

    def _twin(
        self,
        runner: ModelRunner,
        store: KVStore,
        encode_behind: EncodeBehind | None,
        prompt: PromptTemplate | None,
        **changes: Unpack[AnswerOptions],
    ) -> KVLinkEngine:
        same = runner is self.runner
        twin = KVLinkEngine(
            runner,
            store,
            encode_behind=encode_behind,
            prompt=prompt,
            layout=self.layout if same else None,
            monitor=self.pipeline.monitor if same else None,
            observers=self.observers,
            **merged(self.options, changes),
        )
        twin.stop_ids = self.stop_ids if same else twin.stop_ids
        if same and twin.behind == self.behind:
            twin.tuned = twin.tuned or self.tuned
        twin.pipeline.caches.tokens_per_s = self.pipeline.caches.tokens_per_s
        return twin

    # What it is made of

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer; may be set to others."""
        return self.pipeline.stop_ids

    @stop_ids.setter
    def stop_ids(self, ids: frozenset[int]) -> None:
        self.pipeline.stop_ids = ids

    @property
    def model(self) -> PreTrainedModel:
        """What chunks are encoded with, where transformers runs the model."""
        return in_process(self.runner).model

    @property
    def reader(self) -> PreTrainedModel:
        """What link tokens, question and answer run through, where transformers runs the model."""
        return in_process(self.runner).reader

    @property
    def architecture(self) -> Architecture:
        """The model's sizes and identity, where transformers runs the model."""
        return in_process(self.runner).architecture

    # Indexing

    def index(
        self, chunks: Iterable[str | Chunk], *, progress: bool | TokenProgress = True
    ) -> IndexReport:
        """Encode and store the caches that the store lacks; idempotent.

        Every chunk's id (see :class:`Chunk`) refers to its cache afterwards; with
        ``store.cache_after``, to one that is still to come. ``progress`` True draws a bar; a
        function is called with (tokens encoded, tokens to encode) after each batch of the model.

        Raises:
            InputError: a chunk is empty or longer than the model's context.
            StoreError: a cache cannot be written; those written before stay.
        """
        report = Indexing(self.pipeline, as_chunks(chunks)).run(progress)
        self.pipeline.observers.tell(report)
        return report

    def keys(self, chunks: Iterable[str | Chunk]) -> list[str]:
        """The store's keys of chunks, in order."""
        return [self.pipeline.caches.key(chunk) for chunk in as_chunks(chunks)]

    def prefetch(self, chunks: Iterable[str | Chunk]) -> None:
        """Begin to load the caches of chunks that will probably be asked about; returns at once.

        Each is handed to the first answer that needs it; some hundred wait. What is not stored is
        not computed ahead.

        Raises:
            InputError: a chunk is empty.
        """
        self.pipeline.caches.prefetcher.start(as_chunks(chunks))

    # Answers

    def answer(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Answer a question from chunks, in the order given.

        Args:
            question: a text, or the chat messages of a conversation (:data:`kvlink_rag.Message`);
                :data:`kvlink_rag.CHUNKS` in one of them says where the chunks stand.
            chunks: may be empty; what is not in the store is computed in place and stored.
            options: override the engine's (:class:`AnswerOptions`): ``strategy``, ``system``,
                ``max_new_tokens``, ``temperature`` and others.

        Raises:
            InputError: empty question or chunk, a prompt longer than the model's context, or an
                option out of range.
            AdapterRequiredError: `link` without an adapter.
            UnsupportedModelError: what runs the model cannot do this.
        """
        return self.stream(question, chunks, **options).finished()

    def stream(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        **options: Unpack[AnswerOptions],
    ) -> AnswerStream:
        """The answer piece by piece; ``.report``, ``.text`` and ``.token_ids`` afterwards.

        Arguments and errors as :meth:`answer`. Also an async iterator.
        """
        return AnswerStream(self.pipeline, self._request(question, chunks, options))

    def answer_batch(
        self,
        asked: Iterable[tuple[str | Sequence[Message], Iterable[str | Chunk]]],
        **options: Unpack[AnswerOptions],
    ) -> list[Answer]:
        """Answers to several questions, each with its own chunks, in their order.

        Where the runner can (``engine.runner.abilities.together``), shared chunks are loaded and
        held once, and all run through the model together: each answer is there later than alone,
        all of them sooner. Otherwise, and with a fidelity rate, they are answered in turn. Nothing
        is answered if one of them is refused.

        Args:
            asked: pairs of a question and its chunks; options and errors else as :meth:`answer`.
        """
        requests = [self._request(question, chunks, options) for question, chunks in asked]
        return answer_all(self.pipeline, requests)

    def prefill(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        **options: Unpack[AnswerOptions],
    ) -> Prefill:
        """Everything up to the logits of the first answer token.

        Missing caches are computed in place and stored before this returns. ``max_new_tokens``
        makes room behind the prompt; other settings of decoding mean nothing here.

        Raises:
            InputError, AdapterRequiredError, UnsupportedModelError: as :meth:`answer`.
        """
        check_logits(self.runner, "prefill")
        request = self._request(question, chunks, options)
        room = options.get("max_new_tokens") or 0
        started = self.pipeline.start(request, Stopwatch(), None, room)
        self.pipeline.caches.keep(started.computed)
        self.pipeline.observers.tell(started.report)
        return started.prefill()

    def _request(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        options: AnswerOptions,
    ) -> Request:
        self.runner.check_unchanged()
        auto = choose(self.runner, self.encode_behind, self.tuned)
        return Request.of(question, chunks, options, self.options, self.runner, auto)

    def tune(
        self,
        chunks: Iterable[str | Chunk] = (),
        *,
        asked: Iterable[tuple[str | Sequence[Message], Sequence[str | Chunk]]] = (),
        settings: TuneSettings | None = None,
        progress: bool = True,
    ) -> Tuning:
        """Find the quickest way whose answers are full prefill's, and let ``auto`` take it.

        Each strategy, and `recompute` at several shares, reads full prefill's answers, and what it
        would have said is compared (:mod:`kvlink_rag.engine.tune`). The choice is kept beside a
        store that has a folder, for every engine that opens it with the same model, adapter and
        ``encode_behind``. Caches that the store lacks are stored.

        Args:
            chunks: such as will be asked about; the model writes questions itself.
            asked: questions with their chunks, in place of those.

        Raises:
            InputError: there are neither chunks nor questions, or one cannot be asked.
            UnsupportedModelError: what runs the model shows no logits.
            StoreError: the choice cannot be written; this engine has it all the same.
        """
        self.choices.ready()
        quiet, its = self.pipeline.unwatched, as_chunks(chunks)
        tuning = tune(quiet, its, list(asked), self.options, settings or TuneSettings(), progress)
        self.tuned = tuning.choice
        self.choices.keep(tuning.choice)
        return tuning

    @property
    def fidelity_stats(self) -> FidelityStats:
        """What the checks of answers (``fidelity_rate``) have found so far."""
        return self.pipeline.monitor.stats

    def fidelity(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        **options: Unpack[AnswerOptions],
    ) -> Fidelity:
        """How far a strategy's distributions are from those of full prefill.

        Of the first token, or of ``fidelity_tokens`` of full prefill's answer. Both with the same
        adapter; the full prompt has no link tokens or marks. Not part of the stats. Arguments and
        errors as :meth:`prefill`.
        """
        check_logits(self.runner, "fidelity")
        request = self._request(question, chunks, options)
        return Trial(self.pipeline, request, request.fidelity_tokens).fidelity(request)[0]

    aindex = in_thread(index)
    aprefill = in_thread(prefill)
    afidelity = in_thread(fidelity)
    aanswer = in_thread(answer)
    aanswer_batch = in_thread(answer_batch)
    astream = stream  # for ``async for``
