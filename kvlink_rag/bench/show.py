"""What was measured, for people: a table, a picture, files."""

from __future__ import annotations

import json
from pathlib import Path

from kvlink_rag.bench.run import BenchResult
from kvlink_rag.bench.series import Series
from kvlink_rag.bench.ttft import LengthResult
from kvlink_rag.errors import InputError

DASHED = ("cache in place", "one copy of the bytes")
"""What reuse is bounded by."""


def table(result: BenchResult) -> str:
    """Markdown tables: medians (lowest to highest), and shares."""
    names = list(result.lengths[0].series)
    lines = [
        f"| seconds to the first token, prompt of | "
        f"{' | '.join(f'{each.tokens} tokens' for each in result.lengths)} |",
        "|---|" + "---|" * len(result.lengths),
    ]
    for name in names:
        cells = [_cell(each.series[name]) for each in result.lengths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for text, one, other in (
        ("reuse / full", "reuse", "full"),
        ("reuse / full, fast attention", "reuse", "full, fast attention"),
        ("reuse / cache in place", "reuse", "cache in place"),
        ("link / reuse", "link", "reuse"),
        ("link, merged / reuse", "link, merged", "reuse"),
    ):
        if one in names and other in names:
            shares = [_share(each, one, other) for each in result.lengths]
            lines.append(f"| {text} | {' | '.join(shares)} |")
    lines += [
        "",
        "| tokens a chunk | indexing, tokens/s | plain batched forward pass, tokens/s | share |",
        "|---|---|---|---|",
    ]
    for row in result.indexing:
        cells = [_cell(series, 0) for series in (row.index, row.forward)]
        share = 100 * row.index.median / row.forward.median
        lines.append(f"| {row.chunk_tokens} | {' | '.join(cells)} | {share:.0f} % |")
    decode = ", ".join(f"{name} {1000 * s.median:.0f} ms" for name, s in result.decode_s.items())
    lines += [
        "",
        f"Decoding a token over about {result.decode_tokens} tokens: {decode}.",
        ", ".join(f"{name} {value}" for name, value in result.machine.items()) + ".",
    ]
    return "\n".join(lines)


def _share(each: LengthResult, one: str, other: str) -> str:
    share = each.series[one].median / each.series[other].median
    return f"{100 * share:.1f} %" if share < 0.5 else f"{share:.2f}"


def _cell(series: Series, digits: int = 3) -> str:
    values = (series.median, min(series.values), max(series.values))
    return "{} ({}-{})".format(*(f"{value:.{digits}f}" for value in values))


def plot(result: BenchResult, path: Path) -> None:
    """TTFT over prompt length, a line a way with its spread.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs matplotlib: pip install 'kvlink-rag[bench]'") from error
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["tab20"]
    axes.set_prop_cycle(color=[shades(n) for n in (*range(0, 20, 2), *range(1, 20, 2))])
    tokens = [each.tokens for each in result.lengths]
    for name in result.lengths[0].series:
        series = [each.series[name] for each in result.lengths]
        style = "--" if name in DASHED else "-"
        axes.plot(tokens, [s.median for s in series], style, marker="o", label=name)
        axes.fill_between(
            tokens, [min(s.values) for s in series], [max(s.values) for s in series], alpha=0.15
        )
    axes.set(
        xlabel="prompt tokens (10 chunks, random order)",
        ylabel="time to first token, s",
        yscale="log",
        title=f"{result.machine['model']}, {result.machine['dtype']}, "
        f"{result.machine['threads']} threads",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)


def write(result: BenchResult, folder: Path) -> list[Path]:
    """Write bench.json, bench.md and bench.png (when matplotlib is there) to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.json", folder / "bench.md"]
    paths[0].write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(table(result) + "\n", encoding="utf-8")
    try:
        plot(result, folder / "bench.png")
    except InputError:
        return paths
    return [*paths, folder / "bench.png"]
