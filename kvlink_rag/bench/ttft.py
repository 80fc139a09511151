"""Time to the first token of one prompt, by every way there is to get it."""

from __future__ import annotations

import copy
import gc
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kvlink_rag.bench.corpus import QUESTION
from kvlink_rag.bench.series import Series, Steps
from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.prompt.layout import PromptLayout
from kvlink_rag.prompt.segments import RecomputeBy, Strategy
from kvlink_rag.runners.transformers.context import new_cache
from kvlink_rag.runners.transformers.forward import run_behind
from kvlink_rag.store import FolderStore
from kvlink_rag.store.ram import RamTier

RAM_BYTES = 1 << 32

Way = Callable[[Sequence[Chunk]], float]
"""Seconds to the first token of the question over chunks in an order."""


@dataclass
class LengthResult:
    """All series at one prompt length.

    Attributes:
        tokens: of the whole prompt.
        question_tokens: of these, behind the last chunk.
        bytes_read: keys and values of the chunks.
        series: seconds by way.
    """

    tokens: int
    question_tokens: int
    bytes_read: int
    series: dict[str, Series]


def measure_length(
    engine: KVLinkEngine,
    linking: Mapping[str, KVLinkEngine],
    folder: Path,
    chunks: list[Chunk],
    repeats: int,
    rng: random.Random,
    step: Steps,
) -> LengthResult:
    """Every way ``repeats`` times, in a new order of ways and of chunks each time.

    Args:
        linking: engines with link tokens to measure `link` with, by the name of the way.
    """
    engine = engine.with_store(FolderStore(folder))
    engine.index(chunks, progress=False)
    tokens, question_tokens, nbytes = _sizes(engine, chunks)
    ways = _ways(engine, folder, nbytes)
    for name, its in linking.items():
        its = its.with_store(engine.store)
        its.index(chunks, progress=False)  # a whole-model adapter has caches of its own
        ways[name] = partial(_first_token, its, strategy="link")
    for way in ways.values():  # warm-up: first use of shapes, pages, kernels
        way(chunks)
    series = {name: Series() for name in ways}
    for _ in range(repeats):
        order = rng.sample(chunks, len(chunks))
        for name in rng.sample(list(ways), len(ways)):
            series[name].values.append(ways[name](order))
        step()
    return LengthResult(tokens, question_tokens, nbytes, series)


def _sizes(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> tuple[int, int, int]:
    """Tokens of prompt and question, bytes of caches.

    No prefill outlives this: files that somebody holds mapped are neither mapped anew nor dropped
    from the page cache.
    """
    prefill = engine.prefill(QUESTION, chunks, strategy="reuse")
    question = prefill.segments[-1]
    tokens = len(prefill.token_ids)
    return tokens, question.stop - question.start, prefill.report.bytes_read


def _ways(engine: KVLinkEngine, folder: Path, nbytes: int) -> dict[str, Way]:
    """By name."""
    in_memory = engine.with_store(RamTier(engine.store, RAM_BYTES))
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def dropped(chunks: Sequence[Chunk]) -> float:
        drop_page_cache(folder)
        return _first_token(engine, chunks, "reuse")

    def copied(_: Sequence[Chunk]) -> float:
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start

    ways: dict[str, Way] = {
        "full": lambda chunks: _first_token(engine, chunks, "full"),
        "full, fast attention": lambda chunks: fast_prefill(engine, chunks),
        "recompute": lambda chunks: _first_token(engine, chunks, "recompute", "first"),
        "recompute by question": lambda chunks: _first_token(
            engine, chunks, "recompute", "question"
        ),
        "reuse, page cache dropped": dropped,
        "reuse": lambda chunks: _first_token(engine, chunks, "reuse"),
        "reuse, RAM tier": lambda chunks: _from_memory(in_memory, chunks),
        "cache in place": lambda chunks: _in_place(engine, chunks),
        "one copy of the bytes": copied,
    }
    if not hasattr(os, "posix_fadvise"):
        del ways["reuse, page cache dropped"]
    return ways


def _first_token(
    engine: KVLinkEngine,
    chunks: Sequence[Chunk],
    strategy: Strategy,
    by: RecomputeBy | None = None,
) -> float:
    """Wall time from the call to the first token in hand, in a process new to the chunks' texts."""
    engine = copy.copy(engine)
    engine.layout = PromptLayout(engine.tokenizer, engine.layout.template)
    return _timed(engine, chunks, strategy, by)


def _from_memory(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> float:
    """The same where process and RAM tier have met the chunks before."""
    for _ in range(2):  # asked for, then kept
        engine.prefill(QUESTION, chunks, strategy="reuse")
        store = engine.store
        assert isinstance(store, RamTier)
        store.flush()
    return _timed(engine, chunks, "reuse")


def _timed(
    engine: KVLinkEngine,
    chunks: Sequence[Chunk],
    strategy: Strategy,
    by: RecomputeBy | None = None,
) -> float:
    start = time.perf_counter()
    engine.answer(QUESTION, chunks, strategy=strategy, recompute_by=by, max_new_tokens=1)
    return time.perf_counter() - start


def fast_prefill(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> float:
    """The same prompt through the attention that `reuse` has; `full` keeps the model's own."""
    start = time.perf_counter()
    prompt = _prompt(engine, chunks)
    int(run_behind(engine.reader, new_cache(engine.architecture, len(prompt)), prompt).argmax())
    return time.perf_counter() - start


def _prompt(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> list[int]:
    parts = engine.layout.lay_out(QUESTION)
    texts = [engine.layout.chunk(chunk) for chunk in chunks]
    return [*parts.prefix, *(token for ids in texts for token in ids), *parts.question]


def _in_place(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> float:
    """The question's forward pass over a cache in place (its preparation is not timed)."""
    prefill = engine.prefill(QUESTION, chunks, strategy="reuse")
    question = prefill.segments[-1]
    token_ids = prefill.token_ids[question.start :]
    cache = prefill.cache
    cache.set_length(question.start)
    run_behind(engine.reader, cache, token_ids)  # as a prefix cache that was hit before
    cache.set_length(question.start)
    start = time.perf_counter()
    int(run_behind(engine.reader, cache, token_ids).argmax())
    return time.perf_counter() - start


def drop_page_cache(folder: Path) -> None:
    """Let the operating system forget the contents of the files in a folder."""
    gc.collect()  # mapped files cannot be dropped
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
