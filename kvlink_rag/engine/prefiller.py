"""From a request to the logits of the first answer token."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlink_rag.adapters.adapter import Adapter, LinkTokens
from kvlink_rag.chunk import Chunk, ChunkKV, as_chunks, chunk_key
from kvlink_rag.common.threads import Threads
from kvlink_rag.engine.prefetch import Prefetcher, Wanted
from kvlink_rag.engine.prefill import Prefill, Prompt, Segment, SegmentKind, Strategy
from kvlink_rag.engine.report import Report, Stopwatch
from kvlink_rag.engine.request import Request
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.prompt.layout import (
    DEFAULT_BEHIND,
    EncodeBehind,
    PromptLayout,
    PromptParts,
    PromptTemplate,
)
from kvlink_rag.runners.transformers.architecture import Architecture, inspect_model
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.encode import Encoder
from kvlink_rag.runners.transformers.forward import run_at, run_behind
from kvlink_rag.runners.transformers.identity import adapter_state
from kvlink_rag.runners.transformers.in_place import LinkedContext, Span, serves
from kvlink_rag.runners.transformers.model_lock import lock_of
from kvlink_rag.runners.transformers.relevance import attention_paid
from kvlink_rag.runners.transformers.scratch import Scratch
from kvlink_rag.store import KVStore
from kvlink_rag.store.codec import codec_for

Computed = tuple[ChunkKV, list[str]]
"""A record that was computed, and ids of the documents that refer to it."""


@dataclass(frozen=True)
class Made:
    """What had to be computed.

    Attributes:
        records: the caches.
        before: tokens that ran for what they are encoded behind: none where that was kept.
    """

    records: dict[Wanted, ChunkKV]
    before: dict[tuple[int, ...], int]


BATCH_TOKENS = {"cpu": 1536}
"""Padded tokens in one forward pass while indexing; other devices than these take 16,384."""

LOAD_THREADS = 4
"""Caches of a prompt that are read and verified at a time."""


class Prefiller:
    """What an engine does before it answers: lay out the prompt, load, compute, link, run.

    Attributes are those of :class:`kvlink_rag.KVLinkEngine`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        store: KVStore,
        adapter: Adapter | None,
        merge_adapter: bool,
        encode_behind: EncodeBehind | None,
        prompt: PromptTemplate | None,
        cache_after: int,
    ) -> None:
        if not isinstance(cache_after, int) or isinstance(cache_after, bool) or cache_after < 0:
            raise InputError(
                f"cache_after is {cache_after!r}: pass 0 to store caches when chunks are indexed, "
                "or after how many retrievals"
            )
        self.cache_after = cache_after
        self.adapter = adapter
        self.model = self.reader = model
        self._model_lock = lock_of(model)
        if adapter is not None:
            adapter.check_vocabulary(model, tokenizer)
        with self._model_lock:  # another engine may be running it
            if adapter is not None:
                self.model, self.reader = adapter.apply(model, merge=merge_adapter)
            self.architecture: Architecture = inspect_model(self.model, name)
        self._adapters_in_model = adapter_state(self.model)
        self.tokenizer = tokenizer
        self.name = name
        self.store = store
        self.layout = PromptLayout(tokenizer, prompt or (adapter.prompt if adapter else None))
        if encode_behind is None:
            encode_behind = adapter.encode_behind if adapter else DEFAULT_BEHIND
        if encode_behind not in get_args(EncodeBehind):
            raise InputError(
                f"encode_behind must be one of {get_args(EncodeBehind)}, not {encode_behind!r}"
            )
        self.behind = tuple(self.layout.behind(encode_behind))
        self.batch_tokens = BATCH_TOKENS.get(self.architecture.device.type, 16_384)
        self._encoder = Encoder(self.model, self.architecture)
        self._scratch = Scratch()  # used under the lock
        with self._model_lock:
            self.in_place = serves(self.reader, self.architecture)
        self._prefetcher = Prefetcher(self._wanted, self._load_one)
        self._loading = Threads("kvlink-load", LOAD_THREADS)
        self._tokens_per_s: float | None = None  # of computing caches; None before the first

    @property
    def fingerprint(self) -> str:
        """Identity of the model, part of every cache's key."""
        return self.architecture.fingerprint

    def _check_unchanged(self) -> None:
        """Refuse to go on where the model computes something else than when it was identified.

        Raises:
            InputError: one of its adapters was switched on or off meanwhile.
        """
        if self._adapters_in_model and adapter_state(self.model) != self._adapters_in_model:
            raise InputError(
                f"an adapter of {self.name} was switched, merged or scaled since the engine was "
                "made, and caches of one are wrong for the other: make an engine for it "
                "(KVLinkEngine.from_pretrained((model, tokenizer), store=...)), or switch it back"
            )

    def keys(self, chunks: Iterable[str | Chunk]) -> list[str]:
        """The store's keys of chunks, in order."""
        return [self._key(self.layout.chunk(chunk)) for chunk in as_chunks(chunks)]

    def _wanted(self, chunk: Chunk) -> Wanted:
        return tuple(self.layout.chunk(chunk)), self.behind

    def _key(self, token_ids: Sequence[int]) -> str:
        return self._key_behind(token_ids, self.behind)

    def _key_behind(self, token_ids: Sequence[int], behind: Sequence[int]) -> str:
        codec = codec_for(self.store.codec, self.architecture.dtype)
        return chunk_key(self.fingerprint, behind, token_ids, codec)

    def cache_of(
        self, token_ids: Sequence[int], behind: Sequence[int], *, keep: bool = True
    ) -> ChunkKV:
        """The cache of tokens encoded behind others, from the store or computed (and stored)."""
        wanted = (tuple(token_ids), tuple(behind))
        record = self._load([wanted])[wanted]
        if record is None:
            record = self._compute({wanted: None}).records[wanted]
            if keep:
                self._keep([(record, [])])
        return record

    def _prefill(
        self, request: Request, new_tokens: int, watch: Stopwatch
    ) -> tuple[Prefill, list[Computed]]:
        """The prefill and the records it had to compute (not yet stored)."""
        report = Report(request.strategy, started=watch.started)
        prompt = self._prompt(request, new_tokens)
        report.context_tokens = len(prompt.token_ids)
        report.tokenize_s = watch.lap()
        computed: list[Computed] = []
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
            fast = request.strategy != "full"
            logits = self._forward(context, prompt.token_ids, anew, rest, links, fast)
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

    def _check_length(self, tokens: int, what: str) -> None:
        limit = self.architecture.max_tokens
        if tokens > limit:
            raise InputError(
                f"{what} takes {tokens} tokens and {self.name} has a context of {limit}: use fewer "
                "or smaller chunks, or fewer new tokens"
            )

    def _load(self, wanted: Iterable[Wanted]) -> dict[Wanted, ChunkKV | None]:
        """Records from the store, compared with what was asked for: no digest is trusted alone."""
        each = list(dict.fromkeys(wanted))
        return dict(zip(each, self._loading.all(self._fetched, each), strict=True))

    def _fetched(self, wanted: Wanted) -> ChunkKV | None:
        return self._prefetcher.take(wanted) or self._load_one(wanted)

    def _load_one(self, wanted: Wanted) -> ChunkKV | None:
        text, behind = wanted
        if not text:
            return None
        rate = self._tokens_per_s
        within_s = None if rate is None else len(text) / rate  # else it is better computed
        record = self.store.get(self._key_behind(text, behind), within_s)
        if record and not record.is_for(self.fingerprint, behind, text):
            warnings.warn(
                f"the store's entry {record.key[:12]}... is for other tokens or another model; "
                "computing it anew",
                KVLinkWarning,
                stacklevel=2,
            )
            return None
        return record

    def _compute(self, found: Mapping[Wanted, ChunkKV | None]) -> Made:
        """Encode what was not found: chunks behind ``self.behind``, the prefix alone."""
        made = Made({}, {})
        missing = [wanted for wanted, record in found.items() if record is None]
        for behind in {behind for _, behind in missing}:
            texts = [text for text, its in missing if its == behind and text]
            with self._model_lock:
                watch = Stopwatch()
                made.before[behind] = 0 if self._encoder.has_encoded(behind) else len(behind)
                for batch in self._encoder.encode(
                    texts, behind, max_batch_tokens=self.batch_tokens
                ):
                    made.records.update(((texts[i], behind), record) for i, record in batch)
                self._note_speed(made.before[behind] + sum(map(len, texts)), watch.total())
        return made

    def _note_speed(self, tokens: int, seconds: float) -> None:
        """Remember how fast caches are computed, what was measured last above all."""
        if tokens:
            rate, before = tokens / seconds, self._tokens_per_s
            self._tokens_per_s = rate if before is None else 0.7 * before + 0.3 * rate

    def _link(
        self,
        request: Request,
        prompt: Prompt,
        found: Mapping[Wanted, ChunkKV | None],
        made: Made,
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
                spans.append(Span(record or made.records[wanted], segment.start))
        mine = dict.fromkeys(prompt.wanted)
        report.bytes_read = sum(record.nbytes for each in mine if (record := found[each]))
        missing = [wanted for wanted in mine if found[wanted] is None]
        report.computed_tokens = sum(len(text) for text, _ in missing)
        report.computed_tokens += sum(made.before[its] for its in {its for _, its in missing})
        return self._linked(spans, prompt.room, request.strategy, prompt.segments[-1].start)

    def _linked(
        self, spans: list[Span], room: int, strategy: Strategy, length: int
    ) -> ContextCache | LinkedContext:
        """Spans as one context; places of link tokens are left to the forward pass."""
        if self.in_place and strategy in ("reuse", "link"):
            own = self._encoder.new_cache(room - sum(span.stop - span.start for span in spans))
            return LinkedContext(self.architecture, spans, own, self._scratch)
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

    def _forward(
        self,
        context: ContextCache | LinkedContext,
        token_ids: list[int],
        anew: list[int],
        rest: list[int],
        links: LinkTokens | None,
        fast: bool,
    ) -> torch.Tensor:
        """Logits of the prompt's last token: context tokens by the model, the rest by the reader.

        Args:
            anew: positions in prefix and chunks that are to be computed.
            rest: positions of link tokens and question, computed after all of the context.
            fast: as :func:`kvlink_rag.runners.transformers.forward.run_behind`.
        """
        if isinstance(context, LinkedContext):
            return context.run(self.reader, [token_ids[place] for place in rest], rest, links)
        if self.reader is self.model:
            anew, rest = [], [*anew, *rest]
        if anew:
            self._run(self.model, context, token_ids, anew, None, fast)
        return self._run(self.reader, context, token_ids, rest, links, fast)

    def _run(
        self,
        model: PreTrainedModel,
        cache: ContextCache,
        token_ids: list[int],
        places: list[int],
        links: LinkTokens | None,
        fast: bool,
    ) -> torch.Tensor:
        """Run the tokens at ``places``, each seeing everything before it."""
        ids = [token_ids[place] for place in places]
        if places[-1] - places[0] + 1 == len(places):
            cache.set_length(places[0])
            return run_behind(model, cache, ids, links, fast=fast)
        return run_at(model, self.architecture, cache, ids, places, links)

    def _computed(self, request: Request, prompt: Prompt, made: Made) -> list[Computed]:
        """What a prompt wants and was made, with the ids of the chunks that refer to it."""
        owners: dict[Wanted, list[str]] = {}
        for wanted, chunk in zip(prompt.wanted[1:], request.chunks, strict=True):
            if chunk.id is not None:
                owners.setdefault(wanted, []).append(chunk.id)
        # a conversation goes on: nobody will ask for its prefix again
        kept = prompt.wanted if prompt.lasting else prompt.wanted[1:]
        records = made.records
        return [(records[w], owners.get(w, [])) for w in dict.fromkeys(kept) if w in records]

    def _keep(self, computed: Iterable[Computed]) -> None:
        """Store what an answer had to compute; an answer never fails for want of disk."""
        failed: StoreError | None = None
        try:
            for each in self._worth_keeping(computed):
                try:
                    self._put([each])
                except StoreError as error:  # another one may fit in the budget
                    failed = failed or error
        except StoreError as error:
            failed = error
        if failed is not None:
            warnings.warn(f"computed caches are not kept: {failed}", KVLinkWarning, stacklevel=3)

    def _worth_keeping(self, computed: Iterable[Computed]) -> list[Computed]:
        """Those that have now been asked for often enough (``cache_after``)."""
        listed = list(computed)
        if self.cache_after <= 1:
            return listed
        codec = codec_for(self.store.codec, self.architecture.dtype)
        keys = [record.key_as(codec) for record, _ in listed]
        distinct = list(dict.fromkeys(keys))
        times = dict(zip(distinct, self.store.count_misses(distinct), strict=True))
        return [c for c, key in zip(listed, keys, strict=True) if times[key] >= self.cache_after]

    def _put(self, records: Iterable[tuple[ChunkKV, Sequence[str]]]) -> None:
        for record, documents in records:
            self.store.put(record, documents)


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
