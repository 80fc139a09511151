"""Tokens a second of indexing, and of the forward pass that it cannot do without."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvlink_rag.bench.corpus import cut_chunk
from kvlink_rag.bench.series import Series, Steps
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.runners.transformers.encode import plan_batches
from kvlink_rag.runners.transformers.runner import BATCH_TOKENS
from kvlink_rag.store import FolderStore

MIXES: dict[str, Sequence[int]] = {
    "50": (50,),
    "200": (200,),
    "500": (500,),
    "1000": (1000,),
    "50 to 1000": (50, 100, 200, 500, 1000),
}
"""Chunk lengths in tokens."""
TOKENS = 5000


@dataclass
class IndexResult:
    """Tokens a second of indexing to disk, and of plain batched forward passes of the same.

    Attributes:
        chunk_tokens: name of the mix of chunk lengths.
    """

    chunk_tokens: str
    index: Series
    forward: Series


def measure_indexing(
    engine: KVLinkEngine,
    ids: Sequence[int],
    name: str,
    folder: Path,
    repeats: int,
    rng: random.Random,
    step: Steps,
) -> IndexResult:
    """Index about 5,000 tokens, and run them through the model without keeping anything.

    The first time both run untimed: it pays for memory that the process has not touched yet.
    """
    result = IndexResult(name, Series(), Series())
    lengths = [n for n in MIXES[name] for _ in range(max(TOKENS // len(MIXES[name]) // n, 1))]
    for place in range(repeats + 1):
        chunks = [cut_chunk(engine, ids, length, rng) for length in lengths]
        texts = [engine.layout.chunk(chunk) for chunk in chunks]
        tokens = sum(map(len, texts))
        twin = engine.with_store(FolderStore(folder / f"index-{name}-{place}"))
        for series in rng.sample([result.index, result.forward], 2):
            start = time.perf_counter()
            if series is result.index:
                twin.index(chunks, progress=False)
            else:
                plain_forward(engine, texts)
            if place > 0:
                series.values.append(tokens / (time.perf_counter() - start))
        step()
    return result


@torch.inference_mode()
def plain_forward(engine: KVLinkEngine, texts: Sequence[Sequence[int]]) -> None:
    """What indexing is compared with: transformers over padded batches of the same texts."""
    for batch in plan_batches([len(text) for text in texts], BATCH_TOKENS["cpu"]):
        longest = max(len(texts[i]) for i in batch)
        rows = [[*texts[i], *[0] * (longest - len(texts[i]))] for i in batch]
        engine.model.get_decoder()(torch.tensor(rows, device=engine.model.device), use_cache=True)
