"""The command ``kvlink eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink_rag.cli.options import Dtype, ModelDtype
from kvlink_rag.cli.shared import load_engine, prepare
from kvlink_rag.errors import InputError


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
    dtype: ModelDtype = "auto",
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
        _evaluate(out, given, strategies, adapter, config, shard, dtype)
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
    dtype: Dtype,
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

    evaluate(plan, load_engine(plan.model, dtype=dtype), out, shard=part)
