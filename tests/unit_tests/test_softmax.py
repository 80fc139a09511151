"""The compiled softmax of scores that are seen in part, against torch's in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvlink_rag.runners.transformers import positions, softmax
from kvlink_rag.runners.transformers.positions import attend_at
from kvlink_rag.runners.transformers.scratch import Scratch

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of a weight, half of bfloat16's last place: those near 1 have one of 1 / 128."""


def expected(scores: torch.Tensor, first: np.ndarray, stop: np.ndarray) -> torch.Tensor:
    columns = torch.arange(scores.shape[1])
    hidden = (columns < torch.tensor(first)[:, None]) | (columns >= torch.tensor(stop)[:, None])
    return scores.double().masked_fill(hidden, float("-inf")).softmax(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (50, 128), (7, 5000)])
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0, 1e30])
def test_weights_are_those_of_torch(dtype, rows, columns, size):
    torch.manual_seed(rows)
    rng = np.random.default_rng(columns)
    scores = (size * torch.randn(rows, columns)).to(dtype)
    stop = rng.integers(1, columns + 1, rows)
    first = rng.integers(0, stop)
    stop[-1], first[-1] = columns, 0
    weights = scores.clone()
    softmax.softmax_seen(weights, first, stop, Scratch())
    wanted = expected(scores, first, stop)
    torch.testing.assert_close(weights.double(), wanted, atol=TOLERANCE[dtype], rtol=5e-6)
    for row in range(rows):
        assert not weights[row, : first[row]].any()
        assert not weights[row, stop[row] :].any()
    assert weights.isfinite().all()


def test_a_weight_of_one_alone_is_one():
    scores = torch.full((4, 9), -1e4)
    at = np.arange(4)
    softmax.softmax_seen(scores, at, at + 1, Scratch())
    assert torch.equal(scores, torch.eye(4, 9))


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("asked", [False, True])
def test_attention_is_that_without_the_kernel(window, asked, monkeypatch):
    """Also what it tells of the attention that was paid."""
    torch.manual_seed(0)
    assert softmax.available(torch.float32)
    at = [*range(5, 200, 3), *range(200, 210)]
    query, keys = torch.randn(6, len(at), 16), torch.randn(2, 210, 16)
    values = torch.randn(2, 210, 8)
    found = []
    for available in (True, False):
        monkeypatch.setattr(softmax, "available", lambda dtype, it=available: it)
        monkeypatch.setattr(positions, "BLOCK_QUERIES", 32)
        paid = torch.zeros(200) if asked else None
        mixed = attend_at(query, keys, values, at, window, Scratch(), paid)
        found.append((mixed, paid))
    (mixed, paid), (otherwise, otherwise_paid) = found
    torch.testing.assert_close(mixed, otherwise, atol=1e-5, rtol=1e-5)
    if asked:
        torch.testing.assert_close(paid, otherwise_paid, atol=1e-4, rtol=1e-5)
        assert paid.sum() > 0
