"""What computing a share of the chunks' tokens anew costs, beside `reuse` and full prefill.

    python benchmarks/shares.py --dtype float32 --chunk-tokens 120 500 --out shares.json

Ten chunks from files in a new order each time, one question; all ways in turn, in one process.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.bench.corpus import CHUNKS, QUESTION, corpus_ids, cut_chunk
from kvlink_rag.bench.series import Series, machine
from kvlink_rag.bench.ttft import fast_prefill
from kvlink_rag.common.corpus import corpus_files
from kvlink_rag.common.progress import bar
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

SHARES = (0.02, 0.04, 0.08, 0.15)

Way = Callable[[KVLinkEngine, Sequence[Chunk]], float]


def ways() -> dict[str, Way]:
    """Seconds to the first token, by way."""

    def way(**options: Any) -> Way:
        return lambda engine, chunks: engine.prefill(QUESTION, chunks, **options).report.ttft_s

    return {
        "reuse": way(strategy="reuse"),
        **{f"{100 * s:g} %": way(strategy="recompute", recompute=s) for s in SHARES},
        "full, same attention": fast_prefill,
        "full": way(strategy="full"),
    }


def measure(engine: KVLinkEngine, chunks: list[Chunk], repeats: int) -> dict[str, Series]:
    """All ways in turn, after one round that is not counted."""
    engine.index(chunks, progress=False)
    rng = random.Random(0)
    series = {name: Series() for name in ways()}
    with bar("Measuring", repeats + 1) as show:
        for turn in range(repeats + 1):
            for name, way in ways().items():
                order = rng.sample(chunks, len(chunks))
                seconds = way(engine, order)
                if turn:
                    series[name].values.append(seconds)
            show(turn + 1)
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[120, 500])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = KVLinkEngine.from_pretrained(DEFAULT_MODEL, store=folder, dtype=given.dtype)
        ids = corpus_ids(engine, [file.read_text(encoding="utf-8") for file in corpus_files()])
        for tokens in given.chunk_tokens:
            rng = random.Random(tokens)
            chunks = [cut_chunk(engine, ids, tokens, rng) for _ in range(CHUNKS)]
            series = measure(engine, chunks, given.repeats)
            full = series["full, same attention"].median
            print(f"\n{CHUNKS} chunks of {tokens} tokens, {engine.architecture.dtype}")
            for name, each in series.items():
                low, high = min(each.values), max(each.values)
                print(
                    f"{name:21} {each.median:.3f} s ({low:.3f}-{high:.3f}), "
                    f"{each.median / full:.1%} of full prefill by the same attention"
                )
            found[str(tokens)] = {name: each.as_dict() for name, each in series.items()}
        if given.out:
            given.out.write_text(
                json.dumps({"machine": machine(engine), "seconds": found}, indent=1) + "\n",
                encoding="utf-8",
            )


if __name__ == "__main__":
    main()
