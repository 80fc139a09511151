"""All measurements, side by side in one process.

Every figure is a wall time around a public call. Ways alternate within each repeat, and the order
of the chunks is drawn anew each time.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.adapters.load import load_adapter
from kvlink_rag.bench.corpus import corpus_ids, cut_chunks
from kvlink_rag.bench.decode import measure_decode
from kvlink_rag.bench.indexing import MIXES, IndexResult, measure_indexing
from kvlink_rag.bench.series import Series, Steps, machine
from kvlink_rag.bench.ttft import LengthResult, measure_length
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError

LENGTHS = (1000, 2000, 5000, 8000)
DECODE_TOKENS = 5000


@dataclass
class BenchResult:
    """Everything one run measured.

    Attributes:
        decode_tokens: of the prompt that was decoded behind.
        decode_s: seconds a token behind it.
    """

    machine: dict[str, Any]
    lengths: list[LengthResult]
    decode_tokens: int
    decode_s: dict[str, Series]
    indexing: list[IndexResult]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "machine": self.machine,
            "ttft": [
                {
                    **{k: v for k, v in asdict(each).items() if k != "series"},
                    "series_s": {name: s.as_dict() for name, s in each.series.items()},
                }
                for each in self.lengths
            ],
            "decode_tokens": self.decode_tokens,
            "decode_s_per_token": {name: s.as_dict() for name, s in self.decode_s.items()},
            "indexing": [
                {
                    "chunk_tokens": each.chunk_tokens,
                    "index_tokens_per_s": each.index.as_dict(),
                    "plain_forward_tokens_per_s": each.forward.as_dict(),
                }
                for each in self.indexing
            ],
        }


def run_bench(
    engine: KVLinkEngine,
    texts: Sequence[str],
    *,
    adapter: str | Path | Adapter | None = None,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> BenchResult:
    """Measure one engine; its own store is not touched.

    Args:
        texts: real text to cut chunks from; repeated when too short.
        adapter: with link tokens: `link` is measured with it, as it is and merged into the
            weights; everything else without.
        lengths: prompt lengths in tokens, ten chunks each; those beyond the model's context are
            an error.
        repeats: timed runs of each way at each length.

    Raises:
        InputError: no text, no repeat, or a length the model cannot take.
        AdapterError: the adapter is missing or for another model.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, not {repeats}")
    too_long = [n for n in lengths if n < 200 or n > engine.architecture.max_tokens]
    if too_long or not lengths:
        raise InputError(
            f"context lengths {too_long or list(lengths)} are not possible: name lengths from 200 "
            f"to {engine.architecture.max_tokens} tokens"
        )
    rng = random.Random(seed)
    ids = corpus_ids(engine, texts)
    linking = {} if adapter is None else _linking(engine, adapter)
    steps = (len(lengths) + 1) * repeats + 1 + len(MIXES) * (repeats + 1)
    with (
        tempfile.TemporaryDirectory(prefix="kvlink-bench-") as name,
        bar("Measuring", steps, enabled=progress) as show,
    ):
        step, folder = Steps(show), Path(name)
        results = []
        for length in lengths:
            chunks = cut_chunks(engine, ids, length, rng)
            place = folder / f"ttft-{length}"
            results.append(measure_length(engine, linking, place, chunks, repeats, rng, step))
        behind = min(max(lengths), DECODE_TOKENS)
        chunks = cut_chunks(engine, ids, behind, rng)
        decode = measure_decode(engine, folder / "decode", chunks, repeats, step)
        indexing = [measure_indexing(engine, ids, mix, folder, repeats, rng, step) for mix in MIXES]
    return BenchResult(machine(engine), results, behind, decode, indexing)


def _linking(engine: KVLinkEngine, adapter: str | Path | Adapter) -> dict[str, KVLinkEngine]:
    trained = load_adapter(adapter)
    linking = {"link": engine.with_adapter(trained, merge_adapter=False)}
    if trained.kind == "cache-preserving" and trained.lora_config is not None:
        linking["link, merged"] = engine.with_adapter(trained, merge_adapter=True)
    return linking
