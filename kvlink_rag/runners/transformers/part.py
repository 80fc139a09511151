"""Keys and values of neighbouring tokens, as the compiled kernels are told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kvlink_rag.chunk import ChunkKV, CodedKV
from kvlink_rag.rope import RopeGroup
from kvlink_rag.runners.transformers.visibility import Span

DTYPES = (torch.float32, torch.bfloat16)
"""Of numbers that the kernels read."""
CODECS = frozenset({"int8"})
"""Whose codes they read."""
PIECE = 128
"""Tokens of a key head that a thread takes at once: so many share the scales of their keys."""

(
    KIND, TOKENS, START, KEYS, VALUES, KEY_HEADS, VALUE_HEADS, KEY_LAYERS, VALUE_LAYERS, COSINES,
    SINES, TURN_STEP, KEY_PARAMS, VALUE_PARAMS, KEY_PARAM_HEADS, VALUE_PARAM_HEADS, KEY_OFFSETS,
    VALUE_OFFSETS, FIELDS,
) = range(19)  # fmt: skip
"""What is told of a piece of :data:`PIECE` tokens, int64.

Of which kind its numbers are, how many tokens it has, and the position of the first; addresses of
its keys and values of the first layer's first head, and the bytes from one head and one layer to
the next; addresses of the cosines and sines (float32, ``[pairs]``) that its first token's keys are
turned by, and the bytes from one token's to the next one's, 0 where it is the same for all. Of
codes besides: addresses of scales (float16; one for each channel of the piece's keys, and for each
group of channels of each token's value) and the bytes from one head's to the next one's; and how
many bytes further the offsets are.
"""
FLOAT, HALF, CODES = range(3)
"""Kinds of numbers: float32, bfloat16, and a byte that is multiplied by a scale and added to."""

_NAMES = ("keys", "keys.scale", "keys.offset", "values", "values.scale", "values.offset")

Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, ``[tokens or 1, pairs]`` float32."""


@dataclass(frozen=True, eq=False)
class Part:
    """Keys and values that are read where they lie.

    Args:
        keys: of all layers, ``[layers, kv_heads, tokens, head_dim]``; ``values`` alike. Numbers, or
            codes of a byte.
        bias: added to the scores, ``[tokens]`` float32; None adds nothing.
        start: position of the first token.
        turns: that keys are turned by when they are read; None leaves them as they are.
        params: of codes: what the codec has written besides, by name.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    start: int = 0
    turns: Turns | None = None
    params: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def as_it_lies(cls, span: Span) -> Part:
        """A span's, for queries that are turned back to it."""
        return cls(span.record.keys, span.record.values, start=span.start)

    @classmethod
    def at_its_place(cls, span: Span, inv_freq: torch.Tensor | None) -> Part:
        """A span's, with keys that are turned to their positions.

        Args:
            inv_freq: ``[pairs]`` float32; None where RoPE turns nothing.
        """
        coded = isinstance(span.record, CodedKV)  # its keys were freed of their rotation
        positions = torch.arange(span.start, span.stop) if coded else torch.tensor([span.shift])
        turns: Turns | None = None
        if inv_freq is not None:
            angles = positions.to(torch.float32)[:, None] * inv_freq.to(torch.float32)
            turns = angles.cos(), angles.sin()
        tensors = span.record.tensors
        params = tensors if coded else None
        return cls(tensors["keys"], tensors["values"], None, span.start, turns, params)

    def with_bias(self, bias: torch.Tensor | None) -> Part:
        """The same with this bias."""
        part = replace(self, bias=bias)
        part.__dict__["table"] = self.table  # made once
        return part

    @property
    def readable(self) -> bool:
        """Whether kernels can read it: its number type, and rows that lie one after another."""
        return all(
            each.dtype in DTYPES and each.stride(3) == 1 and each.stride(2) == each.shape[3]
            for each in (self.keys, self.values)
        )

    @cached_property
    def table(self) -> Any:
        """What kernels are told of its pieces, ``[FIELDS, pieces]`` int64."""
        tokens = self.keys.shape[2]
        starts = np.arange(0, tokens, PIECE)
        table = np.zeros((FIELDS, len(starts)), dtype=np.int64)
        table[KIND] = HALF if self.keys.dtype == torch.bfloat16 else FLOAT
        table[TOKENS] = np.minimum(PIECE, tokens - starts)
        table[START] = self.start + starts
        for at, heads, layers, each in (
            (KEYS, KEY_HEADS, KEY_LAYERS, self.keys),
            (VALUES, VALUE_HEADS, VALUE_LAYERS, self.values),
        ):
            layer, head, token = (bytes_of(each, dim) for dim in range(3))
            table[at] = each.data_ptr() + starts * token
            table[heads], table[layers] = head, layer
        if self.turns is not None:
            cosines, sines = self.turns
            step = bytes_of(cosines, 0) if len(cosines) > 1 else 0
            table[COSINES], table[SINES] = (t.data_ptr() + starts * step for t in (cosines, sines))
            table[TURN_STEP] = step
        if self.params is not None:
            _tell_params(table, starts, self.params)
        return table


def _tell_params(table: Any, starts: Any, params: Mapping[str, torch.Tensor]) -> None:
    table[KIND] = CODES
    for what, at, heads, offsets, shared in (
        ("keys", KEY_PARAMS, KEY_PARAM_HEADS, KEY_OFFSETS, PIECE),
        ("values", VALUE_PARAMS, VALUE_PARAM_HEADS, VALUE_OFFSETS, 1),
    ):
        scales, its = params[f"{what}.scale"], params[f"{what}.offset"]
        table[at] = scales.data_ptr() + starts // shared * bytes_of(scales, 2)
        table[heads] = bytes_of(scales, 1)
        table[offsets] = its.data_ptr() - scales.data_ptr()


def value_groups(parts: Sequence[Part]) -> int:
    """Groups of channels of a value that share a scale; the same in all that have any."""
    return next((p.params["values.scale"].shape[3] for p in parts if p.params is not None), 1)


def codes_readable(record: CodedKV, groups: Sequence[RopeGroup]) -> bool:
    """Whether kernels can read the codes of a cache, for a model with these frequencies."""
    each = [record.tensors.get(name) for name in _NAMES]
    whole = all(tensor is not None and tensor.is_contiguous() for tensor in each)
    return whole and record.codec in CODECS and _same(record.rope, groups)


def _same(rope: Sequence[RopeGroup], groups: Sequence[RopeGroup]) -> bool:
    """Whether keys were freed of the rotation that they are to be given."""
    if len(rope) != len(groups):
        return False
    pairs = [(one.inv_freq, other.inv_freq) for one, other in zip(rope, groups, strict=True)]
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in pairs
    )


def readable(record: ChunkKV, groups: Sequence[RopeGroup]) -> bool:
    """Whether kernels can read a cache, for a model with these frequencies."""
    if isinstance(record, CodedKV):
        return codes_readable(record, groups)
    return Part(record.keys, record.values).readable


def bytes_of(tensor: torch.Tensor, dim: int) -> int:
    """From one index of a dimension to the next."""
    return tensor.stride(dim) * tensor.element_size()
