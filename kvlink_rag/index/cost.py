"""What indexing will take, before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvlink_rag.chunk import RAW, Chunk
from kvlink_rag.store.codec import channels, codec_for, coded_layout

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.runners.transformers.architecture import Architecture

LOOKUPS = 16
"""Caches looked up at a time: a store may have to ask a distant server for each."""


@dataclass(frozen=True)
class Cost:
    """What encoding chunks takes.

    Attributes:
        caches: that are not stored yet; chunks with the same text have one.
        tokens: of these.
        nbytes: that their keys and values will take; files are some kilobytes larger.
    """

    caches: int
    tokens: int
    nbytes: int


def cost_of(engine: KVLinkEngine, chunks: Iterable[Chunk], codec: str | None = None) -> Cost:
    """What indexing chunks takes: nothing for what the engine's store has.

    Args:
        engine: with a model of transformers.
        codec: that they will be stored with; None is that of the engine's store.

    Raises:
        InputError: a chunk is empty.
    """
    lengths, codec = to_encode(engine, chunks), codec or engine.store.codec
    nbytes = sum(coded_bytes(engine.architecture, codec, tokens) for tokens in lengths)
    return Cost(len(lengths), sum(lengths), nbytes)


def to_encode(engine: KVLinkEngine, chunks: Iterable[Chunk]) -> list[int]:
    """Tokens of each chunk that is to be encoded; of those with the same text, of one.

    Raises:
        InputError: a chunk is empty.
    """
    if engine.store.cache_after:  # answers will encode them
        return []
    listed = list(chunks)
    distinct = dict(zip(engine.keys(listed), listed, strict=True))
    with ThreadPoolExecutor(LOOKUPS) as pool:
        stored = pool.map(engine.store.has, distinct)
        missing = [c for c, known in zip(distinct.values(), stored, strict=True) if not known]
    return [len(engine.layout.chunk(chunk)) for chunk in missing]


def coded_bytes(architecture: Architecture, codec: str, tokens: int) -> int:
    """Bytes of keys and values of a text as a codec writes them (:mod:`kvlink_rag.store.codec`)."""
    a, codec = architecture, codec_for(codec, architecture.cache_dtype)
    if codec == RAW:
        return a.bytes_per_token * tokens
    if codec == "bf16":
        return a.bytes_per_token // a.cache_dtype.itemsize * 2 * tokens
    heads, width = (a.layers, a.kv_heads, tokens), channels(codec, 1)  # channels in a byte
    layout = coded_layout(codec, (*heads, a.head_dim // width), (*heads, a.value_dim // width))
    return sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
