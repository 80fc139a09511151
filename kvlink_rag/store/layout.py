"""What a chunk cache's file must look like, checked before anything of it is read.

Files may come from anywhere. What passes here has tensors of the types and shapes that the codec
writes, all of one chunk, so that decoding takes memory and time in proportion to the file's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from kvlink_rag.chunk import RAW
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store.codec import CODECS, coded_layout, tensor_names

IDS = ("behind", "token_ids")
"""Tensors that every file has besides those of its codec."""
KINDS = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""Names of types in safetensors."""
TYPES = {name: kind for kind, name in KINDS.items()}
FLOATS = frozenset(name for name, kind in TYPES.items() if kind.is_floating_point)
LONGEST_ROPE = 1 << 20
"""Characters; 100 layers that all differ, of 128 frequencies each, take a quarter of it."""

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type (its name in safetensors) and shape of each tensor, by name."""


def check_layout(layout: Layout, codec: str, dtype: str | None) -> None:
    """Refuse tensors that a codec does not write.

    Args:
        layout: the file's, as its header states it.
        codec: as its metadata state it.
        dtype: of the decoded numbers, as its metadata state it; None for raw ones.

    Raises:
        ValueError: with the reason.
    """
    if codec not in CODECS or (codec == RAW) != (dtype is None):
        raise ValueError(f"it has codec {codec[:40]!r}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"it has dtype {dtype[:40]!r}")
    if sorted(layout) != sorted((*IDS, *tensor_names(codec))):
        raise ValueError(f"it has the tensors {sorted(layout)[:9]}")
    for name in IDS:
        if layout[name][0] != "I64" or len(layout[name][1]) != 1:
            raise ValueError(f"{name} is no list of token ids")
    (_, keys), (_, values) = layout["keys"], layout["values"]
    fits = len(keys) == len(values) == 4 and keys[:3] == values[:3]
    if not fits or 0 in keys + values or keys[2] != layout["token_ids"][1][0]:
        raise ValueError(f"keys {[*keys][:9]} and values {[*values][:9]} do not fit its tokens")
    for name, (kinds, shape) in _numbers(codec, keys, values).items():
        if layout[name][0] not in kinds or layout[name][1] != shape:
            raise ValueError(f"{name} is {layout[name][0]} {[*layout[name][1]][:9]}: not {codec}")


def _numbers(
    codec: str, keys: tuple[int, ...], values: tuple[int, ...]
) -> dict[str, tuple[frozenset[str], tuple[int, ...]]]:
    """Types and shape that each tensor of keys and values may have."""
    if codec in (RAW, "bf16"):
        kinds = FLOATS if codec == RAW else frozenset({"BF16"})
        return {"keys": (kinds, keys), "values": (kinds, values)}
    expected = coded_layout(codec, keys, values)
    return {name: (frozenset({KINDS[kind]}), shape) for name, (kind, shape) in expected.items()}


def rope_text(rope: Sequence[RopeGroup]) -> str:
    """How keys are rotated, as JSON: first layer, layer behind the last, frequencies or null."""
    groups = [
        [group.layers.start, group.layers.stop, None if f is None else f.float().tolist()]
        for group in rope
        for f in [group.inv_freq]
    ]
    return json.dumps(groups)


@lru_cache(maxsize=8)  # all caches of a model have the same
def rope_of(text: str, layers: int, head_dim: int) -> tuple[RopeGroup, ...]:
    """:func:`rope_text`, the way back.

    Raises:
        ValueError: it does not say how keys ``[layers, ..., head_dim]`` are rotated.
    """
    if len(text) > LONGEST_ROPE:
        raise ValueError(f"its rope has {len(text)} characters")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its rope is no JSON") from error
    if not isinstance(found, list):
        raise ValueError("its rope is no list")
    groups: list[RopeGroup] = []
    for each in found:
        first = groups[-1].layers.stop if groups else 0
        groups.append(_group(each, first, layers, head_dim))
    return tuple(groups)


def _group(found: Any, first: int, layers: int, head_dim: int) -> RopeGroup:
    if not isinstance(found, list) or len(found) != 3:
        raise ValueError("its rope has a group that is no list of three")
    start, stop, inv_freq = found
    if type(start) is not int or type(stop) is not int or not first <= start < stop <= layers:
        raise ValueError("its rope has layers that are not there")
    if inv_freq is None:
        return RopeGroup(slice(start, stop), None)
    if not isinstance(inv_freq, list) or not 0 < 2 * len(inv_freq) <= head_dim:
        raise ValueError("its rope has frequencies that do not fit a head")
    # no number of a model is near the largest float32
    if not all(type(number) is float and abs(number) < 1e30 for number in inv_freq):
        raise ValueError("its rope has frequencies that are no numbers")
    return RopeGroup(slice(start, stop), torch.tensor(inv_freq))
