"""``kvlink demo``: questions answered from chunk caches and by full prefill, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvlink_rag.common.corpus import corpus_files as corpus_files

if TYPE_CHECKING:
    from kvlink_rag.engine.answer import Answer
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.index.index import KVIndex

QUESTIONS = (
    "What are the three major types of rock?",
    "Who was the first person to walk on the Moon?",
    "When did the 1973 oil crisis begin?",
    "Which bacterium caused the Black Death?",
    "What was the name of the rocket that launched the Apollo missions to the Moon?",
    "When was the great plague of London?",
)
WARM_UP = "What is this collection of articles about?"

CHUNKS_PER_QUESTION = 10
"""Makes prompts of about 2,000 tokens."""

MAX_NEW_TOKENS = 48
WIDTH = 100


@dataclass(frozen=True)
class Result:
    """One question's two answers."""

    question: str
    cached: Answer
    full: Answer

    @property
    def ratio(self) -> float:
        """How many times sooner the first token came from caches."""
        return self.full.report.ttft_s / self.cached.report.ttft_s


def run(folder: Path | None = None, dtype: str = "auto") -> None:
    """Fetch the models, build or reuse the index, ask, and print.

    Args:
        folder: the index; None keeps it in the user's cache folder.
        dtype: as of :meth:`KVLinkEngine.from_pretrained`.

    Raises:
        ModelNotFoundError: the default models cannot be had.
        StoreError: the folder cannot be used.
    """
    from kvlink_rag.common.paths import cache_dir
    from kvlink_rag.common.progress import quiet_libraries
    from kvlink_rag.index.index import KVIndex
    from kvlink_rag.runners.transformers import models

    console = Console(width=min(WIDTH, Console().width), highlight=False)
    folder = cache_dir() / "demo-index" if folder is None else folder
    quiet_libraries()
    for model in (models.DEFAULT_MODEL, models.DEFAULT_EMBEDDINGS):
        models.resolve(model)
    with console.status(f"Loading {models.DEFAULT_MODEL}"):
        engine = _load(dtype)
    with KVIndex.open(folder, engine) as index:
        update(index, dtype)
        _introduce(console, index, folder)
        _warm_up(console, index)
        results = []
        for number, question in enumerate(QUESTIONS, 1):
            with console.status(f"Question {number} of {len(QUESTIONS)}"):
                result = ask(index, question)
            results.append(result)
            console.print(_show(number, result))
    console.print(_summary(results))


def update(index: KVIndex, dtype: str = "auto") -> None:
    """Index the articles that the index does not have yet."""
    from kvlink_rag.index.ingest import Plan, Splitting, carry_out, read_files

    splitting = Splitting(
        model=index.engine.name, dtype=dtype, encode_behind=index.engine.encode_behind
    )
    recorded = index.catalog.sources()
    plan = Plan()
    for file in corpus_files():
        same = recorded.get(file.name) == splitting.digest(file.read_bytes())
        (plan.unchanged if same else plan.changed).append(file)
    names = {file.name for file in (*plan.unchanged, *plan.changed)}
    plan.vanished = sorted(set(recorded) - names)
    # by name, not by path: another checkout finds the same index
    carry_out(read_files(plan, index.engine, splitting, name=lambda file: file.name), index)


def ask(index: KVIndex, question: str) -> Result:
    """One question, answered twice from the same chunks."""
    # the best chunk last, nearest to the question: a small model answers better so
    chunks = index.search(question, CHUNKS_PER_QUESTION)[::-1]
    cached, full = (
        index.engine.answer(
            question, chunks, strategy=strategy, max_new_tokens=MAX_NEW_TOKENS, stop="\n\n"
        )
        for strategy in (None, "full")
    )
    return Result(question, cached, full)


def _load(dtype: str) -> KVLinkEngine:
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.runners.transformers import models
    from kvlink_rag.store import MemoryStore

    # the index has a store of its own
    return KVLinkEngine.from_pretrained(models.DEFAULT_MODEL, store=MemoryStore(), dtype=dtype)


def _introduce(console: Console, index: KVIndex, folder: Path) -> None:
    stat = index.stat()
    console.print(
        f"[bold]{stat.sources} Wikipedia articles[/bold] in {stat.chunks} chunks, "
        f"{stat.caches.nbytes / 1e6:.0f} MB of chunk caches"
    )
    console.print(f"Model: {stat.model_name}", style="dim", markup=False, soft_wrap=True)
    console.print(f"Index: {folder}", style="dim", markup=False, soft_wrap=True)


def _warm_up(console: Console, index: KVIndex) -> None:
    with console.status("Warming up"):
        ask(index, WARM_UP)
    console.print(
        f"One question was asked untimed to warm up. Each prompt below holds "
        f"{CHUNKS_PER_QUESTION} chunks; decoding is greedy. TTFT is the time to the first token.",
        style="dim",
    )
    console.print()


def _show(number: int, result: Result) -> Group:
    """A question with its answers and times."""
    table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
    table.add_column(style="bold", width=6)
    table.add_column(justify="right", width=9, no_wrap=True)
    table.add_column(ratio=1)
    for name, answer in (("caches", result.cached), ("full", result.full)):
        table.add_row(name, _ms(answer.report.ttft_s), Text(" ".join(answer.text.split())))
    report = result.cached.report
    cost = (
        f"first token [bold green]{result.ratio:.1f}x sooner[/bold green][dim] · "
        f"{report.hits} hits, {report.misses} misses · prompt {report.context_tokens} tokens, "
        f"{report.computed_tokens} computed[/dim]"
    )
    return Group(Text(f"{number}. {result.question}", style="bold cyan"), table, f"  {cost}", "")


def _summary(results: list[Result]) -> Panel:
    cached = median(result.cached.report.ttft_s for result in results)
    full = median(result.full.report.ttft_s for result in results)
    ratio = median(result.ratio for result in results)
    hits = sum(result.cached.report.hits for result in results)
    misses = sum(result.cached.report.misses for result in results)
    return Panel(
        f"Median TTFT of {len(results)} questions: [bold]{_ms(cached)}[/bold] from chunk caches "
        f"({results[0].cached.report.way}), "
        f"[bold]{_ms(full)}[/bold] with full prefill: "
        f"[bold green]{ratio:.1f}x sooner[/bold green]. {hits} hits, {misses} misses.",
        title="Summary",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
