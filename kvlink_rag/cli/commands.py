"""The commands ``kvlink ...``, put together."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from kvlink_rag.cli.ask import ask
from kvlink_rag.cli.bench import bench
from kvlink_rag.cli.demo import demo
from kvlink_rag.cli.evaluate import evaluate
from kvlink_rag.cli.index import index
from kvlink_rag.cli.shared import Commands
from kvlink_rag.cli.store import store_app
from kvlink_rag.cli.train import train
from kvlink_rag.cli.tune import tune

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answers from documents whose KV caches are computed once, at indexing time.",
)
app.command()(demo)
app.command()(index)
app.command()(ask)
app.command()(tune)
app.command()(bench)
app.command()(train)
app.command("eval")(evaluate)
app.add_typer(store_app, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            version = metadata.version("kvlink-rag")
        except metadata.PackageNotFoundError:  # run from its sources
            version = "unknown: not installed"
        typer.echo(f"kvlink {version}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Entry point of ``kvlink``."""
    app()
