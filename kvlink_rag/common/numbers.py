"""Numbers that a user gives: checked before anything runs, coerced where that changes nothing."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from kvlink_rag.errors import InputError


def real(name: str, value: Any) -> float:
    """A finite number; integers and numpy's are.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def whole(name: str, value: Any) -> int:
    """An integer; numpy's are.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be an integer, not {value!r}")
    return int(value)
