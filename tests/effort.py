"""How much the tests try: everything (`make test-all`), or what `make test` takes of it.

`pytest --quick` is what `make test` runs: tests marked `slow` are left out, of those marked
`matrix` a covering choice is kept, and loops that seek faults by trying often try less often.
Nothing is different otherwise: plain `pytest` runs all of it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Mapping, Sequence

ENVIRONMENT = "KVLINK_QUICK_TESTS"
"""Set by ``--quick``, and so in the processes that tests start, too."""


def times(full: int, quick: int) -> int:
    """How often to try something; to be called when a test's module is imported."""
    return quick if ENVIRONMENT in os.environ else full


def covering(rows: Sequence[Mapping[str, Hashable]], together: int = 2) -> list[int]:
    """Rows of a table that show whatever values any row shows together.

    Args:
        rows: the arguments of each test of a matrix, by name.
        together: 2: each pair of values of two arguments is in a chosen row, if it is in any;
            1: each value.

    Returns:
        indices of the chosen rows, ascending: greedily, the row first that shows most, of equals
        the first.
    """
    shown = [
        {frozenset(some) for some in itertools.combinations(row.items(), min(together, len(row)))}
        for row in rows
    ]
    missing = set[frozenset[tuple[str, Hashable]]]().union(*shown)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: (len(shown[index] & missing), -index))
        chosen.append(best)
        missing -= shown[best]
    return sorted(chosen)
