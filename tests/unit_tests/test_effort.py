"""What `make test` takes of a matrix shows everything that the whole matrix shows, in pairs."""

from __future__ import annotations

import itertools

import pytest
from effort import covering

NAMES, STRATEGIES, SETTINGS = range(16), range(4), range(5)
WHOLE = [
    {"name": name, "strategy": strategy, "setting": setting}
    for name, strategy, setting in itertools.product(NAMES, STRATEGIES, SETTINGS)
]


def pairs(rows: list[dict[str, int]]) -> set[tuple[tuple[str, int], ...]]:
    return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}


def test_every_pair_is_chosen_in_few_rows() -> None:
    chosen = [WHOLE[index] for index in covering(WHOLE)]
    assert pairs(chosen) == pairs(WHOLE)
    assert len(NAMES) * len(SETTINGS) <= len(chosen) < 1.3 * len(NAMES) * len(SETTINGS)


def test_every_value_is_chosen() -> None:
    chosen = [WHOLE[index] for index in covering(WHOLE, together=1)]
    assert len(chosen) == len(NAMES)
    for key, values in {"strategy": STRATEGIES, "setting": SETTINGS}.items():
        assert {row[key] for row in chosen} == set(values)


def test_what_never_occurs_together_is_not_missed() -> None:
    rows = [{"name": 0, "setting": 0}, {"name": 1, "setting": 1}, {"name": 1, "setting": 0}]
    assert covering(rows) == [0, 1, 2]
    assert covering(rows, together=1) == [0, 1]


@pytest.mark.parametrize("together", [1, 2])
def test_of_one_argument_every_value_is_chosen(together: int) -> None:
    assert covering([{"name": name} for name in NAMES], together) == list(NAMES)
    assert covering([], together) == []
