"""The engine: index chunks once, answer questions from their linked caches."""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlink_rag.adapter import Adapter, LinkTokens, load_adapter, shipped_adapters
from kvlink_rag.answer import Answer, AnswerStream, Request
from kvlink_rag.architecture import Architecture, inspect_model
from kvlink_rag.batch import answer_together
from kvlink_rag.chunk import Chunk, ChunkKV, as_chunks, chunk_key
from kvlink_rag.conversation import Message, as_messages
from kvlink_rag.encode import Encoder
from kvlink_rag.errors import AdapterRequiredError, InputError, KVLinkWarning, StoreError
from kvlink_rag.fidelity import Fidelity, FidelityMonitor, FidelityStats, compare
from kvlink_rag.forward import run_at, run_behind
from kvlink_rag.generate import GenerateSettings, Sampler, stop_ids
from kvlink_rag.in_place import LinkedContext, Span
from kvlink_rag.link import ContextCache
from kvlink_rag.load import Source, load
from kvlink_rag.prefetch import Prefetcher, Wanted
from kvlink_rag.prefill import Prefill, Prompt, RecomputeBy, Segment, SegmentKind, Strategy
from kvlink_rag.progress import bar
from kvlink_rag.prompt import (
    DEFAULT_BEHIND,
    EncodeBehind,
    PromptLayout,
    PromptParts,
    PromptTemplate,
)
from kvlink_rag.relevance import attention_paid
from kvlink_rag.report import IndexReport, Report, Stopwatch
from kvlink_rag.store import KVStore, open_store

_Computed = tuple[ChunkKV, list[str]]
"""A record that was computed, and ids of the documents that refer to it."""

BATCH_TOKENS = {"cpu": 1536}
"""Padded tokens in one forward pass while indexing; other devices than these take 16,384."""


class KVLinkEngine:
    """A causal language model with a store of chunk caches.

    Make one with :meth:`from_pretrained`. Safe to use from several threads: forward passes run one
    at a time, everything else of an answer is its own.

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
        encode_behind: EncodeBehind | None = None,
        recompute_tokens: int = 16,
        recompute_by: RecomputeBy = "first",
        prompt: PromptTemplate | None = None,
        fidelity_rate: float = 0.0,
        fidelity_limit: float | None = None,
    ) -> None:
        self._monitor = FidelityMonitor(fidelity_rate, fidelity_limit)
        self.adapter = adapter
        self._base = model
        self._chosen = (encode_behind, prompt)
        if adapter is not None:
            adapter.check_vocabulary(model, tokenizer)
        self.model, self.reader = adapter.apply(model) if adapter else (model, model)
        self.tokenizer = tokenizer
        self.name = name
        self.store = store
        self.architecture: Architecture = inspect_model(self.model, name)
        self.layout = PromptLayout(tokenizer, prompt or (adapter.prompt if adapter else None))
        if encode_behind is None:
            encode_behind = adapter.encode_behind if adapter else DEFAULT_BEHIND
        if encode_behind not in get_args(EncodeBehind):
            raise InputError(
                f"encode_behind must be one of {get_args(EncodeBehind)}, not {encode_behind!r}"
            )
        self.behind = tuple(self.layout.behind(encode_behind))
        self.strategy = _check_strategy(strategy, adapter)
        self.recompute_tokens = recompute_tokens
        self.recompute_by = _check_recompute_by(recompute_by)
        self.in_place = self.architecture.foldable
        self._encoder = Encoder(self.model, self.architecture)
        self.batch_tokens = BATCH_TOKENS.get(self.architecture.device.type, 16_384)
        self.stop_ids = stop_ids(model, tokenizer)
        self._model_lock = threading.RLock()
        self._prefetcher = Prefetcher(self._wanted, self._load_one)

    @classmethod
    def from_pretrained(
        cls,
        model: Source,
        *,
        store: str | Path | KVStore | None = None,
        ram_bytes: int = 0,
        strategy: Strategy = "reuse",
        adapter: str | Path | Adapter | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        encode_behind: EncodeBehind | None = None,
        recompute_tokens: int = 16,
        recompute_by: RecomputeBy = "first",
        prompt: PromptTemplate | None = None,
        fidelity_rate: float = 0.0,
        fidelity_limit: float | None = None,
    ) -> KVLinkEngine:
        """Load a model and check that chunk caches are exact for it.

        Args:
            model: hub id, local folder, GGUF file (loaded with dense weights), or a
                ``(model, tokenizer)`` pair already in memory.
            store: folder for chunk caches, or any store; None keeps them in memory.
            ram_bytes: keep so much of what was read last from the folder in memory, which spares
                reading and verifying it.
            strategy: the default for every answer: `reuse`, `recompute`, `full`, or with an adapter
                `link`.
            adapter: trained link tokens and LoRA: the folder that ``kvlink train`` made, or the
                name of one that comes with the package, such as `smollm2-135m-link5`, or of a
                preset (:mod:`kvlink_rag.presets`). It is active in every strategy.
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
            fidelity_rate: share of the answers, 0 ... 1, chosen at random, that are compared with
                full prefill (:class:`kvlink_rag.fidelity.Fidelity`): in ``report.fidelity`` and
                :attr:`fidelity_stats`. After the answer, unless there is a limit. Answers with
                strategy `full` or without chunks are never checked.
            fidelity_limit: divergence from full prefill (KL, nats) above which a checked answer is
                that of full prefill instead. The check then comes before the first token.

        Raises:
            ModelNotFoundError, UnsupportedModelError, StoreError, InputError, AdapterError,
            AdapterRequiredError
        """
        trained = None if adapter is None else load_adapter(adapter)
        _check_strategy(strategy, trained)
        loaded, tokenizer, name = load(model, device, dtype)
        return cls(
            loaded,
            tokenizer,
            name=name,
            store=open_store(store, ram_bytes),
            strategy=strategy,
            adapter=trained,
            encode_behind=encode_behind,
            recompute_tokens=recompute_tokens,
            recompute_by=recompute_by,
            prompt=prompt,
            fidelity_rate=fidelity_rate,
            fidelity_limit=fidelity_limit,
        )

    @property
    def fingerprint(self) -> str:
        """Identity of the model, part of every cache's key."""
        return self.architecture.fingerprint

    def with_store(self, store: str | Path | KVStore | None) -> KVLinkEngine:
        """A twin that shares the model and keeps its caches in another store.

        Answers of both count in the same :attr:`fidelity_stats`.
        """
        twin = copy.copy(self)
        twin.store = open_store(store)
        twin._prefetcher = Prefetcher(twin._wanted, twin._load_one)
        return twin

    def with_adapter(self, adapter: str | Path | Adapter | None) -> KVLinkEngine:
        """A twin with another adapter, or none, that shares the base model's weights and the store.

        It keeps the strategy; `link` becomes `reuse` where the other has no link tokens.

        What this engine was given as ``encode_behind`` and ``prompt`` stays; what it was not given
        is the other adapter's.

        Raises:
            AdapterError: as :meth:`from_pretrained`.
        """
        encode_behind, prompt = self._chosen
        trained = None if adapter is None else load_adapter(adapter)
        linked = trained is not None and trained.links is not None
        with self._model_lock:  # forward passes set attention and masks of the base model
            twin = KVLinkEngine(
                self._base,
                self.tokenizer,
                name=self.name,
                store=self.store,
                strategy="reuse" if self.strategy == "link" and not linked else self.strategy,
                adapter=trained,
                encode_behind=encode_behind,
                recompute_tokens=self.recompute_tokens,
                recompute_by=self.recompute_by,
                prompt=prompt,
                fidelity_rate=self._monitor.rate,
                fidelity_limit=self._monitor.limit,
            )
        twin._model_lock = self._model_lock
        return twin

    def keys(self, chunks: Iterable[str | Chunk]) -> list[str]:
        """The store's keys of chunks, in order."""
        return [self._key(self.layout.chunk(chunk)) for chunk in as_chunks(chunks)]

    def _wanted(self, chunk: Chunk) -> Wanted:
        return tuple(self.layout.chunk(chunk)), self.behind

    def _key(self, token_ids: Sequence[int]) -> str:
        return chunk_key(self.fingerprint, self.behind, token_ids)

    def cache_of(
        self, token_ids: Sequence[int], behind: Sequence[int], *, keep: bool = True
    ) -> ChunkKV:
        """The cache of tokens encoded behind others, from the store or computed (and stored)."""
        wanted = (tuple(token_ids), tuple(behind))
        record = self._load([wanted])[wanted]
        if record is None:
            record = self._compute({wanted: None})[wanted]
            if keep:
                self._keep([(record, [])])
        return record

    # Indexing

    def index(self, chunks: Iterable[str | Chunk], *, progress: bool = True) -> IndexReport:
        """Encode and store the caches that the store lacks; idempotent.

        Every chunk's id (see :class:`Chunk`) refers to its cache afterwards.

        Raises:
            InputError: a chunk is empty or longer than the model's context.
            StoreError: a cache cannot be written; those written before stay.
        """
        watch, given = Stopwatch(), as_chunks(chunks)
        texts: dict[str, list[int]] = {}
        owners: dict[str, list[str]] = {}
        for chunk in given:
            token_ids = self.layout.chunk(chunk)
            self._check_length(len(self.behind) + len(token_ids), f"chunk {chunk.document_id!r}")
            key = self._key(token_ids)
            texts[key] = token_ids
            owners.setdefault(key, []).append(chunk.document_id)
        missing = {key: ids for key, ids in texts.items() if not self.store.has(key)}
        known = [(owner, key) for key in texts if key not in missing for owner in owners[key]]
        self.store.refer(known)
        nbytes = self._encode_and_store(missing, owners, progress)
        return IndexReport(
            chunks=len(given),
            hits=sum(len(owners[key]) for key in texts if key not in missing),
            misses=len(missing),
            tokens=sum(map(len, missing.values())),
            nbytes=nbytes,
            total_s=watch.total(),
        )

    def _encode_and_store(
        self, missing: dict[str, list[int]], owners: dict[str, list[str]], progress: bool
    ) -> int:
        """Encode batch by batch while the batch before is being written; returns bytes."""
        keys, nbytes, done = list(missing), 0, 0
        total = sum(map(len, missing.values()))
        with (
            bar("Reading chunks (tokens)", total, enabled=progress and bool(missing)) as show,
            ThreadPoolExecutor(1) as writer,
        ):
            writing: Future[None] | None = None
            for batch in self._encode([missing[key] for key in keys]):
                if writing:
                    writing.result()
                writing = writer.submit(self._put, [(r, owners[keys[i]]) for i, r in batch])
                nbytes += sum(record.nbytes for _, record in batch)
                done += sum(len(record.token_ids) for _, record in batch)
                show(done)
            if writing:
                writing.result()
        return nbytes

    def _put(self, records: Iterable[tuple[ChunkKV, Sequence[str]]]) -> None:
        for record, documents in records:
            self.store.put(record, documents)

    def _encode(self, texts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, ChunkKV]]]:
        batches = self._encoder.encode(texts, self.behind, max_batch_tokens=self.batch_tokens)
        while True:
            with self._model_lock:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

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
        recompute = self.recompute_tokens if recompute_tokens is None else recompute_tokens
        if recompute < 0:
            raise InputError(f"recompute_tokens must be 0 or more, not {recompute}")
        messages = as_messages(question, system)
        chosen = _check_strategy(strategy or self.strategy, self.adapter)
        by = _check_recompute_by(recompute_by or self.recompute_by)
        return Request(messages, as_chunks(chunks), chosen, recompute, by, tools)

    def _prefill(
        self, request: Request, new_tokens: int, watch: Stopwatch
    ) -> tuple[Prefill, list[_Computed]]:
        """The prefill and the records it had to compute (not yet stored)."""
        report = Report(request.strategy)
        prompt = self._prompt(request, new_tokens)
        report.context_tokens = len(prompt.token_ids)
        report.tokenize_s = watch.lap()
        computed: list[_Computed] = []
        context: ContextCache | LinkedContext
        if request.strategy == "full":
            context = self._encoder.new_cache(prompt.room)
        else:
            found = self._load(prompt.wanted)
            report.load_s = watch.lap()
            made = self._compute(found)
            report.encode_s = watch.lap()
            context = self._link(request, prompt, found, made, report)
            computed = self._computed(request, prompt, made)
            report.link_s = watch.lap()
        segments, links = prompt.segments, self._links(request)
        with self._model_lock:
            if request.strategy == "recompute" and request.recompute_by == "question":
                segments = self._most_attended(request, prompt, context, report)
            anew, rest = _active_positions(segments, request.strategy)
            logits = self._forward(context, prompt.token_ids, anew, rest, links)
        report.forward_s = watch.lap()
        report.computed_tokens += len(anew) + len(rest)
        report.ttft_s = watch.laps()
        return self._prefilled(prompt, segments, logits, report, context, links), computed

    def _prefilled(
        self,
        prompt: Prompt,
        segments: list[Segment],
        logits: torch.Tensor,
        report: Report,
        context: ContextCache | LinkedContext,
        links: LinkTokens | None,
    ) -> Prefill:
        positions = list(range(len(prompt.token_ids)))
        return Prefill(
            logits, prompt.token_ids, positions, segments, report, context, self.reader, links
        )

    def _prompt(self, request: Request, new_tokens: int) -> Prompt:
        """The prompt's token ids and what they are.

        Raises:
            InputError: it is too long, or its messages do not fit the chat template.
        """
        around = self._around(request)
        token_ids: list[int] = []
        segments: list[Segment] = []
        for kind, slot, ids in self._parts(request, around):
            start, stop = len(token_ids), len(token_ids) + len(ids)
            token_ids += ids
            if kind == "chunk" and request.strategy != "full":
                first = request.strategy == "recompute" and request.recompute_by == "first"
                view = range(min(request.recompute, len(ids)) if first else 0)
                segments.append(Segment(kind, start, stop, slot, self.behind, view))
            else:
                segments.append(Segment(kind, start, stop, slot, full_view=range(len(ids))))
        room = len(token_ids) + new_tokens
        self._check_length(room, "the prompt with its answer")
        return Prompt(token_ids, segments, room, around.lasting)

    def _around(self, request: Request) -> PromptParts:
        """Token ids around the chunks, the adapter's among them where chunks are linked."""
        parts = self.layout.lay_out(
            request.messages, tools=request.tools, with_chunks=bool(request.chunks)
        )
        if self.adapter is None or not request.chunks or request.strategy == "full":
            return parts
        before, behind = self.adapter.around
        return replace(parts, prefix=[*parts.prefix, *before], question=[*behind, *parts.question])

    def _parts(
        self, request: Request, around: PromptParts
    ) -> Iterator[tuple[SegmentKind, int | None, list[int]]]:
        """Kind, slot and token ids of the prompt's parts, in order."""
        links, count = self._links(request), len(request.chunks)
        yield "prefix", None, around.prefix
        for slot, chunk in enumerate(request.chunks):
            yield "chunk", slot, self.layout.chunk(chunk)
            if links is not None and (ids := links.ids(slot, count)):
                yield "link", slot, ids
        yield "question", None, around.question

    def _links(self, request: Request) -> LinkTokens | None:
        """The link tokens that are part of a request's prompt."""
        return self.adapter.links if self.adapter and request.strategy == "link" else None

    def _link(
        self,
        request: Request,
        prompt: Prompt,
        found: Mapping[Wanted, ChunkKV | None],
        made: Mapping[Wanted, ChunkKV],
        report: Report,
    ) -> ContextCache | LinkedContext:
        """The context up to the question; reports what it is made of.

        Args:
            found, made: at least what the prompt wants: from the store, and computed.
        """
        spans = []
        for segment, wanted in zip(prompt.cached, prompt.wanted, strict=True):
            record, text = found[wanted], wanted[0]
            if segment.kind == "chunk":
                report.hits += record is not None
                report.misses += record is None
            if record is not None:
                report.reused_tokens += len(text)
            if text:
                spans.append(Span(record or made[wanted], segment.start))
        mine = dict.fromkeys(prompt.wanted)
        report.bytes_read = sum(record.nbytes for each in mine if (record := found[each]))
        missing = [wanted for wanted in mine if found[wanted] is None]
        report.computed_tokens = sum(len(text) for text, _ in missing)
        report.computed_tokens += sum(len(behind) for behind in {behind for _, behind in missing})
        return self._linked(spans, prompt.room, request.strategy, prompt.segments[-1].start)

    def _computed(
        self, request: Request, prompt: Prompt, made: Mapping[Wanted, ChunkKV]
    ) -> list[_Computed]:
        """What a prompt wants and was made, with the ids of the chunks that refer to it."""
        owners: dict[Wanted, list[str]] = {}
        for wanted, chunk in zip(prompt.wanted[1:], request.chunks, strict=True):
            if chunk.id is not None:
                owners.setdefault(wanted, []).append(chunk.id)
        # a conversation goes on: nobody will ask for its prefix again
        kept = prompt.wanted if prompt.lasting else prompt.wanted[1:]
        return [(made[each], owners.get(each, [])) for each in dict.fromkeys(kept) if each in made]

    def _linked(
        self, spans: list[Span], room: int, strategy: Strategy, length: int
    ) -> ContextCache | LinkedContext:
        """Spans as one context; places of link tokens are left to the forward pass."""
        if self.in_place and strategy in ("reuse", "link"):
            own = self._encoder.new_cache(room - sum(span.stop - span.start for span in spans))
            return LinkedContext(self.architecture, spans, own)
        cache = self._encoder.new_cache(room)
        for span in spans:
            cache.place(span.record, span.start, self.architecture.groups)
        cache.set_length(length)
        return cache

    def _most_attended(
        self,
        request: Request,
        prompt: Prompt,
        cache: ContextCache | LinkedContext,
        report: Report,
    ) -> list[Segment]:
        """The segments, with those tokens of chunks in full view that the question attends to most.

        Args:
            cache: the linked context, up to the question.
        """
        assert isinstance(cache, ContextCache)  # as `recompute` has it
        segments = prompt.segments
        places = [p for s in segments if s.kind == "chunk" for p in range(s.start, s.stop)]
        budget = min(request.recompute * len(request.chunks), len(places))
        chosen = set(places[:budget])
        if 0 < budget < len(places):  # else none or all, and nothing to measure
            question = prompt.token_ids[segments[-1].start :]
            paid = attention_paid(self.reader, cache, question)[places]
            report.computed_tokens += len(question)
            chosen = {places[i] for i in paid.topk(budget).indices.tolist()}
        return [
            replace(s, full_view=tuple(i for i in range(s.stop - s.start) if s.start + i in chosen))
            if s.kind == "chunk"
            else s
            for s in segments
        ]

    def _load(self, wanted: Iterable[Wanted]) -> dict[Wanted, ChunkKV | None]:
        """Records from the store, compared with what was asked for: no digest is trusted alone."""
        return {
            each: self._prefetcher.take(each) or self._load_one(each)
            for each in dict.fromkeys(wanted)
        }

    def _load_one(self, wanted: Wanted) -> ChunkKV | None:
        text, behind = wanted
        record = self.store.get(chunk_key(self.fingerprint, behind, text)) if text else None
        if record and not record.is_for(self.fingerprint, behind, text):
            warnings.warn(
                f"the store's entry {record.key[:12]}... is for other tokens or another model; "
                "computing it anew",
                KVLinkWarning,
                stacklevel=2,
            )
            return None
        return record

    def _compute(self, found: Mapping[Wanted, ChunkKV | None]) -> dict[Wanted, ChunkKV]:
        """Encode what was not found: chunks behind ``self.behind``, the prefix alone."""
        computed: dict[Wanted, ChunkKV] = {}
        missing = [wanted for wanted, record in found.items() if record is None]
        for behind in {behind for _, behind in missing}:
            texts = [text for text, its in missing if its == behind and text]
            with self._model_lock:
                for batch in self._encoder.encode(
                    texts, behind, max_batch_tokens=self.batch_tokens
                ):
                    computed |= {(texts[i], behind): record for i, record in batch}
        return computed

    def _forward(
        self,
        context: ContextCache | LinkedContext,
        token_ids: list[int],
        anew: list[int],
        rest: list[int],
        links: LinkTokens | None,
    ) -> torch.Tensor:
        """Logits of the prompt's last token: context tokens by the model, the rest by the reader.

        Args:
            anew: positions in prefix and chunks that are to be computed.
            rest: positions of link tokens and question, computed after all of the context.
        """
        if isinstance(context, LinkedContext):
            return context.run(self.reader, [token_ids[place] for place in rest], rest, links)
        if self.reader is self.model:
            anew, rest = [], [*anew, *rest]
        if anew:
            self._run(self.model, context, token_ids, anew, None)
        return self._run(self.reader, context, token_ids, rest, links)

    def _run(
        self,
        model: PreTrainedModel,
        cache: ContextCache,
        token_ids: list[int],
        places: list[int],
        links: LinkTokens | None,
    ) -> torch.Tensor:
        """Run the tokens at ``places``, each seeing everything before it."""
        ids = [token_ids[place] for place in places]
        if places[-1] - places[0] + 1 == len(places):
            cache.set_length(places[0])
            return run_behind(model, cache, ids, links)
        return run_at(model, self.architecture, cache, ids, places, links)

    def _keep(self, computed: Iterable[_Computed]) -> None:
        """Store what an answer had to compute; an answer never fails for want of disk."""
        try:
            self._put(computed)
        except StoreError as error:
            warnings.warn(f"computed caches are not kept: {error}", KVLinkWarning, stacklevel=3)

    def _check_length(self, tokens: int, what: str) -> None:
        limit = self.architecture.max_tokens
        if tokens > limit:
            raise InputError(
                f"{what} takes {tokens} tokens and {self.name} has a context of {limit}: use fewer "
                "or smaller chunks, or fewer new tokens"
            )

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
        return AnswerStream(self, request, _settings(settings))

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
                (:data:`kvlink_rag.conversation.Message`); :data:`kvlink_rag.CHUNKS` in one of them
                says where the chunks stand.
            chunks: may be empty; what is not in the store is computed in place and stored.
            strategy: overrides the engine's.
            system: replaces the model's default system prompt; caches stay usable.
            recompute_tokens, recompute_by: override the engine's.
            tools: JSON schemas of functions that the model may call, if its chat template shows
                tools (``engine.layout.supports_tools``); its calls are part of the text.
            settings: ``max_new_tokens``, ``temperature``, ``top_p``, ``stop``, ``seed``
                (:class:`kvlink_rag.generate.GenerateSettings`). Greedy by default.

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
        chosen = _settings(settings)
        for request in requests:
            self._prompt(request, chosen.max_new_tokens)
        together = self.in_place and not self._monitor.rate
        if requests and together and requests[0].strategy in ("reuse", "link"):
            return answer_together(self, requests, chosen)
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
        return compare(full.logits, prefill.logits), full

    def _tokens(self, prefill: Prefill, sampler: Sampler, first: int, count: int) -> Iterator[int]:
        """The first token, then up to ``count - 1`` more, ending with an end token."""
        token = first
        for produced in range(1, count + 1):
            yield token
            if produced == count or token in self.stop_ids:
                return
            with self._model_lock:
                logits = prefill.run([token])
            token = sampler.choose(logits)

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


def _active_positions(
    segments: Sequence[Segment], strategy: Strategy
) -> tuple[list[int], list[int]]:
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


def _check_strategy(strategy: str, adapter: Adapter | None) -> Strategy:
    if strategy == "link" and (adapter is None or adapter.links is None):
        raise AdapterRequiredError(
            "strategy 'link' needs an adapter with trained link tokens, and the engine has none: "
            f"give adapter= one of {', '.join(shipped_adapters()) or 'your own'} or a folder made "
            "by kvlink train, or use 'reuse' or 'recompute'"
        )
    if strategy not in get_args(Strategy):
        raise InputError(f"strategy must be one of {get_args(Strategy)}, not {strategy!r}")
    return cast("Strategy", strategy)


def _check_recompute_by(by: str) -> RecomputeBy:
    if by not in get_args(RecomputeBy):
        raise InputError(f"recompute_by must be one of {get_args(RecomputeBy)}, not {by!r}")
    return cast("RecomputeBy", by)


def _settings(settings: dict[str, Any]) -> GenerateSettings:
    try:
        return GenerateSettings(**settings)
    except TypeError as error:
        names = ", ".join(GenerateSettings.__dataclass_fields__)
        raise InputError(f"{str(error).split('() ')[-1]}: settings are {names}") from error
