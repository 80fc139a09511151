"""What a machine does to an answer: its number types, and a neighbour that keeps a core busy.

    python benchmarks/machine.py

Ten chunks of 500 tokens from files, in a new order each time, `reuse`. Engines of both number types
answer in turn with one of `dtype="auto"`; then the last one, in turn with a neighbour and without.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.bench.corpus import CHUNKS, QUESTION, corpus_ids, cut_chunk
from kvlink_rag.bench.series import Series, machine
from kvlink_rag.common.corpus import corpus_files
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

NEIGHBOUR = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
TOKENS = 500
PASSES = ("reuse", "index")


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) as process:
        time.sleep(0.5)  # until it runs
        try:
            yield
        finally:
            process.kill()


def ttft(engine: KVLinkEngine, chunks: Sequence[Chunk], rng: random.Random) -> float:
    order = rng.sample(chunks, len(chunks))
    return engine.prefill(QUESTION, order, strategy="reuse").report.ttft_s


def indexing(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        twin = engine.with_store(folder)
        start = time.perf_counter()
        twin.index(chunks[:2], progress=False)
        return time.perf_counter() - start


def show(name: str, series: Series) -> None:
    values = series.values
    print(f"{name:24} {series.median:.3f} s ({min(values):.3f}-{max(values):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            dtype: KVLinkEngine.from_pretrained(
                DEFAULT_MODEL, store=Path(folder) / dtype, dtype=dtype
            )
            for dtype in ("float32", "bfloat16", "auto")
        }
        auto = engines["auto"]
        ids = corpus_ids(auto, [file.read_text(encoding="utf-8") for file in corpus_files()])
        chunks = [cut_chunk(auto, ids, TOKENS, rng) for _ in range(CHUNKS)]
        for engine in engines.values():
            engine.index(chunks, progress=False)
        print(", ".join(f"{name} {value}" for name, value in machine(auto).items()))
        series = {(p, dtype): Series() for p in PASSES for dtype in engines}
        for turn in range(given.repeats + 1):
            for dtype, engine in engines.items():
                seconds = (ttft(engine, chunks, rng), indexing(engine, chunks))
                for name, each in zip(PASSES, seconds, strict=True):
                    if turn:  # one round is not counted
                        series[name, dtype].values.append(each)
        for (name, dtype), each in series.items():
            show(f"{name}, {dtype}", each)
        alone, beside = Series(), Series()
        for _ in range(given.repeats):
            alone.values.append(ttft(auto, chunks, rng))
            with neighbour():
                beside.values.append(ttft(auto, chunks, rng))
        show("reuse, alone", alone)
        show("reuse, busy neighbour", beside)


if __name__ == "__main__":
    main()
