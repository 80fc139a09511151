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
        codec: that they will be stored with; None is that of the engine's store.

    Raises:
        InputError: a chunk is empty or longer than the model's context.
    """
    lengths = lengths_of(engine, chunks)
    if engine.cache_after:  # answers will store them
        return Cost(0, 0, 0)
    with ThreadPoolExecutor(LOOKUPS) as pool:
        stored = pool.map(engine.store.has, lengths)
        missing = [n for n, known in zip(lengths.values(), stored, strict=True) if not known]
    codec = codec or engine.store.codec
    nbytes = sum(coded_bytes(engine.architecture, codec, tokens) for tokens in missing)
    return Cost(len(missing), sum(missing), nbytes)


def lengths_of(engine: KVLinkEngine, chunks: Iterable[Chunk]) -> dict[str, int]:
    """Tokens of chunks by their keys in the engine's store; chunks with the same text have one.

    Raises:
        InputError: a chunk is empty or longer than the model's context.
    """
    from kvlink_rag.engine.indexing import Indexing  # an index with nothing to do needs no model

    return Indexing(engine, list(chunks)).lengths


def coded_bytes(architecture: Architecture, codec: str, tokens: int) -> int:
    """Bytes of keys and values of a text as a codec writes them (:mod:`kvlink_rag.store.codec`)."""
    a, codec = architecture, codec_for(codec, architecture.dtype)
    if codec == RAW:
        return a.bytes_per_token * tokens
    if codec == "bf16":
        return a.bytes_per_token // a.dtype.itemsize * 2 * tokens
    heads, width = (a.layers, a.kv_heads, tokens), channels(codec, 1)  # channels in a byte
    layout = coded_layout(codec, (*heads, a.head_dim // width), (*heads, a.value_dim // width))
    return sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
