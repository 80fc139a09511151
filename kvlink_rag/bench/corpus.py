"""Chunks of given lengths, cut from real text."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError

CHUNKS = 10
QUESTION = "Which of these documents tells when the first of them was written, and by whom?"


def corpus_ids(engine: KVLinkEngine, texts: Sequence[str]) -> list[int]:
    """All texts as one list of tokens.

    Raises:
        InputError: too little text.
    """
    ids = [token for text in texts for token in engine.layout.encode_text(text)]
    if len(ids) < 100:
        raise InputError("the bench needs at least 100 tokens of text to cut chunks from")
    return ids


def cut_chunk(engine: KVLinkEngine, ids: Sequence[int], tokens: int, rng: random.Random) -> Chunk:
    """About so many tokens from a random place; the text is repeated when too short."""
    start = rng.randrange(len(ids))
    cut = [ids[(start + place) % len(ids)] for place in range(tokens)]
    return Chunk(str(engine.tokenizer.decode(cut)).strip())


def cut_chunks(
    engine: KVLinkEngine, ids: Sequence[int], length: int, rng: random.Random
) -> list[Chunk]:
    """Ten chunks, so that the whole prompt is about ``length`` tokens."""
    layout = engine.layout
    around = len(layout.prefix()) + len(layout.question(QUESTION))
    size = max((length - around) // CHUNKS - 2, 4)
    return [cut_chunk(engine, ids, size, rng) for _ in range(CHUNKS)]
