"""The context a question runs over: one pre-allocated cache that chunk caches are linked into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.rope import RopeGroup, shift_groups
from kvlink_rag.runners.transformers.architecture import Architecture


class _ContextLayer(CacheLayerMixin):
    """One layer's slice of a :class:`ContextCache`; keeps every token, sliding layers included.

    (transformers' own cache drops what a sliding window has passed; a linked context may still
    need it for tokens computed later in the middle of the prompt.)
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffer_keys = keys  # [batch, kv_heads, capacity, head_dim]
        self.buffer_values = values
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.dtype, self.device = keys.dtype, keys.device
        self.length = 0
        self.scatter: torch.Tensor | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the buffer exists from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values ``[batch, kv_heads, new, dim]``; return all up to here."""
        if self.scatter is not None:
            self.buffer_keys.index_copy_(2, self.scatter, key_states)
            self.buffer_values.index_copy_(2, self.scatter, value_states)
        else:
            stop = self.length + key_states.shape[2]
            if stop > self.get_max_length():
                self._grow(stop)
            self.buffer_keys[:, :, self.length : stop] = key_states
            self.buffer_values[:, :, self.length : stop] = value_states
            self.set_length(stop)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _grow(self, least: int) -> None:
        """Room for at least ``least`` tokens (only when someone decodes on beyond the capacity)."""
        for name in ("buffer_keys", "buffer_values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], least + least // 2, old.shape[3]))
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def set_length(self, length: int) -> None:
        self.length = length
        self.keys = self.buffer_keys[:, :, :length]
        self.values = self.buffer_values[:, :, :length]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``abs(tokens_to_remove)`` tokens (transformers passes it negative)."""
        self.set_length(max(self.length - abs(tokens_to_remove), 0))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return int(self.buffer_keys.shape[2])


class ContextCache(Cache):
    """A transformers cache over two pre-allocated tensors that is never re-concatenated.

    Args:
        layers, kv_heads, head_dim, value_dim: the model's sizes.
        capacity: tokens it can hold: context, question and answer.
        batch: rows.
        memory: flat tensors for keys and values to use instead of new ones, for callers that need
            one cache after the other (fresh pages cost the kernel more than filling them).

    Attributes:
        key_buffer: ``[layers, batch, kv_heads, capacity, head_dim]``, keys at their positions.
        value_buffer: ``[layers, batch, kv_heads, capacity, value_dim]``.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        capacity: int,
        *,
        batch: int = 1,
        dtype: torch.dtype,
        device: torch.device,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        shape = (layers, batch, kv_heads, capacity)
        if memory is None:
            self.key_buffer = torch.empty((*shape, head_dim), dtype=dtype, device=device)
            self.value_buffer = torch.empty((*shape, value_dim), dtype=dtype, device=device)
        else:
            tokens = layers * batch * kv_heads * capacity
            self.key_buffer = memory[0][: tokens * head_dim].view(*shape, head_dim)
            self.value_buffer = memory[1][: tokens * value_dim].view(*shape, value_dim)
        self._layers = [
            _ContextLayer(self.key_buffer[layer], self.value_buffer[layer])
            for layer in range(layers)
        ]
        super().__init__(layers=list(self._layers))

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return int(self.key_buffer.shape[3])

    def set_length(self, length: int) -> None:
        """Declare the first ``length`` tokens valid."""
        for layer in self._layers:
            layer.set_length(length)

    def set_scatter(self, positions: torch.Tensor | None) -> None:
        """Let the next forward pass write to these positions instead of behind the last token."""
        for layer in self._layers:
            layer.scatter = positions

    def place(self, record: ChunkKV, start: int, groups: Sequence[RopeGroup]) -> None:
        """Link a chunk cache: its keys move to positions ``start ...``, in every row.

        The length is not changed: the caller places all chunks, in any order, then sets it.
        """
        stop = start + len(record.token_ids)
        device = self.key_buffer.device
        shift = torch.tensor([start - record.position], device=device)
        keys = record.keys.to(device, non_blocking=True)
        values = record.values.to(device, non_blocking=True)
        for row in range(self.key_buffer.shape[1]):
            shift_groups(keys, shift, groups, out=self.key_buffer[:, row, :, start:stop])
            self.value_buffer[:, row, :, start:stop].copy_(values)


def new_cache(
    architecture: Architecture,
    capacity: int,
    batch: int = 1,
    memory: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> ContextCache:
    """An empty cache of a model's sizes."""
    a = architecture
    return ContextCache(
        a.layers, a.kv_heads, a.head_dim, a.value_dim, capacity,
        batch=batch, dtype=a.dtype, device=a.device, memory=memory,
    )  # fmt: skip
