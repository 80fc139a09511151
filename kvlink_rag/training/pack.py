"""Lessons as tokens: a linked context with one or more questions behind it.

Several questions of one context share its link tokens: each question is a branch that sees the
context, the link tokens and itself, as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvlink_rag.adapters.adapter import AdapterKind
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError
from kvlink_rag.rope import shift_groups
from kvlink_rag.runners.transformers.attention import fast_attention
from kvlink_rag.training.attention import PackContext
from kvlink_rag.training.lesson import Lesson

IGNORED = -100
COMMON = -1
"""Group of what is part of the prompt proper."""


@dataclass(eq=False)
class Pack:
    """New tokens over a frozen context.

    A token sees those before it that are of its group, and if it is `open` also the `shared` ones.

    Attributes:
        keys, values: ``[layers, kv_heads, context, dim]``, the frozen context; all of it is shared.
        context: positions of the frozen tokens.
        token_ids, positions, groups, shared, open: of the new tokens.
        labels: the token to be predicted at each new token's place, or :data:`IGNORED`.
        answers: labels of each turn, in order.
        teacher: ``[labels, vocab]`` log-probabilities that are to be learnt, or None.
        distill: how much of the loss is the divergence from them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    context: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    open: list[bool] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    teacher: torch.Tensor | None = None
    distill: float = 0.0

    def add(
        self,
        token_ids: Sequence[int],
        start: int,
        group: int = COMMON,
        *,
        shared: bool = True,
        open: bool = True,
    ) -> None:
        """Tokens at positions ``start ...`` at which nothing is to be predicted."""
        count = len(token_ids)
        self.token_ids += token_ids
        self.positions += range(start, start + count)
        self.groups += [group] * count
        self.shared += [shared] * count
        self.open += [open] * count
        self.labels += [IGNORED] * count

    def add_turn(
        self, question: Sequence[int], answer: Sequence[int], start: int, group: int
    ) -> None:
        """A question and the answer that is to be predicted; ``answer`` ends with an end token."""
        first = len(self.token_ids) + len(question) - 1
        self.add([*question, *answer[:-1]], start, group, shared=False)
        self.labels[first:] = answer
        self.answers.append(len(answer))

    def for_attention(self) -> PackContext:
        """Keys, values, and what says who sees whom."""
        frozen, device = len(self.context), self.keys.device
        return PackContext(
            self.keys,
            self.values,
            torch.tensor([*self.context, *self.positions], device=device),
            torch.tensor([COMMON] * frozen + self.groups, device=device),
            torch.tensor([True] * frozen + self.shared, device=device),
            torch.tensor(self.open, dtype=torch.bool, device=device),
        )


class Packer:
    """Makes packs from lessons.

    Args:
        engine: of the base model; frozen chunk caches come from its store and are kept in it.
        kind: `cache-preserving` freezes prefix and chunks, `whole-model` trains on them.
        links: the link tokens; None trains without.
        max_tokens: longest lesson: chunks, questions and answers beyond are cut.
        max_answer: longest answer.
        distill: share of the loss that is divergence from the teacher's full prefill; 1 for
            lessons that are made for it.
        teacher: engine over the same model whose full prefill is learnt; None is ``engine``.

    Raises:
        InputError: the model has no token that ends an answer.
    """

    def __init__(
        self,
        engine: KVLinkEngine,
        kind: AdapterKind,
        links: LinkTokens | None,
        *,
        max_tokens: int,
        max_answer: int,
        distill: float = 0.0,
        teacher: KVLinkEngine | None = None,
    ) -> None:
        self.engine = engine
        self.teacher = teacher or engine
        self.kind = kind
        self.links = links
        self.max_tokens = max_tokens
        self.max_answer = max_answer
        self.distill = distill
        self.end = _end_token(engine)
        self._taught: tuple[Any, torch.Tensor] | None = None

    def pack(self, lesson: Lesson) -> Pack:
        """The tokens of a lesson."""
        layout = self.engine.layout
        chunks = self._cut([layout.chunk(chunk) for chunk in lesson.chunks])
        prefix, turns = [], []
        for turn in lesson.turns:
            answer = [*layout.encode_text(turn.answer), self.end]
            if turn.question:
                parts = layout.lay_out(turn.question, with_chunks=bool(chunks))
                prefix = parts.prefix
                turns.append((parts.question, answer))
            else:  # plain text: nothing around it
                turns.append((answer[:1], answer[1:-1] or answer[1:]))
        pack, start = self._context(prefix, chunks, lesson.view)
        turns = [self._fit(asked, said, start) for asked, said in turns]
        for group, (asked, said) in enumerate(turns):
            pack.add_turn(asked, said, start, group)
        pack.distill = 1.0 if lesson.distill else self.distill
        if pack.distill:
            pack.teacher = self._teach([t for ids in (prefix, *chunks) for t in ids], turns)
        return pack

    def _fit(self, asked: list[int], said: list[int], start: int) -> tuple[list[int], list[int]]:
        """A question, if need be without its middle, and what an answer behind it may have."""
        room = max(self.max_tokens - start, 2)
        if len(asked) >= room:  # its ends are the template's
            head, tail = (room - 1) // 2, room // 2
            asked = [*asked[:head], *asked[-tail:]]
        return asked, said[: min(self.max_answer, room - len(asked))]

    def _cut(self, chunks: list[list[int]]) -> list[list[int]]:
        """Chunks that leave a quarter of the room for the rest."""
        kept: list[list[int]] = []
        tokens = 0
        for ids in chunks:
            tokens += len(ids)
            if kept and tokens > self.max_tokens * 3 // 4:
                break
            kept.append(ids[: self.max_tokens * 3 // 4])
        return kept

    @torch.inference_mode()
    def _teach(
        self, context: list[int], turns: Sequence[tuple[list[int], list[int]]]
    ) -> torch.Tensor:
        """The teacher's log-probabilities ``[labels, vocab]`` under full prefill.

        The context runs once for all turns, and once for a lesson read in several views in a row.
        """
        lesson = (context, turns)
        if self._taught is not None and self._taught[0] == lesson:
            return self._taught[1]
        cache = DynamicCache()  # made without a configuration: sliding layers keep all tokens
        if context:
            self._run(self.teacher.model, context, cache, keep=1)
        taught = []
        for asked, said in turns:
            ids = [*asked, *said[:-1]]
            taught.append(self._run(self.teacher.reader, ids, cache, keep=len(said)))
            cache.crop(-(len(asked) + len(said) - 1))
        teacher = torch.cat(taught)
        self._taught = (lesson, teacher)
        return teacher

    def _run(
        self, model: PreTrainedModel, token_ids: list[int], cache: DynamicCache, keep: int
    ) -> torch.Tensor:
        """A model's log-probabilities ``[keep, vocab]`` at the last of these tokens."""
        ids = torch.tensor([token_ids], device=self.engine.architecture.device)
        with fast_attention(model):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        logits: torch.Tensor = out.logits[0]
        return logits.float().log_softmax(-1).to(logits.dtype)

    def _context(self, prefix: list[int], chunks: list[list[int]], view: str) -> tuple[Pack, int]:
        """Prefix, chunks and link tokens, and the position behind them."""
        links = self.links if view == "link" else None
        if view == "full" and self.kind == "cache-preserving":  # one text, which sees itself whole
            prefix, chunks = [token for ids in (prefix, *chunks) for token in ids], []
        parts: list[tuple[list[int], int]] = []  # frozen or trained tokens, and where they start
        link_parts: list[tuple[list[int], int]] = []
        start = 0
        for slot, ids in enumerate([prefix, *chunks], -1):
            parts.append((ids, start))
            start += len(ids)
            if links is not None and slot >= 0 and (more := links.ids(slot, len(chunks))):
                link_parts.append((more, start))
                start += len(more)
        if self.kind == "cache-preserving":
            pack = self._frozen(parts, view)
        else:
            pack = self._trained(parts, view)
        for ids, place in link_parts:
            pack.add(ids, place)
        return pack, start

    def _frozen(self, parts: list[tuple[list[int], int]], view: str) -> Pack:
        """Chunk caches from the store at their positions."""
        engine, a = self.engine, self.engine.architecture
        count = sum(len(ids) for ids, _ in parts)
        shape = (a.layers, a.kv_heads, count)
        keys = torch.empty((*shape, a.head_dim), dtype=a.dtype, device=a.device)
        values = torch.empty((*shape, a.value_dim), dtype=a.dtype, device=a.device)
        pack = Pack(keys, values)
        for place, (ids, start) in enumerate(parts):
            if not ids:
                continue
            # a context that one lesson sees whole will hardly be met again
            wanted = tuple(ids), engine.behind if place else ()
            record = engine.pipeline.caches.one(wanted, keep=view != "full")
            stop = len(pack.context) + len(ids)
            where = slice(len(pack.context), stop)
            shift = torch.tensor([start - record.position], device=a.device)
            shift_groups(record.keys.to(a.device), shift, a.groups, out=keys[:, :, where])
            values[:, :, where] = record.values.to(a.device)
            pack.context += range(start, start + len(ids))
        return pack

    def _trained(self, parts: list[tuple[list[int], int]], view: str) -> Pack:
        """Prefix and chunks as tokens, each chunk behind a private copy of what is before it."""
        a, behind = self.engine.architecture, self.engine.behind
        pack = Pack(
            torch.empty((a.layers, a.kv_heads, 0, a.head_dim), dtype=a.dtype, device=a.device),
            torch.empty((a.layers, a.kv_heads, 0, a.value_dim), dtype=a.dtype, device=a.device),
        )
        for place, (ids, start) in enumerate(parts):
            if place == 0 or view == "full":
                pack.add(ids, start)
                continue
            group = -1 - place  # no turn's
            pack.add(behind, start - len(behind), group, shared=False, open=False)
            pack.add(ids, start, group, open=False)
        return pack


def _end_token(engine: KVLinkEngine) -> int:
    """What an answer ends with: of several tokens that stop the model, the tokenizer's own."""
    if not engine.stop_ids:
        raise InputError(
            f"{engine.name} has no token that ends an answer, so answers cannot be learnt: set "
            "eos_token on its tokenizer"
        )
    own = engine.tokenizer.eos_token_id
    return own if own in engine.stop_ids else min(engine.stop_ids)
