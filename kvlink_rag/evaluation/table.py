"""From the lines of a folder to the table: scores with intervals, differences, perplexities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvlink_rag.errors import InputError
from kvlink_rag.evaluation.ability import OFF
from kvlink_rag.evaluation.data import SetKind
from kvlink_rag.evaluation.items import digest_of
from kvlink_rag.evaluation.journal import Journal, Line
from kvlink_rag.evaluation.plan import plan_of
from kvlink_rag.evaluation.run import RUN
from kvlink_rag.evaluation.statistics import difference, interval, perplexity_ratio

METRICS: dict[SetKind, dict[str, str]] = {
    "qa": {"em": "EM", "f1": "F1"},
    "summary": {"rouge_l": "ROUGE-L"},
}
AVERAGE = "average of QA sets"

Scores = dict[str, dict[str, dict[str, float]]]
"""Of one row: by set and question the score of each metric."""

Columns = dict[str, tuple[SetKind, list[str]]]
"""Of each column of the table the sets that are averaged."""


def write(out: Path) -> str:
    """Write ``results.json`` and ``results.md`` from a folder's lines; returns the latter.

    Raises:
        InputError: nothing was evaluated into this folder.
    """
    found = results(out)
    text = markdown(found)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def results(out: Path) -> dict[str, Any]:
    """What a folder's lines say about what its ``run.json`` wants, for JSON. Scores are 0 to 1.

    Raises:
        InputError: nothing was evaluated into this folder.
    """
    try:
        run = json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out} holds no evaluation ({RUN}: {error}): run kvlink eval") from error
    lines = Journal(out, "answers").read()
    scores = {name: _scores(run["sets"], digest, lines) for name, digest in run["rows"].items()}
    columns, reference = _columns(run["sets"]), plan_of(run["plan"]).reference_row
    base = scores.get(reference or "")
    return {
        "plan": run["plan"],
        "machine": run["machine"],
        "sets": {name: _about(each) for name, each in run["sets"].items()},
        "rows": {name: _row(columns, [row], interval) for name, row in scores.items()},
        "reference": reference,
        "differences": {
            name: _row(columns, [row, base], difference)
            for name, row in scores.items()
            if base is not None and name != reference
        },
        "ability": _ability(run["ability"], Journal(out, "ability").read()),
    }


def _columns(sets: dict[str, Any]) -> Columns:
    columns: Columns = {name: (each["kind"], [name]) for name, each in sets.items()}
    qa = [name for name, (kind, _) in columns.items() if kind == "qa"]
    return columns | ({AVERAGE: ("qa", qa)} if len(qa) > 1 else {})


def _about(each: dict[str, Any]) -> dict[str, Any]:
    dropped = each["dropped"].values()
    return {
        "kind": each["kind"],
        "questions": len(each["items"]),
        "cut_prompts": len(dropped),
        "dropped_chunks": sum(dropped),
    }


def _scores(sets: dict[str, Any], row: str, lines: dict[str, Line]) -> Scores:
    """The scores of a row, by its digest, as far as they are there."""
    return {
        name: {
            id: lines[digest]["scores"]
            for id, item in each["items"].items()
            if (digest := digest_of([row, item])) in lines
        }
        for name, each in sets.items()
    }


def _row(
    columns: Columns, rows: Sequence[Scores], figure: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """Of each column the number of questions that all ``rows`` have, and a figure a metric."""
    made: dict[str, dict[str, Any]] = {}
    for column, (kind, sets) in columns.items():
        ids = {s: [id for id in rows[0][s] if all(id in row[s] for row in rows)] for s in sets}
        if not all(ids.values()):
            continue
        made[column] = {"questions": sum(map(len, ids.values()))}
        for metric in METRICS[kind]:
            values = [[[row[s][id][metric] for id in ids[s]] for s in sets] for row in rows]
            made[column][metric] = asdict(figure(*values))
    return made


def _ability(files: Sequence[dict[str, Any]], lines: dict[str, Line]) -> list[dict[str, Any]]:
    """Of each file and adapter the perplexities over the texts that both on and off have read."""
    found = []
    for file in files:
        losses = {
            adapter: {place: lines[digest] for place, digest in items.items() if digest in lines}
            for adapter, items in file["items"].items()
        }
        off = losses.pop(OFF)
        for adapter, on in losses.items():
            places = [place for place in on if place in off and on[place]["tokens"]]
            if not places:
                continue
            tokens = [on[place]["tokens"] for place in places]
            pairs = [[each[place]["loss"] for place in places] for each in (on, off)]
            found.append(
                {
                    "file": file["name"],
                    "kind": file["kind"],
                    "adapter": adapter,
                    "texts": len(places),
                    "tokens": sum(tokens),
                    "on": math.exp(sum(pairs[0]) / sum(tokens)),
                    "off": math.exp(sum(pairs[1]) / sum(tokens)),
                    "ratio": asdict(perplexity_ratio(pairs[0], pairs[1], tokens)),
                }
            )
    return found


def markdown(found: dict[str, Any]) -> str:
    """Tables for people; scores in percent."""
    kinds = {each["kind"] for each in found["sets"].values()}
    parts = [_score_table(found)] if kinds else []
    for kind, metrics in METRICS.items():
        if kind in kinds and found["differences"]:
            parts += [_difference_table(found, kind, metric) for metric in metrics]
    if found["ability"]:
        parts.append(_ability_table(found["ability"]))
    parts += [
        f"{name}: {each['cut_prompts']} prompts were cut to the model's context "
        f"({each['dropped_chunks']} chunks left out)."
        for name, each in found["sets"].items()
        if each["cut_prompts"]
    ]
    return "\n\n".join([*parts, _settings(found)])


def _columns_of(found: dict[str, Any]) -> dict[str, tuple[SetKind, int]]:
    """Of each column the kind and the number of questions."""
    sets = found["sets"]
    columns = {name: (each["kind"], each["questions"]) for name, each in sets.items()}
    qa = [count for kind, count in columns.values() if kind == "qa"]
    return columns | ({AVERAGE: ("qa", sum(qa))} if len(qa) > 1 else {})


def _score_table(found: dict[str, Any]) -> str:
    columns = _columns_of(found)
    rows = [
        [name, *(_score_cell(row.get(column), *columns[column]) for column in columns)]
        for name, row in found["rows"].items()
    ]
    heads = [f"{column} ({count})" for column, (_, count) in columns.items()]
    kinds = {kind for kind, _ in columns.values()}
    scores = " or ".join(" / ".join(METRICS[kind].values()) for kind in METRICS if kind in kinds)
    return (
        f"{scores} in percent, ± half of the 95 % bootstrap interval. In brackets the number of "
        f"questions.\n\n{_table(['row', *heads], rows)}"
    )


def _score_cell(score: dict[str, Any] | None, kind: SetKind, questions: int) -> str:
    if score is None:
        return "-"
    cell = " / ".join(_plus_minus(score[metric]) for metric in METRICS[kind])
    missing = score["questions"] < questions
    return f"{cell} (of {score['questions']})" if missing else cell


def _difference_table(found: dict[str, Any], kind: SetKind, metric: str) -> str:
    columns = [name for name, (its, _) in _columns_of(found).items() if its == kind]
    rows = [
        [name, *(_difference_cell(row[c][metric]) if c in row else "-" for c in columns)]
        for name, row in found["differences"].items()
    ]
    return (
        f"{METRICS[kind][metric]}: points above `{found['reference']}`, question by question, with "
        f"the 95 % interval and the p of a paired permutation test.\n\n"
        f"{_table(['row', *columns], rows)}"
    )


def _ability_table(ability: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"{each['file']} ({each['texts']} {each['kind']}, {each['tokens']} tokens)",
            each["adapter"],
            f"{each['off']:.3f}",
            f"{each['on']:.3f}",
            f"{each['ratio']['mean']:.4f}{_range(each['ratio'], '.4f', 1)}",
        ]
        for each in ability
    ]
    heads = ["held-out texts", "adapter", "perplexity off", "on", "on / off"]
    return f"Perplexity with the adapter on, against off.\n\n{_table(heads, rows)}"


def _settings(found: dict[str, Any]) -> str:
    plan = {k: v for k, v in found["plan"].items() if k not in ("rows", "sets", "model")}
    given = {**found["machine"], **{k: v for k, v in plan.items() if v not in (None, [])}}
    return ", ".join(f"{name} {value}" for name, value in given.items()) + "."


def _plus_minus(figure: dict[str, Any]) -> str:
    half = "?" if figure["low"] is None else f"{50 * (figure['high'] - figure['low']):.1f}"
    return f"{100 * figure['mean']:.1f} ± {half}"


def _difference_cell(figure: dict[str, Any]) -> str:
    cell = f"{100 * figure['mean']:+.1f}{_range(figure, '+.1f', 100)}"
    return cell if figure["p"] is None else f"{cell}, p {figure['p']:.3f}"


def _range(figure: dict[str, Any], form: str, scale: float) -> str:
    if figure["low"] is None:
        return ""
    return f" ({scale * figure['low']:{form}} to {scale * figure['high']:{form}})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in [heads, *rows]]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
