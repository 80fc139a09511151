"""The command ``kvlink ask``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from kvlink_rag.cli.options import Dtype, RemoteURL
from kvlink_rag.cli.shared import open_index, prepare, size_text
from kvlink_rag.errors import InputError

if TYPE_CHECKING:
    from kvlink_rag.chunk import ScoredChunk
    from kvlink_rag.engine.report import Report

Strategy = Literal["auto", "reuse", "recompute", "full", "link"]
RecomputeBy = Literal["first", "question"]


def ask(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An index.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    k: Annotated[int, typer.Option("-k", help="How many chunks to answer from.")] = 4,
    strategy: Annotated[
        Strategy | None,
        typer.Option(help="How the chunks get into the model. Default: auto."),
    ] = None,
    recompute_by: Annotated[
        RecomputeBy | None,
        typer.Option(help="Which tokens are computed anew (recompute). Default: question."),
    ] = None,
    recompute: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Such a share of the chunks' tokens. Default: 0.15."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or name of an adapter. Default: the index' own, or none."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the model and its caches. Default: the index' own; others miss."),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the answer while it is being made.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    system: Annotated[str | None, typer.Option(help="Another system prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    remote: RemoteURL = None,
) -> None:
    """Answer a question from an index, and list the sources."""
    prepare()
    if recompute_by is not None or recompute is not None:
        strategy = strategy or "recompute"
        if strategy not in ("auto", "recompute"):
            raise InputError(
                f"--strategy {strategy} computes no tokens of chunks anew: leave out "
                "--recompute-by and --recompute"
            )
    with open_index(folder, adapter, dtype, remote) as opened:
        chunks = opened.search(question, k)
        answer = opened.engine.stream(
            question,
            chunks,
            strategy=strategy,
            system=system,
            recompute_by=recompute_by,
            recompute=recompute,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        for piece in answer:
            if stream:
                typer.echo(piece, nl=False)
        typer.echo("" if stream else answer.text)
    _list_sources(chunks, answer.report)


def _list_sources(chunks: list[ScoredChunk], report: Report) -> None:
    console = Console(highlight=False)
    console.print()
    for rank, chunk in enumerate(chunks, 1):
        source = chunk.metadata.get("source", chunk.document_id)
        part = f" part {chunk.metadata['part']}" if "part" in chunk.metadata else ""
        line = f"[{rank}] {chunk.title or ''}  {source}{part}  ({chunk.score:.2f})"
        console.print(line, markup=False, soft_wrap=True)
    rate = f" at {1 / report.decode_s_per_token:.1f} tokens/s" if report.new_tokens > 1 else ""
    s = "" if report.new_tokens == 1 else "s"
    console.print(
        f"{report.way}: TTFT {report.ttft_s * 1000:.0f} ms, "
        f"total {report.total_s:.2f} s, {report.new_tokens} token{s}{rate}, "
        f"{report.hits} hits, {report.misses} misses, "
        f"{report.reused_tokens} tokens reused, {report.computed_tokens} computed, "
        f"{size_text(report.bytes_read)} read",
        style="dim",
        soft_wrap=True,
    )
    if report.why:
        console.print(f"auto: {report.why}", style="dim", markup=False, soft_wrap=True)
