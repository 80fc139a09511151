"""What a trial has measured, as a picture."""

from __future__ import annotations

from pathlib import Path

from kvlink_rag.engine.tune import MOST_NATS, Tuning


def plot_tuning(tuning: Tuning, path: Path, name: str) -> bool:
    """Draw how far from full prefill each way is, over its time to the first token.

    Args:
        path: of the PNG.
        name: of the model.

    Returns:
        False where matplotlib (extra ``bench``) is not installed and nothing is drawn.

    Raises:
        OSError: it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(MOST_NATS, color="0.7", linestyle="--", linewidth=1)
    for each in tuning.measured:
        chosen = each.way == tuning.choice.way
        color = "C2" if chosen else "C0" if each.is_good else "C3"
        place = (each.ttft_s, each.kl_nats)
        axes.plot(*place, "o", color=color, markersize=9 if chosen else 6)
        words = f"{each.way}{' (chosen)' if chosen else ''}"
        axes.annotate(words, place, (7, 5), textcoords="offset points", fontsize="small")
    axes.set(
        xlabel="time to first token, s (median)",
        ylabel="distance from full prefill, nats a token",
        title=f"{name}: {tuning.questions} questions, some {tuning.context_tokens} tokens each",
    )
    axes.margins(x=0.15, y=0.12)
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
