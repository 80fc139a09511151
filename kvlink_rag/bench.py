"""`kvlink bench`: time to first token of every strategy, side by side in one process.

Every figure is a wall time around a public call. Strategies alternate within each repeat, chunk
order is drawn anew each time, caches are files on disk (page cache warm). The floor is what any
reuse is bounded by: the same question tokens run over a cache that is already in place.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from kvlink_rag.chunk import Chunk
from kvlink_rag.encode import plan_batches
from kvlink_rag.engine import KVLinkEngine
from kvlink_rag.errors import InputError
from kvlink_rag.forward import run_behind
from kvlink_rag.prefill import Strategy
from kvlink_rag.progress import bar
from kvlink_rag.store import FolderStore

LENGTHS = (1000, 2000, 4000, 5000, 8000)
CHUNKS = 10
INDEX_CHUNK_TOKENS = (200, 500)
QUESTION = "Which of these documents tells when the first of them was written, and by whom?"
STRATEGIES: tuple[Strategy, ...] = ("full", "reuse", "recompute")


@dataclass
class Series:
    """Repeated wall times in seconds."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Median, extremes and every value."""
        values = self.seconds
        return {"median": self.median, "min": min(values), "max": max(values), "all": values}


@dataclass
class LengthResult:
    """All series at one context length; ``tokens`` is the whole prompt."""

    tokens: int
    question_tokens: int
    bytes_read: int
    series: dict[str, Series]


@dataclass
class IndexResult:
    """Tokens a second of indexing to disk, and of a plain batched forward pass of the same."""

    chunk_tokens: int
    index: Series
    forward: Series


@dataclass
class BenchResult:
    """Everything one run measured."""

    machine: dict[str, Any]
    lengths: list[LengthResult]
    decode_s: Series
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
            "decode_s_per_token": self.decode_s.as_dict(),
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
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> BenchResult:
    """Measure one engine; its own store is not touched.

    Args:
        texts: real text to cut chunks from; repeated when too short.
        lengths: context lengths in tokens, ten chunks each; those beyond the model's context are
            an error.
        repeats: timed runs of each strategy at each length.

    Raises:
        InputError: no text, no repeat, or a length the model cannot take.
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
    ids = _corpus_ids(engine, texts)
    with (
        tempfile.TemporaryDirectory(prefix="kvlink-bench-") as folder,
        bar("Measuring", _count(len(lengths), repeats), enabled=progress) as show,
    ):
        steps = _Steps(show)
        engine = engine.with_store(FolderStore(Path(folder) / "ttft"))
        results = [
            _measure_length(engine, cut_chunks(engine, ids, length, rng), repeats, rng, steps)
            for length in lengths
        ]
        decode = _measure_decode(engine, cut_chunks(engine, ids, max(lengths), rng), repeats, steps)
        indexing = [
            _measure_index(engine, ids, tokens, Path(folder), repeats, rng, steps)
            for tokens in INDEX_CHUNK_TOKENS
        ]
    return BenchResult(machine(engine), results, decode, indexing)


def _count(lengths: int, repeats: int) -> int:
    """Steps of the progress bar: lengths, decoding, and indexing with a warm-up each."""
    return (lengths + 1) * repeats + len(INDEX_CHUNK_TOKENS) * (repeats + 1)


class _Steps:
    def __init__(self, show: Callable[[float], None]) -> None:
        self._show, self._done = show, 0

    def __call__(self) -> None:
        self._done += 1
        self._show(self._done)


def _corpus_ids(engine: KVLinkEngine, texts: Sequence[str]) -> list[int]:
    ids = [token for text in texts for token in engine.layout.encode_text(text)]
    if len(ids) < 100:
        raise InputError("the bench needs at least 100 tokens of text to cut chunks from")
    return ids


def cut_chunks(
    engine: KVLinkEngine, ids: Sequence[int], length: int, rng: random.Random
) -> list[Chunk]:
    """Ten chunks of real text, so that the whole prompt is about ``length`` tokens."""
    layout = engine.layout
    around = len(layout.prefix()) + len(layout.question(QUESTION))
    size = max((length - around) // CHUNKS - 2, 4)
    chunks = []
    for _ in range(CHUNKS):
        start = rng.randrange(len(ids))
        tokens = [ids[(start + place) % len(ids)] for place in range(size)]
        chunks.append(Chunk(str(engine.tokenizer.decode(tokens)).strip()))
    return chunks


def _measure_length(
    engine: KVLinkEngine, chunks: list[Chunk], repeats: int, rng: random.Random, step: _Steps
) -> LengthResult:
    engine.index(chunks, progress=False)
    series = {name: Series() for name in (*STRATEGIES, "floor")}
    for strategy in STRATEGIES:  # warm-up: first use of shapes, pages, kernels
        _first_token(engine, chunks, strategy)
    prefill = engine.prefill(QUESTION, chunks)
    for _ in range(repeats):
        order = rng.sample(chunks, len(chunks))
        for name in rng.sample(list(series), len(series)):
            seconds = (
                _floor(engine, chunks) if name == "floor" else _first_token(engine, order, name)  # type: ignore[arg-type]
            )
            series[name].seconds.append(seconds)
        step()
    question = prefill.segments[-1]
    return LengthResult(
        tokens=len(prefill.token_ids),
        question_tokens=question.stop - question.start,
        bytes_read=prefill.report.bytes_read,
        series=series,
    )


def _first_token(engine: KVLinkEngine, chunks: Sequence[Chunk], strategy: Strategy) -> float:
    """Wall time from the call to the first token in hand."""
    start = time.perf_counter()
    engine.answer(QUESTION, chunks, strategy=strategy, max_new_tokens=1)
    return time.perf_counter() - start


def _floor(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> float:
    """The question's forward pass over a cache in place (its preparation is not timed)."""
    prefill = engine.prefill(QUESTION, chunks)
    question = prefill.segments[-1]
    token_ids = prefill.token_ids[question.start :]
    prefill.cache.set_length(question.start)
    start = time.perf_counter()
    int(run_behind(engine.model, prefill.cache, token_ids).argmax())
    return time.perf_counter() - start


def _measure_decode(
    engine: KVLinkEngine, chunks: list[Chunk], repeats: int, step: _Steps
) -> Series:
    """Seconds a token of greedy decoding from a linked cache of the longest context."""
    engine.index(chunks, progress=False)
    series = Series()
    for _ in range(repeats):
        prefill = engine.prefill(QUESTION, chunks)
        token = int(prefill.logits.argmax())
        room = min(8, engine.architecture.max_tokens - len(prefill.token_ids))
        start = time.perf_counter()
        for _ in range(room):
            token = int(run_behind(engine.model, prefill.cache, [token]).argmax())
        series.seconds.append((time.perf_counter() - start) / room)
        step()
    return series


def _measure_index(
    engine: KVLinkEngine,
    ids: list[int],
    chunk_tokens: int,
    folder: Path,
    repeats: int,
    rng: random.Random,
    step: _Steps,
) -> IndexResult:
    """Index about 5,000 tokens, and run them through the model without keeping anything.

    The first time both run untimed: it pays for memory that the process has not touched yet.
    """
    result = IndexResult(chunk_tokens, Series(), Series())
    for place in range(repeats + 1):
        sets = range(round(500 / chunk_tokens))
        length = chunk_tokens * CHUNKS
        chunks = [chunk for _ in sets for chunk in cut_chunks(engine, ids, length, rng)]
        texts = [engine.layout.chunk(chunk) for chunk in chunks]
        tokens = sum(map(len, texts))
        twin = engine.with_store(FolderStore(folder / f"index-{chunk_tokens}-{place}"))
        for series in rng.sample([result.index, result.forward], 2):
            start = time.perf_counter()
            if series is result.index:
                twin.index(chunks, progress=False)
            else:
                plain_forward(engine, texts)
            if place > 0:
                series.seconds.append(tokens / (time.perf_counter() - start))
        step()
    return result


@torch.inference_mode()
def plain_forward(engine: KVLinkEngine, texts: Sequence[Sequence[int]]) -> None:
    """What indexing is compared with: transformers over padded batches of the same texts."""
    for batch in plan_batches([len(text) for text in texts], engine.batch_tokens):
        longest = max(len(texts[i]) for i in batch)
        rows = [[*texts[i], *[0] * (longest - len(texts[i]))] for i in batch]
        engine.model.get_decoder()(torch.tensor(rows, device=engine.model.device), use_cache=True)


def machine(engine: KVLinkEngine) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    device = engine.architecture.device
    return {
        "model": engine.name,
        "dtype": str(engine.architecture.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def table(result: BenchResult) -> str:
    """A Markdown table: medians (lowest to highest), and shares of full prefill."""
    lines = [
        f"| prompt tokens | {' s | '.join((*STRATEGIES, 'floor'))} s | reuse/full | reuse/floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in result.lengths:
        cells = [_cell(each.series[name]) for name in (*STRATEGIES, "floor")]
        reuse = each.series["reuse"].median
        shares = [
            f"{100 * reuse / each.series['full'].median:.1f} %",
            f"{reuse / each.series['floor'].median:.2f}",
        ]
        lines.append(f"| {each.tokens} | {' | '.join([*cells, *shares])} |")
    lines += [
        "",
        "| tokens a chunk | indexing, tokens/s | plain batched forward pass, tokens/s | share |",
        "|---|---|---|---|",
    ]
    for row in result.indexing:
        cells = [_cell(series, 0) for series in (row.index, row.forward)]
        share = 100 * row.index.median / row.forward.median
        lines.append(f"| {row.chunk_tokens} | {' | '.join(cells)} | {share:.0f} % |")
    lines += [
        "",
        f"Decoding: {1000 * result.decode_s.median:.0f} ms a token over "
        f"{result.lengths[-1].tokens} tokens.",
        ", ".join(f"{name} {value}" for name, value in result.machine.items()) + ".",
    ]
    return "\n".join(lines)


def _cell(series: Series, digits: int = 3) -> str:
    values = (series.median, min(series.seconds), max(series.seconds))
    return "{} ({}-{})".format(*(f"{value:.{digits}f}" for value in values))


def plot(result: BenchResult, path: Path) -> None:
    """TTFT over context length, a line a strategy with its spread, and the floor.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs matplotlib: pip install 'kvlink-rag[bench]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tokens = [each.tokens for each in result.lengths]
    for name in (*STRATEGIES, "floor"):
        series = [each.series[name] for each in result.lengths]
        style = "--" if name == "floor" else "-"
        label = "floor: question over a cache in place" if name == "floor" else name
        axes.plot(tokens, [s.median for s in series], style, marker="o", label=label)
        axes.fill_between(
            tokens, [min(s.seconds) for s in series], [max(s.seconds) for s in series], alpha=0.2
        )
    axes.set(
        xlabel="prompt tokens (10 chunks, random order, caches on disk)",
        ylabel="time to first token, s",
        yscale="log",
        title=f"{result.machine['model']}, {result.machine['dtype']}, "
        f"{result.machine['threads']} threads",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write(result: BenchResult, folder: Path) -> list[Path]:
    """Write bench.json, bench.md and bench.png (when matplotlib is there) to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.json", folder / "bench.md"]
    paths[0].write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(table(result) + "\n", encoding="utf-8")
    try:
        plot(result, folder / "bench.png")
    except InputError:
        return paths
    return [*paths, folder / "bench.png"]
