"""The command ``kvlink tune``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from kvlink_rag.cli.options import Dtype, RemoteURL
from kvlink_rag.cli.shared import load_engine, open_index, prepare
from kvlink_rag.errors import InputError

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.engine.questions import Case
    from kvlink_rag.engine.tune import TuneSettings, Tuning

PLOT = "tune.png"


def tune(
    target: Annotated[
        str,
        typer.Argument(metavar="INDEX|MODEL", help="An index; or a hub id, folder or GGUF file."),
    ],
    questions: Annotated[
        Path | None,
        typer.Option(help="Your own, one a line. Default: the model writes them."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many it writes.")] = 12,
    k: Annotated[int, typer.Option("-k", min=1, help="Chunks to answer each from.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer, to compare.")] = 16,
    codecs: Annotated[bool, typer.Option("--codecs", help="Compare codecs, too.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help=f"The picture. Default: {PLOT}, in the index.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Of a MODEL: the store beside which the choice is written."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or name. Default: the index' own, or none.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of model and caches. Default: the index' own.")
    ] = None,
    remote: RemoteURL = None,
) -> None:
    """Which way answers as full prefill does, and soonest: measured, and kept for `auto`."""
    prepare()
    from kvlink_rag.engine.tune import TuneSettings
    from kvlink_rag.index.check import is_index

    asked, settings = _read(questions), TuneSettings(count, k, tokens)
    if is_index(Path(target)):
        if store is not None:
            raise InputError(f"{target} is an index and has its own store: leave --store out")
        trial = _in_index(Path(target), adapter, dtype, remote, asked, settings)
        plot = plot or Path(target) / PLOT
    elif asked:
        raise InputError("--questions are asked about documents: name an index that holds them")
    else:
        trial = _on_articles(target, adapter, dtype, store, settings)
    with trial as (engine, cases):
        tuning = engine.tune(asked=cases, settings=settings)
        _show(tuning, engine)
        written = engine.choices.path
        typer.echo(
            f"written: {written}, where auto finds it"
            if written and (store is not None or is_index(Path(target)))
            else "not written: name the store that it is for (--store), or an index"
        )
        _draw(tuning, plot or Path(PLOT), engine.name)
        if codecs:
            from kvlink_rag.tuning.codec import choose_codec

            _print_rows(choose_codec(engine, cases).rows())


def _read(questions: Path | None) -> list[str]:
    if questions is None:
        return []
    lines = questions.read_text(encoding="utf-8", errors="replace").splitlines()
    asked = [line.strip() for line in lines if line.strip()]
    if not asked:
        raise InputError(f"{questions} holds no questions: write one a line")
    return asked


Ready = tuple["KVLinkEngine", "list[Case]"]


@contextmanager
def _in_index(
    folder: Path,
    adapter: str | None,
    dtype: Dtype | None,
    remote: str | None,
    asked: list[str],
    settings: TuneSettings,
) -> Iterator[Ready]:
    with open_index(folder, adapter, dtype, remote) as opened:
        yield opened.engine, opened.cases(asked, settings)


@contextmanager
def _on_articles(
    model: str,
    adapter: str | None,
    dtype: Dtype | None,
    store: Path | None,
    settings: TuneSettings,
) -> Iterator[Ready]:
    """A model that has no documents yet reads the articles of the package."""
    from kvlink_rag.chunk import Chunk
    from kvlink_rag.common.corpus import corpus_files, paragraphs
    from kvlink_rag.engine.questions import write_cases
    from kvlink_rag.store import open_store

    chunks = [
        Chunk(text, title=file.stem.replace("_", " "))
        for file in corpus_files()
        for text in paragraphs(file)
    ]
    with tempfile.TemporaryDirectory(prefix="kvlink-tune-") as scratch:
        opened = open_store(store or scratch)
        with closing(opened):
            engine = load_engine(model, adapter or "", dtype or "auto").with_store(opened)
            pipeline = engine.pipeline.unwatched
            yield engine, write_cases(pipeline, chunks, settings.questions, settings.k)


def _show(tuning: Tuning, engine: KVLinkEngine) -> None:
    typer.echo(
        f"{engine.name}: {tuning.questions} questions, prompts of some {tuning.context_tokens} "
        f"tokens, {tuning.tokens} tokens of full prefill's answers compared"
    )
    _print_rows(tuning.rows())
    typer.echo(f"auto: {tuning.choice.way}: {tuning.choice.why}")


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for rank, name in enumerate(rows[0]):
        side: Literal["left", "right"] = "left" if rank in (0, len(rows[0]) - 1) else "right"
        table.add_column(name, justify=side, no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    Console(highlight=False, width=100).print(table)


def _draw(tuning: Tuning, path: Path, name: str) -> None:
    from kvlink_rag.tuning.plot import plot_tuning

    if plot_tuning(tuning, path, name):
        typer.echo(f"plot: {path}")
    else:
        typer.echo("no plot without matplotlib: pip install 'kvlink-rag[bench]'")
