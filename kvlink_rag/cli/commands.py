"""The commands ``kvlink ...``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from kvlink_rag.cli.shared import (
    Commands,
    load_engine,
    prepare,
    print_list,
    size_text,
)
from kvlink_rag.cli.store import store_app
from kvlink_rag.errors import IndexMismatchError, InputError

if TYPE_CHECKING:
    from kvlink_rag.chunk import ScoredChunk
    from kvlink_rag.engine.report import Report
    from kvlink_rag.index.documents import Skipped
    from kvlink_rag.index.ingest import Plan, Splitting, Summary

Strategy = Literal["reuse", "recompute", "full", "link"]
LinkLayout = Literal["slot", "shared", "tail"]
AdapterKind = Literal["cache-preserving", "whole-model"]
RemoteURL = Annotated[
    str | None,
    typer.Option(
        envvar="KVLINK_REMOTE",
        help="What several machines share behind the index' folder, such as s3://bucket/kv.",
    ),
]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answers from documents whose KV caches are computed once, at indexing time.",
)
app.add_typer(store_app, name="store")


def main() -> None:
    """Entry point of ``kvlink``."""
    app()


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Where the demo's index is kept; default: the user cache.")
    ] = None,
) -> None:
    """Ask questions about five Wikipedia articles, with chunk reuse and with full prefill."""
    prepare()
    from kvlink_rag.demo import run

    run(folder)


@app.command()
def index(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Text, Markdown and PDF files, folders.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The index' folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or GGUF file. Default: as before, or a small one."),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in a chunk. Default: as before, or 256.")
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(help="Most tokens repeated from the chunk before. Default: as before, or 32."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or name of an adapter. Default: as before, or none."),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Of a new index: raw, bf16, fp8, int8, int4, or auto: the smallest that hardly "
            "changes answers. Default: raw."
        ),
    ] = None,
    cache_after: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Store caches now (0), or when a chunk is retrieved for the n-th time. "
            "Default: as before, or now.",
        ),
    ] = None,
    encrypt: Annotated[
        bool,
        typer.Option("--encrypt", help="Of a new index: caches, with the key in KVLINK_STORE_KEY."),
    ] = False,
    remote: RemoteURL = None,
) -> None:
    """Bring an index up to date: index what changed, remove what vanished."""
    prepare()
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.index.check import is_index
    from kvlink_rag.index.ingest import make_plan
    from kvlink_rag.store.codec import check_codec

    if codec is not None and codec != "auto":
        check_codec(codec)
    known: dict[str, str] = {}
    recorded: dict[str, str] = {}
    if is_index(out):
        catalog = IndexCatalog(out)
        recorded = catalog.sources()
        names = ("model", "model_name", "chunk_tokens", "overlap", "adapter", "cache_after")
        known = {name: value for name in names if (value := catalog.meta(name))}
        catalog.close()
    adapter = _absolute(adapter) if adapter is not None else known.get("adapter", "")
    splitting = replace(_splitting(out, known, model, chunk_tokens, overlap), adapter=adapter)
    plan = make_plan(paths, recorded, splitting)
    if not recorded and not plan.changed:
        _list_skipped(plan.skipped)
        raise InputError(f"nothing to index: no text, Markdown or PDF in {', '.join(paths)}")
    after = int(known.get("cache_after", 0)) if cache_after is None else cache_after
    summary = _update(out, plan, splitting, codec, after, encrypt, remote or None)
    _list_summary(out, summary)


def _splitting(
    out: Path, known: dict[str, str], model: str | None, tokens: int | None, overlap: int | None
) -> Splitting:
    """The settings given, else those that the index was made with, else the defaults."""
    from kvlink_rag.index.ingest import Splitting
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

    before = known.get("model") or known.get("model_name")
    model = model and _absolute(model)
    if model and before and model != before:
        raise IndexMismatchError(
            f"{out} was made with the model {before}: leave --model out, or index into another "
            f"folder for {model}"
        )
    return Splitting(
        tokens=tokens if tokens is not None else int(known.get("chunk_tokens", 256)),
        overlap=overlap if overlap is not None else int(known.get("overlap", 32)),
        model=model or before or DEFAULT_MODEL,
    )


def _absolute(name: str) -> str:
    """A path that exists, from the root on: the index may be used from anywhere. Else the name."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name and path.exists() else name


def _update(
    out: Path,
    plan: Plan,
    splitting: Splitting,
    codec: str | None,
    cache_after: int,
    encrypt: bool,
    remote: str | None,
) -> Summary:
    """Carry a plan out; the model is loaded only when there is something to do."""
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.index.ingest import Summary, carry_out, settle
    from kvlink_rag.store import env_key

    key = env_key if encrypt else None
    # another one of these for the same caches; all else of a plan's settings means work to do
    chosen = {"adapter": splitting.adapter, "cache_after": str(cache_after)}
    if plan.nothing_to_do:
        waiting = settle(out, None if codec == "auto" else codec, key, remote)
        catalog = IndexCatalog(out)
        if any((catalog.meta(name) or "") != value for name, value in chosen.items()):
            catalog.set_meta(chosen)
        catalog.close()
        return Summary(unchanged=len(plan.unchanged), skipped=plan.skipped, waiting=waiting)
    from kvlink_rag.index.index import KVIndex

    engine = load_engine(splitting.model, splitting.adapter, cache_after)
    with KVIndex.open(out, engine, codec=codec, encryption_key=key, remote=remote) as opened:
        settings = {"chunk_tokens": str(splitting.tokens), "overlap": str(splitting.overlap)}
        opened.catalog.set_meta(settings | chosen | {"model": splitting.model})
        return carry_out(plan, opened, splitting)


@app.command()
def ask(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An index.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    k: Annotated[int, typer.Option("-k", help="How many chunks to answer from.")] = 4,
    strategy: Annotated[
        Strategy | None,
        typer.Option(help="How the chunks get into the model. Default: link with an adapter."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or name of an adapter. Default: the index' own, or none."),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the answer while it is being made.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    system: Annotated[str | None, typer.Option(help="Another system prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    remote: RemoteURL = None,
) -> None:
    """Answer a question from an index, and list the sources."""
    prepare()
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

    catalog = IndexCatalog(folder)
    model = catalog.meta("model") or catalog.meta("model_name") or DEFAULT_MODEL
    adapter = catalog.meta("adapter") or "" if adapter is None else adapter
    cache_after = int(catalog.meta("cache_after") or 0)
    empty = len(catalog) == 0
    catalog.close()
    if empty:
        raise InputError(f"{folder} holds no chunks: run kvlink index PATH... --out {folder} first")

    from kvlink_rag.index.index import KVIndex

    engine = load_engine(model, adapter, cache_after)
    with KVIndex.open(folder, engine, remote=remote or None) as opened:
        loaded = opened.engine.adapter
        if strategy is None:
            strategy = "link" if loaded is not None and loaded.links else "reuse"
        chunks = opened.search(question, k)
        answer = opened.engine.stream(
            question,
            chunks,
            strategy=strategy,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        for piece in answer:
            if stream:
                typer.echo(piece, nl=False)
        typer.echo("" if stream else answer.text)
    _list_sources(chunks, answer.report)


@app.command()
def bench(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for bench.json, bench.md and bench.png.")
    ] = Path("bench-results"),
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder to cut chunks from, repeatable. Default: the demo's."),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Context length in tokens, repeatable. Default: 1000 to 8000."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Measure `link` with it. Default: the default model's own."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each way and length.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the chunks and their order.")] = 0,
) -> None:
    """Time to first token of every strategy against full prefill; indexing; decoding."""
    prepare()
    from kvlink_rag.adapters.load import shipped_adapters
    from kvlink_rag.bench import run_bench, table, write
    from kvlink_rag.bench.run import LENGTHS
    from kvlink_rag.demo import corpus_files
    from kvlink_rag.index.documents import Document, find_files, read_file
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

    files = find_files(text) if text else corpus_files()
    documents = [read for file in files if isinstance(read := read_file(file), Document)]
    result = run_bench(
        load_engine(model or DEFAULT_MODEL),
        [document.text for document in documents],
        adapter=adapter or (shipped_adapters()[0] if model is None else None),
        lengths=length or LENGTHS,
        repeats=repeats,
        seed=seed,
    )
    paths = write(result, out)
    typer.echo(table(result))
    typer.echo(f"written: {', '.join(str(path) for path in paths)}")


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints and adapter.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Documents (files or folders) or JSON lines of questions, text, instructions, "
            "summaries; repeatable; PATH=SHARE weighs them."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file of settings; the other options replace its own.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the base model.")] = None,
    links: Annotated[
        int | None, typer.Option(help="Link tokens a chunk (layout tail: in all). Default: 5.")
    ] = None,
    layout: Annotated[
        LinkLayout | None, typer.Option(help="Where link tokens stand. Default: shared.")
    ] = None,
    kind: Annotated[
        AdapterKind | None,
        typer.Option(help="Whether the base model's caches stay valid. Default: they do."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA. Default: 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: 1000.")] = None,
    batch: Annotated[int | None, typer.Option(help="Lessons in a step. Default: 4.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 5e-4.")] = None,
    max_chunks: Annotated[int | None, typer.Option(help="In a lesson. Default: 10.")] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: 50.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Adapter to go on from: folder or name. Default: anew.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Where chunk caches are kept for other runs. Default: not kept."),
    ] = None,
) -> None:
    """Train link tokens and a LoRA; run the same command again to go on after an interruption."""
    prepare()
    from kvlink_rag.common.progress import quiet_libraries
    from kvlink_rag.training.run import train as run
    from kvlink_rag.training.settings import TrainSettings, parse_shares, read_settings

    quiet_libraries()
    given: dict[str, Any] = {
        "model": model, "links": links, "layout": layout, "kind": kind, "rank": rank,
        "steps": steps, "batch": batch, "learning_rate": learning_rate, "max_chunks": max_chunks,
        "save_steps": save_steps, "seed": seed, "start": start,
        "data": parse_shares(data) if data else None,
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    settings = read_settings(config, **changes) if config else TrainSettings(**changes)
    adapter = run(settings, out, store)
    held_out: Any = adapter.notes["held_out"]
    typer.echo("held-out lessons, loss before and after:")
    for name, loss in held_out["after"].items():
        typer.echo(f"  {name:<10} {held_out['before'].get(name, float('nan')):.3f}  {loss:.3f}")
    typer.echo(f"written: {out}; use it: adapter={str(out)!r}")


@app.command("eval")
def evaluate(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for answers and results; a run goes on.")
    ] = Path("eval-results"),
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Questions: a .jsonl file or a set's name, repeatable. Default: 5 sets."),
    ] = None,
    strategies: Annotated[
        str | None, typer.Option(help="Of none,full,reuse,recompute,link. Default: all but none.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folder or name of an adapter, repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with rows, sets and settings of its own.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="The first so many of each set. Default: all.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(help="Documents a question, the gold ones first. Default: all.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest answer. Default: 32, summaries 128.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the distractors. Default: 0.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Row to compare with. Default: full without adapter.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help='Perplexity of {"text"} lines, adapters on against off; repeatable.'),
    ] = None,
    instructions: Annotated[
        list[str] | None, typer.Option(help='The same of {"messages"} lines; repeatable.')
    ] = None,
    shard: Annotated[str, typer.Option(help="Answer only every n-th question: i/n.")] = "0/1",
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Only make the table of what is in the folder.")
    ] = False,
) -> None:
    """Answers of every strategy and adapter to the same questions, scored with intervals."""
    prepare()
    if not table_only:
        given = {
            "model": model,
            "sets": data,
            "questions": questions,
            "chunks": chunks,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "reference": reference,
            "text": text,
            "instructions": instructions,
        }
        _evaluate(out, given, strategies, adapter, config, shard)
    from kvlink_rag.evaluation.table import write

    typer.echo(write(out))
    typer.echo(f"written: {out / 'results.json'}, {out / 'results.md'}")


def _evaluate(
    out: Path,
    given: dict[str, Any],
    strategies: str | None,
    adapters: list[str] | None,
    config: Path | None,
    shard: str,
) -> None:
    """Options given on the command line stand above the configuration's."""
    from kvlink_rag.evaluation.data import QA_SETS, find_set
    from kvlink_rag.evaluation.journal import parse_shard
    from kvlink_rag.evaluation.plan import make_rows, plan_of, read_plan

    settings = read_plan(config) if config else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    if "rows" in settings and (strategies or adapters):
        raise InputError(f"{config} has rows: leave --strategies and --adapter out")
    if "rows" not in settings:
        default = "full,reuse,recompute" + (",link" if adapters else "")
        names = [name.strip() for name in (strategies or default).split(",")]
        settings["rows"] = list(make_rows(names, adapters or []))
    if not any(settings.get(name) for name in ("sets", "text", "instructions")):
        settings["sets"] = list(QA_SETS)
    plan, part = plan_of(settings), parse_shard(shard)
    for name in plan.sets:  # before the model is loaded
        find_set(name)

    from kvlink_rag.evaluation.run import evaluate

    evaluate(plan, load_engine(plan.model), out, shard=part)


def _list_summary(out: Path, summary: Summary) -> None:
    print_list("added", summary.added)
    print_list("changed", summary.changed)
    print_list("removed", summary.removed)
    print_list("note", [f"{path}: {note}" for path, note in summary.notes])
    _list_skipped(summary.skipped)
    typer.echo(
        f"{out}: {len(summary.added)} added, {len(summary.changed)} changed, "
        f"{summary.unchanged} unchanged, {len(summary.removed)} removed, "
        f"{len(summary.skipped)} skipped ({summary.chunks} chunks indexed)"
    )
    if summary.waiting:
        typer.echo(f"{summary.waiting} uploads wait: the same command goes on with them")


def _list_skipped(skipped: list[Skipped]) -> None:
    print_list("skipped", [f"{skip.path}: {skip.reason}" for skip in skipped], err=True)


def _list_sources(chunks: list[ScoredChunk], report: Report) -> None:
    console = Console(highlight=False)
    console.print()
    for rank, chunk in enumerate(chunks, 1):
        source = chunk.metadata.get("source", chunk.document_id)
        part = f" part {chunk.metadata['part']}" if "part" in chunk.metadata else ""
        line = f"[{rank}] {chunk.title or ''}  {source}{part}  ({chunk.score:.2f})"
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"{report.strategy}: TTFT {report.ttft_s * 1000:.0f} ms, "
        f"{report.hits} hits, {report.misses} misses, "
        f"{report.reused_tokens} tokens reused, {report.computed_tokens} computed, "
        f"{size_text(report.bytes_read)} read",
        style="dim",
        soft_wrap=True,
    )
