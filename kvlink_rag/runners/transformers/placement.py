"""A layer's keys and values of spans, each at its position, by the compiled kernel.

Numbers are read once from where they lie, turned, and written where attention finds them in the
processor's cache. Codes of codec `int8` are decoded on the way: nothing larger is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch

from kvlink_rag.chunk import ChunkKV, CodedKV
from kvlink_rag.rope import RopeGroup
from kvlink_rag.runners.transformers import one_query
from kvlink_rag.runners.transformers.scratch import Scratch
from kvlink_rag.runners.transformers.visibility import Span

PIECE = 128
"""Tokens of a head that a thread takes at once: so many share the scale of a channel's keys."""
CODECS = frozenset({"int8"})
"""What is decoded on the way."""
_PARTS = ("keys", "keys.scale", "keys.offset", "values", "values.scale", "values.offset")


def available(dtype: torch.dtype) -> bool:
    """Whether the kernel can run here, and write numbers of this type."""
    return dtype in one_query.DTYPES and one_query.available()


def readable(record: ChunkKV, groups: Sequence[RopeGroup]) -> bool:
    """Whether the kernel can read a cache of a model with these frequencies."""
    if isinstance(record, CodedKV):
        each = [record.tensors.get(name) for name in _PARTS]
        whole = all(tensor is not None and tensor.is_contiguous() for tensor in each)
        return whole and record.codec in CODECS and _same(record.rope, groups)
    return one_query.Part(record.keys, record.values, None).readable


def _same(rope: Sequence[RopeGroup], groups: Sequence[RopeGroup]) -> bool:
    """Whether keys were freed of the rotation that they are to be given."""
    if len(rope) != len(groups):
        return False
    pairs = [(one.inv_freq, other.inv_freq) for one, other in zip(rope, groups, strict=True)]
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other.cpu()))
        for one, other in pairs
    )


class Placement:
    """Keys and values of spans for layers that share their frequencies.

    Args:
        spans: that :func:`readable` allows.
        inv_freq: of the layers, ``[pairs]`` float32; None where keys are not rotated.
    """

    def __init__(self, spans: Sequence[Span], inv_freq: torch.Tensor | None) -> None:
        self._spans = spans  # whose memory the tables point to
        self._turns = [_turns_of(span, inv_freq) for span in spans]
        self._pairs = 0 if inv_freq is None else len(inv_freq)
        pieces = [
            piece
            for span, turns in zip(spans, self._turns, strict=True)
            for piece in _pieces(span, turns)
        ]
        fields = sorted(pieces[0])
        self._table = np.array([[piece[field] for piece in pieces] for field in fields])
        coded = [span.record for span in spans if isinstance(span.record, CodedKV)]
        self._value_groups = coded[0].tensors["values.scale"].shape[3] if coded else 1

    def place(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scratch: Scratch) -> None:
        """Write a layer's keys and values to their positions.

        Args:
            keys: ``[kv_heads, positions, head_dim]``, contiguous; ``values`` alike.
            scratch: to compute in; its owner's lock is held.
        """
        from kvlink_rag.runners.transformers import placement_kernel as k

        kv_heads, positions, key_dim = keys.shape
        value_dim, threads = values.shape[2], torch.get_num_threads()
        size = threads * k.memory_of(key_dim, value_dim)
        memory = scratch.tensor("placement", (size,), torch.float32)
        told = np.zeros(k.FIELDS, dtype=np.int64)
        told[: k.KIND] = (
            layer, self._table.shape[1], kv_heads, key_dim, value_dim, self._pairs,
            keys.dtype == torch.bfloat16, self._value_groups, keys.data_ptr(), values.data_ptr(),
            positions, memory.data_ptr(),
        )  # fmt: skip
        told[k.KIND :] = [field.ctypes.data for field in self._table]
        one_query.team()(_code(), told.ctypes.data, threads, 0)


Turns = tuple[torch.Tensor, torch.Tensor]


def _turns_of(span: Span, inv_freq: torch.Tensor | None) -> Turns | None:
    """Cosines and sines for each of a span's keys, or one row that is for all of them."""
    if inv_freq is None:
        return None
    if isinstance(span.record, CodedKV):
        positions = torch.arange(span.start, span.stop)
    else:
        positions = torch.tensor([span.shift])
    angles = positions.to(torch.float32)[:, None] * inv_freq.to(torch.float32)
    return angles.cos(), angles.sin()


def _pieces(span: Span, turns: Turns | None) -> Iterator[dict[int, int]]:
    """What the kernel is told of each piece of a span, by field."""
    from kvlink_rag.runners.transformers import placement_kernel as k

    tokens, tensors = len(span.record.token_ids), span.record.tensors
    keys, values = tensors["keys"], tensors["values"]
    coded = isinstance(span.record, CodedKV)
    kind = k.CODES if coded else k.HALF if keys.dtype == torch.bfloat16 else k.FLOAT
    same = dict.fromkeys(range(k.KIND, k.FIELDS), 0) | {k.KIND: kind}
    # what differs from piece to piece: field, tensor, and tokens that share an index of it
    places = [(k.KEYS, keys, 1), (k.VALUES, values, 1)]
    for heads, layers, each in (
        (k.KEY_HEADS, k.KEY_LAYERS, keys),
        (k.VALUE_HEADS, k.VALUE_LAYERS, values),
    ):
        same[heads], same[layers] = one_query.bytes_of(each, 1), one_query.bytes_of(each, 0)
    if coded:
        for what, params, heads, offsets, shared in (
            ("keys", k.KEY_PARAMS, k.KEY_PARAM_HEADS, k.KEY_OFFSETS, PIECE),
            ("values", k.VALUE_PARAMS, k.VALUE_PARAM_HEADS, k.VALUE_OFFSETS, 1),
        ):
            scales, its = tensors[f"{what}.scale"], tensors[f"{what}.offset"]
            same[heads] = one_query.bytes_of(scales, 1)
            same[offsets] = its.data_ptr() - scales.data_ptr()
            places.append((params, scales, shared))
    if turns is not None and len(turns[0]) > 1:
        same[k.TURN_STEP] = one_query.bytes_of(turns[0], 0)
    for start in range(0, tokens, PIECE):
        piece = same | {k.TOKENS: min(PIECE, tokens - start), k.START: span.start + start}
        for field, tensor, shared in places:
            piece[field] = one_query.address(tensor, start // shared, 2)
        if turns is not None:
            first = start * same[k.TURN_STEP]
            piece[k.COSINES], piece[k.SINES] = (each.data_ptr() + first for each in turns)
        yield piece


@cache
def _code() -> int:
    from kvlink_rag.runners.transformers import kernel, placement_kernel

    return kernel.compiled(placement_kernel.place)
