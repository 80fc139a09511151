"""The command ``kvlink bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvlink_rag.cli.options import ModelDtype
from kvlink_rag.cli.shared import load_engine, prepare, read_documents


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
    dtype: ModelDtype = "auto",
) -> None:
    """Time to first token of every strategy against full prefill; indexing; decoding."""
    prepare()
    from kvlink_rag.adapters.load import shipped_adapters
    from kvlink_rag.bench import run_bench, table, write
    from kvlink_rag.bench.run import LENGTHS
    from kvlink_rag.demo import corpus_files
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

    documents = read_documents(text or corpus_files())
    result = run_bench(
        load_engine(model or DEFAULT_MODEL, dtype=dtype),
        [document.text for document in documents],
        adapter=adapter or (shipped_adapters()[0] if model is None else None),
        lengths=length or LENGTHS,
        repeats=repeats,
        seed=seed,
    )
    paths = write(result, out)
    typer.echo(table(result))
    typer.echo(f"written: {', '.join(str(path) for path in paths)}")
