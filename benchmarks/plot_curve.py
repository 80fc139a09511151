"""What a share computed anew costs and gives: points of exact match against the first token's time.

    python benchmarks/plot_curve.py

Answers are those that `kvlink eval` wrote to `benchmarks/results/eval_auto` and, of `reuse` and
full prefill, to `benchmarks/results/eval_link5`, for the questions that all of them have answered;
times those of `benchmarks/results/shares.json`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from kvlink_rag.evaluation.statistics import Difference, difference

ROOT = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "curve.png"
ROWS = {
    "reuse, untuned": "reuse",
    "recompute 8 %, untuned": "8 %",
    "recompute 15 %, untuned": "15 %",
    "full, untuned": "full",
}
"""Rows of answers, and what their way is called among the times."""
ADAPTER = "smollm2-135m-link5"

Key = tuple[str, str]
Answers = dict[str, dict[Key, float]]


def answers() -> Answers:
    """Exact match, 0 or 1, by row, set and question."""
    found: Answers = defaultdict(dict)
    for folder in ("eval_auto", "eval_link5"):  # of `full`, which both have, the one that is whole
        for line in (ROOT / folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["row"]][row["set"], row["id"]] = row["scores"]["em"]
    return found


def shared(found: Answers, rows: list[str]) -> dict[str, list[Key]]:
    """The questions that all of these rows have answered, by set."""
    keys = set.intersection(*(set(found[row]) for row in rows))
    return {name: sorted(key for key in keys if key[0] == name) for name in {k[0] for k in keys}}


def from_full(found: Answers, row: str, full: str, keys: dict[str, list[Key]]) -> Difference:
    """Points of exact match from full prefill, the mean of the sets, with its interval."""
    scores, reference = (
        [[100 * found[which][key] for key in its] for its in keys.values()] for which in (row, full)
    )
    return difference(scores, reference)


def mean(found: Answers, row: str, keys: dict[str, list[Key]]) -> float:
    """Percent of exact match, the mean of the sets."""
    each = [sum(found[row][key] for key in its) / len(its) for its in keys.values()]
    return 100 * sum(each) / len(each)


def draw(points: dict[str, float]) -> Figure:
    """A line for each length of the chunks; full prefill by the same attention as the others."""
    times = json.loads((ROOT / "shares.json").read_text(encoding="utf-8"))["seconds"]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    for axes, (tokens, series) in zip(
        figure.subplots(1, 2, sharey=True), times.items(), strict=True
    ):
        medians = {way: series["full, same attention" if way == "full" else way] for way in points}
        x = [medians[way]["median"] for way in points]
        axes.plot(x, list(points.values()), "-o", color="tab:purple")
        for way, seconds in zip(points, x, strict=True):
            name = f"{way} (auto)" if way == "15 %" else way
            axes.annotate(name, (seconds, points[way]), (5, -13), textcoords="offset points")
        axes.set(xlabel="time to first token, s", title=f"10 chunks of {tokens} tokens")
        axes.margins(x=0.15, y=0.15)
        axes.set_xlim(left=0)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("exact match, %, mean of five sets")
    return figure


def _said(found: Answers, row: str, full: str, keys: dict[str, list[Key]]) -> str:
    away, count = from_full(found, row, full, keys), sum(map(len, keys.values()))
    interval = "" if away.low is None else f" ({away.low:+.1f} to {away.high:+.1f})"
    return f"{row}, {count} questions: {mean(found, row, keys):.1f}, {away.mean:+.1f}{interval}"


def main() -> None:
    found = answers()
    keys = shared(found, list(ROWS))
    print({name: len(its) for name, its in sorted(keys.items())}, sum(map(len, keys.values())))
    for row in ROWS:
        print(_said(found, row, "full, untuned", keys))
    tuned, full = f"recompute 15 %, {ADAPTER}", f"full, {ADAPTER}"
    its = shared(found, [tuned, full])
    print(_said(found, tuned, full, its))
    draw({ROWS[row]: mean(found, row, keys) for row in ROWS}).savefig(PICTURE, dpi=130)
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
