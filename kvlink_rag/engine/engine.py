"""The engine: index chunks once, answer questions from their linked caches."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlink_rag.adapters.adapter import Adapter, load_adapter
from kvlink_rag.chunk import Chunk, as_chunks
from kvlink_rag.engine.answer import Answer, AnswerStream
from kvlink_rag.engine.batch import answer_together
from kvlink_rag.engine.fidelity import Fidelity, FidelityMonitor, FidelityStats, compare
from kvlink_rag.engine.indexing import Indexing
from kvlink_rag.engine.prefetch import Prefetcher
from kvlink_rag.engine.prefill import Prefill, RecomputeBy, Strategy
from kvlink_rag.engine.prefiller import Prefiller
from kvlink_rag.engine.report import IndexReport, Observers, Stopwatch
from kvlink_rag.engine.request import Request, check_recompute_by, check_strategy
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.conversation import Message, as_messages
from kvlink_rag.prompt.layout import EncodeBehind, PromptTemplate
from kvlink_rag.runners.transformers.generate import GenerateSettings, Sampler, stop_ids
from kvlink_rag.runners.transformers.load import Source, load
from kvlink_rag.store import Budget, EncryptionKey, KVStore, MemoryStore, Remote, open_store
from kvlink_rag.tuning.codec import AUTO, resolve_codec


class KVLinkEngine(Prefiller):
    """A causal language model with a store of chunk caches.

    Make one with :meth:`from_pretrained`. Safe to use from several threads: forward passes run one
    at a time, everything else of an answer is its own. Engines over one model take turns, too; who
    runs that model without an engine must not do it meanwhile.

    Attributes:
        model, tokenizer: the transformers objects; the model is what chunks are encoded with.
        reader: what link tokens, question and answer run through: the model, or its twin with the
            LoRA of a cache-preserving adapter, which shares its weights.
        adapter: trained link tokens and LoRA, or None.
        store: where chunk caches are kept.
        name: what the model was named by.
        architecture: the model's sizes and fingerprint.
        layout: the prompt's parts as token ids.
        stop_ids: tokens that end an answer.
        in_place: whether `reuse` and `link` attend to chunk caches where they lie, instead of
            copying them into one; on where model and device allow it.
        observers: called with each answer's :class:`~kvlink_rag.Report` and each indexing run's
            :class:`~kvlink_rag.IndexReport` once it is complete, in the thread that completed it;
            an answer that fails, or whose reader leaves, is not reported. Append to it, or use
            :mod:`kvlink_rag.engine.observe`. Twins (:meth:`with_store`, :meth:`with_adapter`) share
            it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        store: KVStore,
        strategy: Strategy = "reuse",
        adapter: Adapter | None = None,
        merge_adapter: bool = False,
        encode_behind: EncodeBehind | None = None,
        recompute_tokens: int = 16,
        recompute_by: RecomputeBy = "first",
        prompt: PromptTemplate | None = None,
        cache_after: int = 0,
        fidelity_rate: float = 0.0,
        fidelity_limit: float | None = None,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            name=name,
            store=store,
            adapter=adapter,
            merge_adapter=merge_adapter,
            encode_behind=encode_behind,
            prompt=prompt,
            cache_after=cache_after,
        )
        self._base = model
        self._chosen = (encode_behind, prompt, merge_adapter)
        self._monitor = FidelityMonitor(fidelity_rate, fidelity_limit)
        self.strategy = check_strategy(strategy, adapter)
        self.recompute_tokens = recompute_tokens
        self.recompute_by = check_recompute_by(recompute_by)
        self.stop_ids = stop_ids(model, tokenizer)
        self.observers = Observers()

    @classmethod
    def from_pretrained(
        cls,
        model: Source,
        *,
        store: str | Path | KVStore | None = None,
        ram_bytes: int = 0,
        codec: str | None = None,
        budget: Budget | int | None = None,
        encryption_key: EncryptionKey | None = None,
        remote: str | Remote | None = None,
        strategy: Strategy = "reuse",
        adapter: str | Path | Adapter | None = None,
        merge_adapter: bool = False,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        encode_behind: EncodeBehind | None = None,
        recompute_tokens: int = 16,
        recompute_by: RecomputeBy = "first",
        prompt: PromptTemplate | None = None,
        cache_after: int = 0,
        fidelity_rate: float = 0.0,
        fidelity_limit: float | None = None,
    ) -> KVLinkEngine:
        """Load a model and check that chunk caches are exact for it.

        Args:
            model: hub id, local folder, GGUF file (loaded with dense weights), or a
                ``(model, tokenizer)`` pair already in memory.
            store: folder for chunk caches, URL (:func:`kvlink_rag.store.open_store`), or any
                store; None keeps them in memory.
            ram_bytes: keep so much of what was read last from the folder in memory, which spares
                reading and verifying it.
            codec: what a folder keeps keys and values as: `raw`, `bf16`, `fp8`, `int8` or `int4`;
                fixed when the folder is made, and part of a cache's identity. None takes the
                folder's, `raw` for a new one; `auto` does, too, but measures for a new one which
                is the smallest that hardly changes answers
                (:func:`kvlink_rag.tuning.codec.choose_codec`).
            budget: most bytes that the folder may hold, or a :class:`kvlink_rag.store.Budget` with
                limits for documents and namespaces; what is worth least makes room. None leaves
                the folder's as it is, a new one without limit.
            encryption_key: encrypts the caches of a new folder and opens them later: 16, 24 or 32
                bytes, or a function that returns them. None takes ``KVLINK_STORE_KEY`` of the
                environment for a folder that is encrypted, and encrypts no new one.
            remote: what several machines share behind their folders: a URL such as
                `s3://bucket/kv`, or an object made with credentials
                (:class:`kvlink_rag.store.FsspecRemote`, :class:`kvlink_rag.store.RedisRemote`).
                Where loading from it would take longer than computing, caches are computed.
            strategy: the default for every answer: `reuse`, `recompute`, `full`, or with an adapter
                `link`.
            adapter: trained link tokens and LoRA: the folder that ``kvlink train`` made, or the
                name of one that comes with the package, such as `smollm2-135m-link5`, or of a
                preset (:mod:`kvlink_rag.adapters.presets`). It is active in every strategy.
            merge_adapter: add the adapter's LoRA to a copy of the weights that it changes: answers
                come about a fifth faster on CPU, for nearly the memory of another model and rounded
                to its dtype. Stored caches stay the same. A whole-model adapter always is merged.
            device: `auto` takes an accelerator when there is one.
            dtype: `auto` keeps the checkpoint's.
            encode_behind: what chunks are encoded behind: the model's default `system` prefix, its
                bare chat `header`, or `alone`. Part of a cache's identity. None of them changes
                with the system prompt of a question. None takes what the adapter was trained with,
                else `system`.
            recompute_tokens: with `recompute`, how many tokens of each chunk.
            recompute_by: with `recompute`, which: the `first` of each chunk, or those that the
                `question` attends to most, ``recompute_tokens`` a chunk on average; this costs one
                more forward pass over the question.
            prompt: the words around chunks and question; None takes the adapter's.
            cache_after: 0 computes and stores caches when chunks are indexed. 1 leaves that to the
                first answer that retrieves a chunk, n to the n-th: a store for what is asked for.
            fidelity_rate: share of the answers, 0 ... 1, chosen at random, that are compared with
                full prefill (:mod:`kvlink_rag.engine.fidelity`): in ``report.fidelity`` and
                :attr:`fidelity_stats`. After the answer, unless there is a limit. Answers with
                strategy `full` or without chunks are never checked.
            fidelity_limit: divergence from full prefill (KL, nats) above which a checked answer is
                that of full prefill instead. The check then comes before the first token.

        Raises:
            ModelNotFoundError, UnsupportedModelError, StoreError, InputError, AdapterError,
            AdapterRequiredError
        """
        trained = None if adapter is None else load_adapter(adapter)
        check_strategy(strategy, trained)
        loaded, tokenizer, name = load(model, device, dtype)
        opened = partial(
            open_store,
            store,
            ram_bytes,
            budget=budget,
            encryption_key=encryption_key,
            remote=remote,
        )
        engine = cls(
            loaded,
            tokenizer,
            name=name,
            store=MemoryStore() if codec == AUTO else opened(codec=codec),
            strategy=strategy,
            adapter=trained,
            merge_adapter=merge_adapter,
            encode_behind=encode_behind,
            recompute_tokens=recompute_tokens,
            recompute_by=recompute_by,
            prompt=prompt,
            cache_after=cache_after,
            fidelity_rate=fidelity_rate,
            fidelity_limit=fidelity_limit,
        )
        if codec == AUTO:  # the engine measures which it is
            engine.store = opened(codec=resolve_codec(codec, store, engine))
        return engine

    def with_store(
        self, store: str | Path | KVStore | None, *, codec: str | None = None
    ) -> KVLinkEngine:
        """A twin that shares the model and keeps its caches in another store.

        Answers of both count in the same :attr:`fidelity_stats`. ``codec`` is as in
        :meth:`from_pretrained`.
        """
        twin = copy.copy(self)
        twin.store = open_store(store, codec=resolve_codec(codec, store, self))
        twin._prefetcher = Prefetcher(twin._wanted, twin._load_one)
        return twin

    def with_adapter(
        self, adapter: str | Path | Adapter | None, *, merge_adapter: bool | None = None
    ) -> KVLinkEngine:
        """A twin with another adapter, or none, that shares the base model's weights and the store.

        It keeps the strategy; `link` becomes `reuse` where the other has no link tokens.

        What this engine was given as ``encode_behind`` and ``prompt`` stays; what it was not given
        is the other adapter's. ``merge_adapter`` None stays as it is.

        Raises:
            AdapterError: as :meth:`from_pretrained`.
        """
        encode_behind, prompt, merged = self._chosen
        trained = None if adapter is None else load_adapter(adapter)
        linked = trained is not None and trained.links is not None
        twin = KVLinkEngine(
            self._base,
            self.tokenizer,
            name=self.name,
            store=self.store,
            strategy="reuse" if self.strategy == "link" and not linked else self.strategy,
            adapter=trained,
            merge_adapter=merged if merge_adapter is None else merge_adapter,
            encode_behind=encode_behind,
            recompute_tokens=self.recompute_tokens,
            recompute_by=self.recompute_by,
            prompt=prompt,
            cache_after=self.cache_after,
            fidelity_rate=self._monitor.rate,
            fidelity_limit=self._monitor.limit,
        )
        twin._scratch = self._scratch  # one for all that share the lock
        twin.observers = self.observers
        return twin

    # Indexing

    def index(self, chunks: Iterable[str | Chunk], *, progress: bool = True) -> IndexReport:
        """Encode and store the caches that the store lacks; idempotent.

        Every chunk's id (see :class:`Chunk`) refers to its cache afterwards; with ``cache_after``,
        to one that is still to come.

        Raises:
            InputError: a chunk is empty or longer than the model's context.
            StoreError: a cache cannot be written; those written before stay.
        """
        report = Indexing(self, as_chunks(chunks)).run(progress)
        self.observers.tell(report)
        return report

    # Prefill

    def prefetch(self, chunks: Iterable[str | Chunk]) -> None:
        """Begin to load the caches of chunks that will probably be asked about; returns at once.

        Each is handed to the first answer that needs it; some hundred wait, the oldest are let go
        of. What is not stored is not computed ahead.

        Raises:
            InputError: a chunk is empty.
        """
        self._prefetcher.start(as_chunks(chunks))

    def prefill(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        *,
        strategy: Strategy | None = None,
        system: str | None = None,
        recompute_tokens: int | None = None,
        recompute_by: RecomputeBy | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prefill:
        """Everything up to the logits of the first answer token.

        Caches that were missing are computed in place and stored before this returns.

        Raises:
            InputError, AdapterRequiredError: as :meth:`answer`.
        """
        request = self._request(
            question, chunks, strategy, system, recompute_tokens, recompute_by, tools
        )
        prefill, computed = self._prefill(request, 0, Stopwatch())
        self._keep(computed)
        self.observers.tell(prefill.report)
        return prefill

    def _request(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        strategy: Strategy | None,
        system: str | None,
        recompute_tokens: int | None,
        recompute_by: RecomputeBy | None,
        tools: Sequence[Mapping[str, Any]],
    ) -> Request:
        self._check_unchanged()
        recompute = self.recompute_tokens if recompute_tokens is None else recompute_tokens
        if recompute < 0:
            raise InputError(f"recompute_tokens must be 0 or more, not {recompute}")
        messages = as_messages(question, system)
        chosen = check_strategy(strategy or self.strategy, self.adapter)
        by = check_recompute_by(recompute_by or self.recompute_by)
        return Request(messages, as_chunks(chunks), chosen, recompute, by, tools)

    # Answers

    def stream(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        *,
        strategy: Strategy | None = None,
        system: str | None = None,
        recompute_tokens: int | None = None,
        recompute_by: RecomputeBy | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> AnswerStream:
        """The answer piece by piece; ``.report``, ``.text`` and ``.token_ids`` afterwards.

        Arguments and errors as :meth:`answer`. Also an async iterator.
        """
        request = self._request(
            question, chunks, strategy, system, recompute_tokens, recompute_by, tools
        )
        return AnswerStream(self, request, GenerateSettings.of(settings))

    def answer(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        *,
        strategy: Strategy | None = None,
        system: str | None = None,
        recompute_tokens: int | None = None,
        recompute_by: RecomputeBy | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> Answer:
        """Answer a question from chunks, in the order given.

        Args:
            question: a text, or the chat messages of a conversation
                (:data:`kvlink_rag.Message`); :data:`kvlink_rag.CHUNKS` in one of them
                says where the chunks stand.
            chunks: may be empty; what is not in the store is computed in place and stored.
            strategy: overrides the engine's.
            system: replaces the model's default system prompt; caches stay usable.
            recompute_tokens, recompute_by: override the engine's.
            tools: JSON schemas of functions that the model may call, if its chat template shows
                tools (``engine.layout.supports_tools``); its calls are part of the text.
            settings: ``max_new_tokens``, ``temperature``, ``top_p``, ``stop``, ``seed``
                (:class:`GenerateSettings`). Greedy by default.

        Raises:
            InputError: empty question or chunk, a prompt longer than the model's context, or a
                setting out of range.
            AdapterRequiredError: `link` without an adapter.
        """
        stream = self.stream(
            question,
            chunks,
            strategy=strategy,
            system=system,
            recompute_tokens=recompute_tokens,
            recompute_by=recompute_by,
            tools=tools,
            **settings,
        )
        return stream.finished()

    def answer_batch(
        self,
        asked: Iterable[tuple[str | Sequence[Message], Iterable[str | Chunk]]],
        *,
        strategy: Strategy | None = None,
        system: str | None = None,
        recompute_tokens: int | None = None,
        recompute_by: RecomputeBy | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> list[Answer]:
        """Answers to several questions, each with its own chunks, in their order.

        Where chunks are attended in place (:attr:`in_place`, strategies `reuse` and `link`), those
        that several questions share are loaded and held once, and one forward pass serves all of
        them: each answer is there later than alone, all together sooner. Otherwise, and with a
        fidelity rate, they are answered one after the other. Nothing is answered if one of them is
        refused.

        Args:
            asked: pairs of a question and its chunks; arguments and errors else as :meth:`answer`.
        """
        requests = [
            self._request(question, chunks, strategy, system, recompute_tokens, recompute_by, tools)
            for question, chunks in asked
        ]
        chosen = GenerateSettings.of(settings)
        together = self.in_place and not self._monitor.rate
        if requests and together and requests[0].strategy in ("reuse", "link"):
            return answer_together(self, requests, chosen)
        for request in requests:  # refuse before the first is answered
            self._prompt(request, chosen.max_new_tokens)
        streams = [AnswerStream(self, request, chosen) for request in requests]
        return [stream.finished() for stream in streams]

    # Fidelity

    @property
    def fidelity_stats(self) -> FidelityStats:
        """What the checks of answers (``fidelity_rate``) have found so far."""
        return self._monitor.stats

    def fidelity(
        self,
        question: str | Sequence[Message],
        chunks: Iterable[str | Chunk],
        *,
        strategy: Strategy | None = None,
        system: str | None = None,
        recompute_tokens: int | None = None,
        recompute_by: RecomputeBy | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Fidelity:
        """How far a strategy's first-token distribution is from that of full prefill.

        Both with the same adapter; the full prompt has no link tokens or marks. Not part of
        :attr:`fidelity_stats`. Arguments and errors as :meth:`prefill`.
        """
        request = self._request(
            question, chunks, strategy, system, recompute_tokens, recompute_by, tools
        )
        prefill, computed = self._prefill(request, 0, Stopwatch())
        self._keep(computed)
        return self._compare(request, prefill, 0)[0]

    def _to_check(self, request: Request) -> bool:
        """Whether this answer is one of those that are compared with full prefill."""
        return request.strategy != "full" and bool(request.chunks) and self._monitor.choose()

    def _compare(
        self, request: Request, prefill: Prefill, new_tokens: int
    ) -> tuple[Fidelity, Prefill]:
        """A prefill's fidelity, and the full prefill of the same request."""
        full, _ = self._prefill(replace(request, strategy="full"), new_tokens, Stopwatch())
        with self._model_lock:
            return compare(full.logits, prefill.logits), full

    def _tokens(self, prefill: Prefill, sampler: Sampler, first: int, count: int) -> Iterator[int]:
        """The first token, then up to ``count - 1`` more, ending with an end token."""
        token = first
        for produced in range(1, count + 1):
            yield token
            if produced == count or token in self.stop_ids:
                return
            with self._model_lock:
                token = sampler.choose(prefill.run([token]))

    # Async twins: the work runs in a thread, the event loop stays free.

    async def aindex(self, chunks: Iterable[str | Chunk], *, progress: bool = True) -> IndexReport:
        """:meth:`index` in a thread."""
        return await asyncio.to_thread(self.index, chunks, progress=progress)

    async def aprefill(
        self, question: str | Sequence[Message], chunks: Iterable[str | Chunk], **options: Any
    ) -> Prefill:
        """:meth:`prefill` in a thread."""
        return await asyncio.to_thread(self.prefill, question, chunks, **options)

    async def afidelity(
        self, question: str | Sequence[Message], chunks: Iterable[str | Chunk], **options: Any
    ) -> Fidelity:
        """:meth:`fidelity` in a thread."""
        return await asyncio.to_thread(self.fidelity, question, chunks, **options)

    async def aanswer_batch(
        self,
        asked: Iterable[tuple[str | Sequence[Message], Iterable[str | Chunk]]],
        **options: Any,
    ) -> list[Answer]:
        """:meth:`answer_batch` in a thread."""
        return await asyncio.to_thread(self.answer_batch, asked, **options)

    async def aanswer(
        self, question: str | Sequence[Message], chunks: Iterable[str | Chunk], **options: Any
    ) -> Answer:
        """:meth:`answer` in a thread."""
        return await asyncio.to_thread(self.answer, question, chunks, **options)

    def astream(
        self, question: str | Sequence[Message], chunks: Iterable[str | Chunk], **options: Any
    ) -> AnswerStream:
        """:meth:`stream` for ``async for``."""
        return self.stream(question, chunks, **options)
