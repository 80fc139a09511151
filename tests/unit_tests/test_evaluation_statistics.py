"""Intervals that cover, differences that are found, and one that is not."""

from __future__ import annotations

import math
import random

import pytest

from kvlink_rag.evaluation.statistics import difference, interval, perplexity_ratio


def coin(rng, share, count):
    return [float(rng.random() < share) for _ in range(count)]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = random.Random(0)
    found = [interval([coin(rng, 0.3, 200)]) for _ in range(100)]
    covered = sum(each.low <= 0.3 <= each.high for each in found)
    assert 88 <= covered <= 100
    # the normal approximation: 1.96 * sqrt(p (1 - p) / n)
    assert found[0].half == pytest.approx(1.96 * math.sqrt(0.3 * 0.7 / 200), rel=0.2)


def test_an_average_over_sets_counts_sets_not_questions():
    small, large = [1.0, 1.0, 0.0, 1.0], [0.0] * 400
    assert interval([small, large]).mean == pytest.approx((0.75 + 0) / 2)
    # all of the doubt is the small set's
    assert interval([small, large]).half == pytest.approx(interval([small]).half / 2, abs=0.01)


def test_the_same_numbers_give_the_same_interval():
    values = coin(random.Random(1), 0.5, 50)
    assert interval([values]) == interval([values])


def test_one_question_has_no_interval():
    found = interval([[1.0]])
    assert (found.mean, found.low, found.high, found.half) == (1.0, None, None, None)
    assert difference([[1.0]], [[0.0]]).p is None


def test_a_difference_is_found():
    rng = random.Random(2)
    before = coin(rng, 0.3, 300)
    after = [
        1.0 if rng.random() < 0.1 else value for value in before
    ]  # some got better, none worse
    found = difference([after], [before])
    assert found.mean == pytest.approx(sum(after) / 300 - sum(before) / 300)
    assert found.low > 0
    assert found.p < 0.01
    # unpaired, that is within the doubt
    assert interval([after]).low < interval([before]).high


def test_no_difference_is_not_found():
    rng = random.Random(3)
    found = difference([coin(rng, 0.3, 300)], [coin(rng, 0.3, 300)])
    assert found.low < 0 < found.high
    assert found.p > 0.05
    same = coin(rng, 0.5, 20)
    assert difference([same], [same]).p == 1.0


def test_a_small_p_is_exact():
    """Six of six better: of 2^6 ways to swap, 2 are as extreme."""
    assert difference([[1.0] * 6], [[0.0] * 6]).p == pytest.approx(2 / 2**6)


def test_a_difference_over_sets():
    rng = random.Random(4)
    before = [coin(rng, 0.2, count) for count in (40, 400)]
    after = [[1 - value for value in before[0]], before[1]]
    found = difference(after, before)
    first = sum(after[0]) / 40 - sum(before[0]) / 40
    assert found.mean == pytest.approx(first / 2)
    assert found.p < 0.01


def test_a_ratio_of_perplexities():
    off = [10.0, 300.0, 20.0]
    tokens = [10, 100, 10]
    on = [loss + 0.01 * count for loss, count in zip(off, tokens, strict=True)]
    found = perplexity_ratio(on, off, tokens)
    assert found.mean == pytest.approx(math.exp(0.01))
    assert found.low == pytest.approx(math.exp(0.01))  # every text has the same
    uneven = perplexity_ratio([10.0, 310.0, 20.0], off, tokens)
    assert uneven.mean == pytest.approx(math.exp(10 / 120))
    assert uneven.low < uneven.mean < uneven.high
