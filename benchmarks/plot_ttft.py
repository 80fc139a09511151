"""The README's picture: time to the first token against prompt length, full prefill and reuse.

python benchmarks/plot_ttft.py

It draws what `kvlink bench` wrote to `benchmarks/results/bench.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "bench.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "ttft.png"

WAYS = {
    "full": ("full prefill", "tab:red", "-", 0),
    "full, fast attention": ("full prefill, faster attention", "tab:red", "--", 0),
    "recompute by question": ("recompute by question", "tab:purple", "-", 0.7),
    "reuse": ("reuse", "tab:blue", "-", 0.25),
}
"""Of the measured ways: what they are called here, colour, line, and how far up the name stands."""


def main() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(result).savefig(PICTURE, dpi=130)
    print(f"written: {PICTURE}")


def draw(result: dict[str, Any]) -> Figure:
    """A line a way: medians, with the range of the runs around them."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    tokens = [each["tokens"] for each in result["ttft"]]
    for way, (name, colour, line, up) in WAYS.items():
        series = [each["series_s"][way] for each in result["ttft"]]
        medians = [s["median"] for s in series]
        axes.plot(tokens, medians, line, color=colour, marker="o", markersize=4)
        axes.fill_between(
            tokens,
            [s["min"] for s in series],
            [s["max"] for s in series],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        axes.text(
            tokens[-1] + 120,
            medians[-1] + up,
            f"{name}: {medians[-1]:.1f} s",
            color=colour,
            verticalalignment="center",
        )
    axes.set_xlim(0, tokens[-1] * 1.47)
    axes.set_xticks([0, *(round(each, -3) for each in tokens)])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, None)
    axes.set_xlabel("prompt, tokens (ten retrieved chunks in random order, and a question)")
    axes.set_ylabel("time to the first token, seconds")
    machine = result["machine"]
    axes.set_title(
        f"{machine['model'].rpartition('/')[2]}, {machine['dtype']}, "
        f"{machine['threads']} threads of an {machine['cpu']} (one core); "
        "medians and ranges of 10 runs",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
