"""What a share computed anew costs and gives: points of exact match against the first token's time.

    python benchmarks/plot_curve.py

Answers are those that `kvlink eval` wrote to `benchmarks/results/eval_auto` and, of `reuse` behind
the prefix, to `benchmarks/results/eval_link5`; each row is compared with full prefill's answers of
its own folder to the same questions. Times are those of `benchmarks/results/shares.json`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from kvlink_rag.evaluation.statistics import Difference, difference

ROOT = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "curve.png"
FULL = "full, untuned"
DOCUMENTS, PREFIX = "behind documents", "behind the prefix"
IN_INT8 = f"{DOCUMENTS}, in int8 (the default)"

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Where the picture has ticks."""

Key = tuple[str, str]
Answers = dict[str, dict[Key, float]]


@dataclass(frozen=True)
class Row:
    """A row of answers.

    Attributes:
        behind: what chunks were encoded behind.
        way: what it is called among the times.
    """

    folder: str
    name: str
    behind: str
    way: str


ROWS = (
    Row("eval_auto", "reuse behind documents, untuned", DOCUMENTS, "reuse"),
    Row("eval_auto", "recompute 2 % behind documents, untuned", DOCUMENTS, "2 %"),
    Row("eval_auto", "recompute 4 % behind documents, untuned", DOCUMENTS, "4 %"),
    Row("eval_auto", "recompute 4 % behind documents in int8, untuned", IN_INT8, "4 %"),
    Row("eval_auto", "recompute 8 % behind documents, untuned", DOCUMENTS, "8 %"),
    Row("eval_link5", "reuse, untuned", PREFIX, "reuse"),
    Row("eval_auto", "recompute 8 %, untuned", PREFIX, "8 %"),
    Row("eval_auto", "recompute 15 %, untuned", PREFIX, "15 %"),
)


@dataclass(frozen=True)
class Point:
    """A row beside full prefill, on the questions that both have answered.

    Attributes:
        match: percent of exact match, the mean of the sets; ``full`` likewise.
    """

    row: Row
    questions: int
    match: float
    full: float
    away: Difference


def answers(folder: str) -> Answers:
    """Exact match, 0 or 100, by row, set and question."""
    found: Answers = defaultdict(dict)
    for line in (ROOT / folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["row"]][row["set"], row["id"]] = 100 * row["scores"]["em"]
    return found


def point(row: Row, found: Answers) -> Point:
    """A row's place in the table."""
    keys = sorted(found[row.name].keys() & found[FULL].keys())
    sets = sorted({name for name, _ in keys})
    its, full = (
        [[found[which][key] for key in keys if key[0] == name] for name in sets]
        for which in (row.name, FULL)
    )
    match, reference = (sum(sum(s) / len(s) for s in each) / len(sets) for each in (its, full))
    return Point(row, len(keys), match, reference, difference(its, full))


def draw(points: list[Point]) -> Figure:
    """A line for what chunks were encoded behind; a picture for each length of them."""
    times = json.loads((ROOT / "shares.json").read_text(encoding="utf-8"))["seconds"]
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (tokens, series) in zip(
        figure.subplots(1, 2, sharey=True), times.items(), strict=True
    ):
        whole = series["full, same attention"]["median"]
        colours = {DOCUMENTS: "tab:purple", IN_INT8: "black", PREFIX: "tab:orange"}
        for behind, colour in colours.items():
            its = [each for each in points if each.row.behind == behind]
            x = [series[each.row.way]["median"] for each in its]
            y = [each.away.mean for each in its]
            # beside the point, where the other lines are not
            aside = (-4, 4) if behind == DOCUMENTS else (6, 4) if behind == IN_INT8 else (6, -12)
            place: Any = {"xytext": aside, "textcoords": "offset points"}
            place["ha"] = "right" if behind == DOCUMENTS else "left"
            if behind != IN_INT8:  # a way to full prefill, not one point
                x, y = [*x, whole], [*y, 0]
            axes.plot(x, y, "-o", color=colour, label=behind)
            for each, seconds in zip(its, x, strict=False):
                if each.away.low is not None and each.away.high is not None:
                    axes.plot([seconds] * 2, [each.away.low, each.away.high], color=colour, lw=0.8)
                axes.annotate(each.row.way, (seconds, each.away.mean), **place)
        axes.annotate("full", (whole, 0), (-8, 7), textcoords="offset points")
        axes.set(
            xlabel="time to first token, s", xscale="log", title=f"10 chunks of {tokens} tokens"
        )
        axes.set_xticks([s for s in SECONDS if min(x) / 2 < s < 2 * whole], minor=False)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.1)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("exact match, points from full prefill")
    figure.axes[1].legend(loc="lower right")
    return figure


def main() -> None:
    found = {folder: answers(folder) for folder in {row.folder for row in ROWS}}
    points = [point(row, found[row.folder]) for row in ROWS]
    print("| | questions | exact match | full prefill | from full prefill |")
    print("|---|---|---|---|---|")
    for each in points:
        low, high = each.away.low, each.away.high
        interval = "" if low is None else f" ({low:+.1f} to {high:+.1f})"
        way = each.row.way if each.row.way == "reuse" else f"{each.row.way} anew"
        print(
            f"| {way} {each.row.behind} | {each.questions:,} | {each.match:.1f} | "
            f"{each.full:.1f} | {each.away.mean:+.1f}{interval} |"
        )
    draw(points).savefig(PICTURE, dpi=130)
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
