"""Milliseconds a token of greedy decoding behind a long context."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import DynamicCache

from kvlink_rag.bench.corpus import QUESTION
from kvlink_rag.bench.series import Series, Steps
from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.store import FolderStore

TOKENS = 16


@torch.inference_mode()
def measure_decode(
    engine: KVLinkEngine, folder: Path, chunks: list[Chunk], repeats: int, step: Steps
) -> dict[str, Series]:
    """Seconds a token over chunk caches in place, and of transformers over a cache of its own."""
    engine = engine.with_store(FolderStore(folder))
    engine.index(chunks, progress=False)
    series = {"reuse": Series(), "transformers": Series()}
    for place in range(repeats + 1):
        prefill = engine.prefill(QUESTION, chunks, strategy="reuse")
        room = min(TOKENS, engine.architecture.max_tokens - len(prefill.token_ids))
        theirs = _cache_of_transformers(engine.prefill(QUESTION, chunks, strategy="reuse"))
        found = {"reuse": _ours(prefill, room), "transformers": _theirs(prefill, theirs, room)}
        if place:
            for name, seconds in found.items():
                series[name].values.append(seconds)
        step()
    return series


def _ours(prefill: Prefill, tokens: int) -> float:
    token = int(prefill.logits.argmax())
    start = time.perf_counter()
    for _ in range(tokens):
        token = int(prefill.run([token]).argmax())
    return (time.perf_counter() - start) / tokens


def _theirs(prefill: Prefill, cache: DynamicCache, tokens: int) -> float:
    token, model = int(prefill.logits.argmax()), prefill.model
    start = time.perf_counter()
    for _ in range(tokens):
        ids = torch.tensor([[token]], device=model.device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        token = int(logits[0, -1].argmax())
    return (time.perf_counter() - start) / tokens


def _cache_of_transformers(prefill: Prefill) -> DynamicCache:
    """The same context as transformers itself keeps it."""
    ours, cache = prefill.cache, DynamicCache()
    used = ours.get_seq_length()
    for layer, (keys, values) in enumerate(zip(ours.key_buffer, ours.value_buffer, strict=True)):
        cache.update(keys[:, :, :used].clone(), values[:, :, :used].clone(), layer)
    return cache
