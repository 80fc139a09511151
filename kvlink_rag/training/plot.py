"""The loss of a training run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_losses(
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    path: Path,
) -> bool:
    """Draw the training loss over steps, and held-out losses before and after.

    Args:
        history: entries with ``step`` and ``loss``.
        before, after: held-out losses by view; may be empty.
        path: of the PNG.

    Returns:
        False where matplotlib (extra ``train``) is not installed and nothing is drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = [entry["step"] for entry in history]
    losses = [entry["loss"] for entry in history]
    curve.plot(steps, losses, color="0.75", linewidth=1, label="loss")
    curve.plot(steps, _smooth(losses), color="C0", label="smoothed")
    curve.set(xlabel="step", ylabel="loss (nats per label)", title="Training")
    curve.legend()
    names = sorted(after)
    for offset, (label, values) in enumerate({"before": before, "after": after}.items()):
        places = [place + 0.4 * offset for place in range(len(names))]
        bars.bar(places, [values.get(name, 0.0) for name in names], 0.38, label=label)
    bars.set_xticks([place + 0.2 for place in range(len(names))], names)
    bars.set(title="Held-out lessons", ylabel="loss (nats per label)")
    bars.legend()
    figure.savefig(path, dpi=120)
    return True


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smooth, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smooth.append(total / norm)
    return smooth
