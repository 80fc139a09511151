"""How sure a figure is: bootstrap intervals, and paired tests between rows.

Each function takes the scores set by set. With several sets the figure is the mean of the sets'
means, and resampling stays within each set, so that a large set counts no more than a small one.
All draws have a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Scores = Sequence[Sequence[float]]
"""Scores of the questions of each set."""

RESAMPLES = 4999
SEED = 0
_BATCH = 500


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; one observation alone has none (``low`` is None)."""

    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference with its interval, and the p of no difference (two-sided)."""

    p: float | None


def interval(scores: Scores) -> Interval:
    """The mean with its percentile bootstrap interval, stratified by set (Efron, 1979)."""
    return _bootstrap([np.asarray(each, np.float64) for each in scores], _mean_of_means)


def difference(scores: Scores, reference: Scores) -> Difference:
    """Mean difference of two rows on the same questions: bootstrap interval and paired test.

    The test is a permutation test that swaps the two rows' scores of a question at random. It tests
    the very figure that is shown, and holds for scores of any distribution; of exact match, where
    most differences are 0 and the others 1 in size, Wilcoxon's signed ranks would drop the former
    and rank nothing but ties.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(scores, reference, strict=True)
    ]
    found = _bootstrap([a - b for a, b in pairs], _mean_of_means)
    if found.low is None:
        return Difference(found.mean, None, None, None)
    weights = np.concatenate([np.full(len(a), 1 / len(a) / len(pairs)) for a, _ in pairs])
    test = stats.permutation_test(
        [np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])],
        lambda a, b, axis: ((a - b) * weights).sum(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_BATCH,
        rng=SEED,
    )
    return Difference(found.mean, found.low, found.high, float(test.pvalue))


def perplexity_ratio(
    loss: Sequence[float], reference: Sequence[float], tokens: Sequence[int]
) -> Interval:
    """Perplexity over a reference's perplexity on the same texts; resampled by text.

    Args:
        loss, reference: of each text the sum over its tokens, in nats.
        tokens: of each text.
    """
    more = np.asarray(loss, np.float64) - np.asarray(reference, np.float64)

    def ratio(more: Floats, tokens: Floats, axis: int) -> Floats:
        return np.asarray(np.exp(more.sum(axis) / tokens.sum(axis)))

    return _bootstrap([more, np.asarray(tokens, np.float64)], ratio, paired=True)


def _mean_of_means(*sets: Floats, axis: int) -> Floats:
    means = [each.mean(axis) for each in sets]
    return np.asarray(sum(means) / len(means))


def _bootstrap(data: Sequence[Floats], statistic: Any, paired: bool = False) -> Interval:
    mean = float(statistic(*data, axis=-1))
    if min(map(len, data)) < 2:
        return Interval(mean, None, None)
    found = stats.bootstrap(
        data,
        statistic,
        paired=paired,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=_BATCH,
        rng=SEED,
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
