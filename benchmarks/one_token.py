"""A token of an answer: by the compiled step, and by torch's layers with the same attention.

    python benchmarks/one_token.py --dtype bfloat16 --adapter smollm2-135m-link5

In turn, over the same caches in one process: milliseconds, median (range).
"""

from __future__ import annotations

import argparse
import random
import time

from kvlink_rag import KVLinkEngine
from kvlink_rag.bench.corpus import QUESTION, corpus_ids, cut_chunk
from kvlink_rag.bench.series import Series
from kvlink_rag.common.corpus import corpus_files
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
from kvlink_rag.store import MemoryStore

SHAPES = ((10, 500), (8, 170))
"""Chunks, and tokens of each."""
WARM_UP = 2


def measure(engine: KVLinkEngine, count: int, tokens: int, repeats: int) -> dict[str, Series]:
    texts = [path.read_text(encoding="utf-8") for path in corpus_files()]
    ids, rng = corpus_ids(engine, texts), random.Random(0)
    chunks = [cut_chunk(engine, ids, tokens, rng) for _ in range(count)]
    states = {
        name: engine.prefill(QUESTION, chunks, strategy="reuse", max_new_tokens=2 * repeats).state
        for name in ("step", "torch")
    }
    states["torch"].stepped = False
    series = {name: Series() for name in states}
    for number in range(WARM_UP + repeats):
        for name, state in states.items():
            start = time.perf_counter()
            state.run([1000 + number])
            if number >= WARM_UP:
                series[name].values.append(1000 * (time.perf_counter() - start))
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapter")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    engine = KVLinkEngine.from_pretrained(
        DEFAULT_MODEL, dtype=given.dtype, adapter=given.adapter, store=MemoryStore()
    )
    for count, tokens in SHAPES:
        for name, its in measure(engine, count, tokens, given.repeats).items():
            low, high = min(its.values), max(its.values)
            print(f"{count} x {tokens} {name}: {its.median:.1f} ({low:.1f}-{high:.1f})")


if __name__ == "__main__":
    main()
