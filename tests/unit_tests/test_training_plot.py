from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvlink_rag.training.plot import _smooth, plot_losses

HISTORY = [{"step": step, "loss": 5.0 / step, "epoch": step / 9} for step in range(1, 10)]


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize(
    ("history", "before", "after"),
    [
        (HISTORY, {"link": 3.0, "no chunks": 0.0}, {"link": 1.0, "no chunks": 0.1}),
        (HISTORY[:1], {}, {"link": 1.0}),
        ([], {}, {}),
    ],
    ids=["whole", "one step", "nothing"],
)
def test_a_picture_is_drawn(tmp_path, history, before, after):
    assert plot_losses(history, before, after, tmp_path / "loss.png")
    width, height = size(tmp_path / "loss.png")
    assert width > 2 * height > 400


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_losses(HISTORY, {}, {}, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_the_smoothed_curve_follows_without_a_lag_at_its_start():
    assert _smooth([4.0] * 5) == pytest.approx([4.0] * 5)
    falling = _smooth([4.0, 3.0, 2.0, 1.0])
    assert falling[0] == pytest.approx(4.0)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] > 1.0
