"""A prompt whose context is in a cache: what it consists of, and the logits behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from transformers import PreTrainedModel

from kvlink_rag.adapters.adapter import LinkTokens
from kvlink_rag.engine.prefetch import Wanted
from kvlink_rag.engine.report import Report
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.forward import run_behind
from kvlink_rag.runners.transformers.in_place import LinkedContext

Strategy = Literal["full", "reuse", "link", "recompute"]
"""How chunk caches become one context."""

RecomputeBy = Literal["first", "question"]
"""Which tokens `recompute` computes anew: the first of each chunk (EPIC, arXiv 2410.15332), or
those of all chunks that the question attends to most (ProphetKV, arXiv 2602.02579)."""

SegmentKind = Literal["prefix", "chunk", "link", "question"]


@dataclass(frozen=True)
class Segment:
    """A part of the prompt: ``token_ids[start:stop]``.

    Attributes:
        kind: `prefix`, `chunk`, `link` or `question` (everything behind the last chunk).
        slot: rank of the chunk, or of the chunk that a link token stands behind; None for prefix
            and question.
        behind: tokens the chunk was encoded behind: it saw a private copy of them, at the positions
            just before its own, and itself, nothing else. Empty when encoded alone, and for `full`,
            where a chunk sees everything before it (``slot`` and ``full_view`` tell).
        full_view: the tokens of the segment, as increasing offsets in it, that see everything
            before them in the prompt. The others of a chunk are as the chunk was encoded: they see
            ``behind`` and each other and, of the chunk's tokens in full view, the first version.
    """

    kind: SegmentKind
    start: int
    stop: int
    slot: int | None = None
    behind: tuple[int, ...] = ()
    full_view: Sequence[int] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        token_ids: from its first token to where the answer begins.
        segments: the parts of ``token_ids``, in order: prefix, chunks (and link tokens), question.
        room: tokens of prompt and answer.
        lasting: whether other questions have the same prefix.
    """

    token_ids: list[int]
    segments: list[Segment]
    room: int
    lasting: bool

    @cached_property
    def cached(self) -> list[Segment]:
        """Prefix and chunks, whose caches may be stored."""
        return [segment for segment in self.segments if segment.kind in ("prefix", "chunk")]

    @property
    def computed(self) -> list[int]:
        """Positions of link tokens and question."""
        computed = [s for s in self.segments if s.kind in ("link", "question")]
        return [place for segment in computed for place in range(segment.start, segment.stop)]

    @cached_property
    def wanted(self) -> list[Wanted]:
        """Of prefix and chunks the token ids, and what they are encoded behind."""
        return [(tuple(self.token_ids[s.start : s.stop]), s.behind) for s in self.cached]


@dataclass(eq=False)
class Prefill:
    """The state right before the first answer token.

    Attributes:
        logits: ``[vocab]`` float32, for the first answer token.
        token_ids: the whole prompt.
        positions: of each token, ``0 ... len(token_ids) - 1``.
        segments: the parts of ``token_ids``, in order.
        report: what it cost; ``ttft_s`` here ends with the logits.
        context: keys and values of the whole prompt.
        model: what link tokens and question ran through, and the answer runs through: the engine's
            model, with the LoRA of a cache-preserving adapter.
        links: the link tokens among ``token_ids``, whose ids are at or above the vocabulary's size
            unless they are part of it.
    """

    logits: torch.Tensor
    token_ids: list[int]
    positions: list[int]
    segments: list[Segment]
    report: Report
    context: ContextCache | LinkedContext
    model: PreTrainedModel
    links: LinkTokens | None = None

    @property
    def cache(self) -> ContextCache:
        """Keys and values of the whole prompt as a transformers ``Cache``.

        It can be given to ``model.generate(past_key_values=...)``, which then owns it. Chunks that
        were attended where they lie are copied into it when it is first asked for.
        """
        if isinstance(self.context, LinkedContext):
            self.context = self.context.copied()
        return self.context

    def run(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run more tokens behind the prompt; hold the model's lock.

        Returns:
            logits of the last token, ``[vocab]`` float32.
        """
        if isinstance(self.context, LinkedContext):
            start = self.context.stop
            return self.context.run(self.model, token_ids, range(start, start + len(token_ids)))
        return run_behind(self.model, self.context, token_ids, fast=self.report.strategy != "full")

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings of tokens, ``[tokens, hidden]``, as the model was given them."""
        ids = torch.tensor(list(token_ids), device=self.model.device)
        with torch.inference_mode():
            if self.links is not None:
                return self.links.embed(ids, self.model)
            embedded: torch.Tensor = self.model.get_input_embeddings()(ids)
        return embedded
