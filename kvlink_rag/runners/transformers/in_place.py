"""Chunk caches attended where they lie: nothing is copied, whatever the order of the chunks.

RoPE is relative, so instead of moving a chunk's keys forward to its place in the prompt, a query is
moved back by as much, once for each chunk. The keys stay as they are in the mapped file or in
memory, for any number of prompts at a time. What a prompt adds of its own, link tokens, question
and answer, is a small cache beside them. So are tokens of chunks that are computed anew: they stand
at their positions, and what they replace is not seen any more where it lies.

For more than a few new tokens it is the keys that are moved, a layer at a time into memory that the
next layer uses again (:mod:`kvlink_rag.runners.transformers.placement`): one product over all of
them is quicker then than one for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from kvlink_rag.chunk import ChunkKV, CodedKV
from kvlink_rag.rope import turn
from kvlink_rag.runners.transformers import one_query, placement
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.attention import FEW_TOKENS, multiply
from kvlink_rag.runners.transformers.context import ContextCache, new_cache
from kvlink_rag.runners.transformers.one_query import OneQuery
from kvlink_rag.runners.transformers.part import Part, readable
from kvlink_rag.runners.transformers.placement import Placement
from kvlink_rag.runners.transformers.positions import attend_at
from kvlink_rag.runners.transformers.scratch import Scratch
from kvlink_rag.runners.transformers.visibility import Block, Span, Visibility

MANY_QUERIES = 16
"""From so many new tokens on it is faster to move a layer's keys than the queries."""
MANY_UNPLACED = 40
"""The same where no kernel moves them."""


Kind = tuple[int | None, int]
"""Of a layer."""


class LinkedContext:
    """A prompt's context, made of spans and of the tokens that are computed for it.

    Args:
        architecture: of the model that the spans are for; on CPU.
        spans: prefix and chunks, in any order.
        own: an empty cache with room for all other tokens of prompt and answer.
        scratch: what all contexts of a model compute in.

    Attributes:
        scratch: what it computes in.
        positions: of the tokens in ``own``.
        kinds: of each layer its window, and the number of a group with its frequencies.
        one: the compiled attention of the one new token that is expected, by kind of layer; empty
            where there are more, or a span cannot be read by it.
        paid: where the attention to each position of the spans is counted, ``[layers, positions]``
            float32 for the first layers, while somebody asks for it.
    """

    def __init__(
        self,
        architecture: Architecture,
        spans: Sequence[Span],
        own: ContextCache,
        scratch: Scratch,
    ) -> None:
        self.architecture = architecture
        self.scratch = scratch
        self.spans = list(spans)
        self.own = own
        self.positions: list[int] = []
        self._visibility = Visibility(self.spans, architecture.dtype)
        groups = architecture.groups
        self._readable = all(readable(span.record, groups) for span in spans)
        self._placed = bool(spans) and self._readable and placement.available(architecture.dtype)
        self._parts: dict[tuple[int, int | None], Part] = {}
        self._placements: dict[int, Placement] = {}  # by group
        self.paid: torch.Tensor | None = None
        # queries go back as far as the keys would go forward
        shifts = -torch.tensor([span.shift for span in spans], dtype=torch.float32)
        self._angles: list[tuple[torch.Tensor, torch.Tensor] | None] = []  # cosines and sines
        numbers: list[int] = []
        first: dict[int, int] = {}  # of the groups with the same frequencies, which are runs
        for number, group in enumerate(groups):
            its = None
            if group.inv_freq is not None and spans:
                angles = shifts[:, None, None, None] * group.inv_freq.to(torch.float32)
                its = (angles.cos(), angles.sin())  # [spans, 1, 1, half]
            count = len(range(*group.layers.indices(architecture.layers)))
            self._angles += [its] * count
            numbers += [first.setdefault(id(group.inv_freq), number)] * count
        self.kinds = list(zip(architecture.windows, numbers, strict=True))
        self._moves = False  # whether keys are moved for the new tokens, not their queries
        self._blocks: dict[int | None, list[Block]] = {}
        self.one: dict[Kind, OneQuery] = {}

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        ends = [span.stop for span in self.spans]
        return max([*ends, *(position + 1 for position in self.positions)], default=0)

    def replace(self, positions: Sequence[int]) -> None:
        """Hide what spans hold at these positions: those tokens are computed anew."""
        self._visibility.hide(positions)

    def forget(self, keep: int = 0) -> None:
        """Forget all tokens but the spans' and the first ``keep`` that were computed."""
        self.positions = self.positions[:keep]
        self.own.set_length(keep)

    def expect(self, positions: Sequence[int]) -> None:
        """Prepare for new tokens at these positions: who sees what."""
        self.positions += positions
        many = MANY_QUERIES if self._placed else MANY_UNPLACED
        self._moves = len(positions) >= many or (self._keeps_codes and len(positions) > 1)
        windows = () if self._moves else set(self.architecture.windows)
        self._blocks = {
            window: list(self._visibility.blocks(positions, self.positions, window))
            for window in windows
        }
        alone = len(positions) == 1 and not self._moves and self.paid is None and self.compiled
        self.one = {kind: self._prepared(*kind) for kind in set(self.kinds)} if alone else {}

    @cached_property
    def _records(self) -> list[ChunkKV]:
        """The spans' keys and values. Codes are decoded when this is first asked for."""
        return [span.record.decoded() for span in self.spans]

    @property
    def _keeps_codes(self) -> bool:
        """Whether there are codes that a forward pass can read and nobody has decoded so far."""
        coded = any(isinstance(span.record, CodedKV) for span in self.spans)
        return self._placed and coded and "_records" not in self.__dict__

    @property
    def compiled(self) -> bool:
        """Whether the attention of one new token is compiled here, and reads all spans."""
        return self._readable and one_query.available()

    def _prepared(self, window: int | None, group: int) -> OneQuery:
        """The attention of the one new token."""
        (block,) = self._blocks[window]
        parts = [self._part(index, group).with_bias(_flat(bias)) for index, bias in block.seen]
        return OneQuery(parts, len(self.positions), _flat(block.own), self.scratch)

    def _part(self, index: int, group: int) -> Part:
        """A span as it lies; codes, which have no rotation, with that of their positions."""
        span = self.spans[index]
        coded = isinstance(span.record, CodedKV)
        at = (index, group if coded else None)
        if at not in self._parts:
            inv_freq = self.architecture.groups[group].inv_freq
            made = Part.at_its_place(span, inv_freq) if coded else Part.as_it_lies(span)
            self._parts[at] = made
        return self._parts[at]

    def turns(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines by which the new token's query meets each span that it sees.

        Returns:
            each ``[spans, pairs]`` float32; None in layers without RoPE, or where there are none.
        """
        angles, (block,) = self._angles[layer], self._blocks[self.architecture.windows[layer]]
        if angles is None or not block.seen:
            return None
        cos, sin = (each[block.indices].flatten(1) for each in angles)
        return cos, sin

    def copied(self) -> ContextCache:
        """All of it in one cache, with as much room for more tokens as there is here."""
        a, own, used = self.architecture, self.own, len(self.positions)
        cache = new_cache(a, self.stop + own.capacity - used)
        for span in self.spans:
            cache.place(span.record, span.start, a.groups)
        where = torch.tensor(self.positions, dtype=torch.long)
        cache.key_buffer.index_copy_(3, where, own.key_buffer[:, :, :, :used])
        cache.value_buffer.index_copy_(3, where, own.value_buffer[:, :, :, :used])
        cache.set_length(self.stop)
        return cache

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Grouped-query attention of the new tokens, whose keys and values are kept.

        The query heads of a group share a matrix product.

        Args:
            query: ``[1, heads, queries, head_dim]``.
            key, value: of the new tokens, ``[1, kv_heads, queries, dim]``.

        Returns:
            ``[queries, heads, value_dim]``.
        """
        own_keys, own_values = (each[0] for each in self.own.update(key, value, layer))
        _, heads, queries, dim = query.shape
        if self._moves:
            keys, values = self._moved(layer, own_keys, own_values)
            new, window = self.positions[-queries:], self.architecture.windows[layer]
            paid = None if self.paid is None else self.paid[layer]
            return attend_at(query[0] * scale, keys, values, new, window, self.scratch, paid)
        kv_heads = own_keys.shape[0]
        folded = (query[0] * scale).reshape(kv_heads, heads // kv_heads, queries, dim)
        if one := self.one.get(self.kinds[layer]):
            rows, (block,) = folded[:, :, 0], self._blocks[self.architecture.windows[layer]]
            met = torch.cat([self._turned(rows, layer, block), rows[None]]).float()
            return one.attend(layer, met, own_keys, own_values)[None].to(query.dtype)
        mixed = query.new_empty(queries, heads, own_values.shape[2])
        result = mixed.view(queries, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)
        blocks = self._blocks[self.architecture.windows[layer]]
        numbers = {
            index: (self._number("keys", index, layer), self._number("values", index, layer))
            for index in {index for block in blocks for index, _ in block.seen}
        }
        for block in blocks:
            rows = folded[:, :, block.queries]
            parts = [*(numbers[index] for index, _ in block.seen), (own_keys, own_values)]
            out = self._mixed(rows.reshape(kv_heads, -1, dim), layer, block, parts)
            result[:, :, block.queries] = out.view(*rows.shape[:3], -1).to(query.dtype)
        return mixed

    def _mixed(
        self,
        rows: torch.Tensor,
        layer: int,
        block: Block,
        seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Attention of a block's queries, ``[kv_heads, rows, head_dim]``; float32 values mixed.

        Args:
            seen: keys and values ``[kv_heads, tokens, dim]`` of the spans that it sees, and last
                of the tokens that the prompt adds.
        """
        keys, values = [key for key, _ in seen], [value for _, value in seen]
        own_keys, own_values = seen[-1]
        biases = [*(bias for _, bias in block.seen), block.own]
        lengths = [each.shape[1] for each in keys]
        shape = (*rows.shape[:2], sum(lengths))
        scores = self.scratch.tensor("scores", shape, rows.dtype)
        turned = [*self._turned(rows, layer, block), rows]
        parts = torch.split_with_sizes(scores, lengths, 2)
        for its, key, bias, out in zip(turned, keys, biases, parts, strict=True):
            multiply(
                its, key.transpose(1, 2), out, few=key is own_keys or key.shape[1] <= FEW_TOKENS
            )
            if bias is not None:  # the same for all query heads
                out.view(len(out), -1, *bias.shape).add_(bias)
        weights = self.scratch.tensor("weights", shape, rows.dtype)
        torch.softmax(scores, -1, out=weights)
        parts = torch.split_with_sizes(weights, lengths, 2)
        if self.paid is not None:
            for (index, _), weight in zip(block.seen, parts, strict=False):  # not the prompt's own
                span = self.spans[index]
                self.paid[layer, span.start : span.stop] += weight.sum((0, 1), dtype=torch.float32)
        shape = (len(keys), *rows.shape[:2], own_values.shape[2])
        mixed = self.scratch.tensor("mixed", shape, rows.dtype)
        for weight, value, out in zip(parts, values, mixed, strict=True):
            few = value is own_values or value.shape[1] <= FEW_TOKENS
            multiply(weight, value, out, few)
        return mixed.sum(0, dtype=torch.float32)

    def _moved(
        self, layer: int, own_keys: torch.Tensor, own_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values ``[kv_heads, positions, dim]``, each at its position."""
        dtype, shape = self.architecture.dtype, (len(own_keys), self.stop)
        keys = self.scratch.tensor("keys", (*shape, own_keys.shape[2]), dtype)
        values = self.scratch.tensor("values", (*shape, own_values.shape[2]), dtype)
        if self._placed:
            self._placement(self.kinds[layer][1]).place(layer, keys, values, self.scratch)
        else:
            self._place(layer, keys, values)
        where = torch.tensor(self.positions)
        keys[:, where], values[:, where] = own_keys, own_values
        return keys, values

    def _placement(self, group: int) -> Placement:
        if group not in self._placements:
            inv_freq = self.architecture.groups[group].inv_freq
            parts = [
                self._part(index, group)
                if isinstance(span.record, CodedKV)
                else Part.at_its_place(span, inv_freq)
                for index, span in enumerate(self.spans)
            ]
            pairs = 0 if inv_freq is None else len(inv_freq)
            self._placements[group] = Placement(parts, pairs)
        return self._placements[group]

    def _place(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As :meth:`Placement.place`, by torch."""
        angles = self._angles[layer]
        for index, (span, record) in enumerate(zip(self.spans, self._records, strict=True)):
            place = slice(span.start, span.stop)
            if angles is None:
                keys[:, place] = record.keys[layer]
            else:  # by which queries go back
                cos, sin = (each[index] for each in angles)
                turn(record.keys[layer], cos, -sin, keys[:, place])
            values[:, place] = record.values[layer]

    def _number(self, kind: str, index: int, layer: int) -> torch.Tensor:
        """Keys or values of a span in the type that the model computes in.

        Caches may be kept in a smaller one. A layer's are converted at a time, where attention
        finds them in the processor's cache: it took a tenth longer than with caches in float32.
        """
        kept: torch.Tensor = getattr(self._records[index], kind)[layer]
        dtype = self.architecture.dtype
        if kept.dtype == dtype:
            return kept
        return self.scratch.tensor(f"{kind} {index}", tuple(kept.shape), dtype).copy_(kept)

    def _turned(self, rows: torch.Tensor, layer: int, block: Block) -> torch.Tensor:
        """Queries as they meet each span that is seen, ``[spans, kv_heads, rows, head_dim]``."""
        angles, count = self._angles[layer], len(block.seen)
        if angles is None or not count:
            return rows.expand(count, *rows.shape)
        cos, sin = (each[block.indices] for each in angles)
        out = self.scratch.tensor("turned", (count, *rows.shape), rows.dtype)
        return turn(rows, cos, sin, out)


def _flat(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Of one query, in float32."""
    return None if bias is None else bias[0].float().contiguous()
