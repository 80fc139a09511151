"""Chunks to chunk caches: forward passes over batches of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.attention import fast_attention
from kvlink_rag.runners.transformers.context import ContextCache, new_cache

Memory = tuple[torch.Tensor, torch.Tensor]
"""Flat memory for keys and for values."""


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of texts in batches of similar length, each at most ``max_batch_tokens`` padded.

    A text longer than the budget gets a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class Encoder:
    """Makes chunk caches with one model.

    Args:
        model: a causal language model of transformers.
        architecture: its description (:func:`inspect_model`).
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self.model = model
        self.architecture = architecture
        self._start: ChunkKV | None = None  # what the last texts were encoded behind

    def new_cache(
        self, capacity: int, batch: int = 1, memory: Memory | None = None
    ) -> ContextCache:
        """An empty cache of this model's sizes."""
        return new_cache(self.architecture, capacity, batch, memory)

    def encode(
        self,
        texts: Sequence[Sequence[int]],
        behind: Sequence[int] = (),
        *,
        max_batch_tokens: int,
    ) -> Iterator[list[tuple[int, ChunkKV]]]:
        """Encode texts (token ids), each behind ``behind`` and seeing nothing else.

        Yields:
            a list of (index of the text, its cache) a batch, longest texts first.
        """
        batches = plan_batches([len(text) for text in texts], max_batch_tokens)
        if not batches:
            return
        start = self._start_of(tuple(behind)) if behind else None
        memory = self._memory(
            max(len(rows) * (len(behind) + len(texts[rows[0]])) for rows in batches)
        )
        for rows in batches:
            records = self.encode_batch([texts[i] for i in rows], start, memory)
            yield list(zip(rows, records, strict=True))

    def has_encoded(self, behind: tuple[int, ...]) -> bool:
        """Whether encoding behind these tokens would not run them through the model again."""
        return self._start is not None and self._start.token_ids == behind

    def _start_of(self, behind: tuple[int, ...]) -> ChunkKV:
        """The cache of what texts are encoded behind: nearly always the same."""
        if not self.has_encoded(behind):
            self._start = self.encode_batch([list(behind)], None, None)[0]
        assert self._start is not None
        return self._start

    def _memory(self, tokens: int) -> Memory:
        """Flat tensors for the keys and values of one batch of ``tokens`` padded tokens."""
        a = self.architecture
        return (
            torch.empty(
                tokens * a.layers * a.kv_heads * a.head_dim, dtype=a.dtype, device=a.device
            ),
            torch.empty(
                tokens * a.layers * a.kv_heads * a.value_dim, dtype=a.dtype, device=a.device
            ),
        )

    @torch.inference_mode()
    def encode_batch(
        self, texts: Sequence[Sequence[int]], behind: ChunkKV | None, memory: Memory | None
    ) -> list[ChunkKV]:
        """One forward pass over texts of similar length, padded on the right.

        Padding needs no mask: what is padded comes after every real token, and attention is causal.
        """
        a = self.architecture
        behind_ids = behind.token_ids if behind else ()
        offset, longest = len(behind_ids), max(len(text) for text in texts)
        cache = self.new_cache(offset + longest, len(texts), memory)
        if behind:
            cache.place(behind, 0, a.groups)
            cache.set_length(offset)
        token_ids = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in enumerate(texts):
            token_ids[row, : len(text)] = torch.tensor(text)
        positions = torch.arange(offset, offset + longest, device=a.device)
        with fast_attention(self.model):
            self.model.get_decoder()(
                input_ids=token_ids.to(a.device),
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
            )
        return [self._record(cache, row, tuple(text), behind_ids) for row, text in enumerate(texts)]

    def _record(
        self, cache: ContextCache, row: int, token_ids: tuple[int, ...], behind: tuple[int, ...]
    ) -> ChunkKV:
        """One row's tokens behind ``behind``, copied out of the batch."""
        start, stop = len(behind), len(behind) + len(token_ids)
        return ChunkKV(
            token_ids=token_ids,
            behind=behind,
            fingerprint=self.architecture.fingerprint,
            rope=self.architecture.groups,
            keys=self._kept(cache.key_buffer[:, row, :, start:stop]),
            values=self._kept(cache.value_buffer[:, row, :, start:stop]),
        )

    def _kept(self, view: torch.Tensor) -> torch.Tensor:
        """A copy of part of the batch in the number type of caches."""
        dtype = self.architecture.cache_dtype
        return view.to(dtype, copy=True, memory_format=torch.contiguous_format)
