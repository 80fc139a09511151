"""The command ``kvlink train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvlink_rag.cli.options import Dtype
from kvlink_rag.cli.shared import prepare

LinkLayout = Literal["slot", "shared", "tail"]
AdapterKind = Literal["cache-preserving", "whole-model"]


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
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the model and its caches. Default: the checkpoint's.")
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
        "save_steps": save_steps, "seed": seed, "start": start, "dtype": dtype,
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
