"""Progress bars on stderr, in one look for downloads, conversions and indexing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Unit = Literal["items", "bytes", "tokens", "share"]

TokenProgress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

SPEED_OVER_S = 300
"""The time left is told from the speed of the last so many seconds: a batch may take some of them.
"""


@contextmanager
def bar(
    description: str,
    total: float | None = None,
    *,
    unit: Unit = "items",
    enabled: bool = True,
) -> Iterator[Callable[[float], None]]:
    """A progress bar with the time left; yields a function that sets how much is done.

    Args:
        description: what is being done, a few words.
        total: how much there is to do; None shows a pulse and the elapsed time only.
        unit: what is counted; a ``share`` is shown as a percentage.
        enabled: False draws nothing.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=24)]
    if total is not None:
        columns += _amount(unit)
    columns.append(TimeElapsedColumn())
    if total is not None:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    with Progress(
        *columns,
        console=Console(file=sys.stderr),
        disable=not enabled,
        speed_estimate_period=SPEED_OVER_S,
    ) as progress:
        task = progress.add_task(description, total=total)

        def done(amount: float) -> None:
            progress.update(task, completed=amount)

        yield done
        # A pulse that ends is full: a bar that stops half way looks like a failure.
        progress.update(task, total=total or 1, completed=total or 1)


def _amount(unit: Unit) -> list[ProgressColumn]:
    if unit == "bytes":
        return [DownloadColumn(), TransferSpeedColumn()]
    if unit == "tokens":
        return [TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")]
    return [TaskProgressColumn() if unit == "share" else MofNCompleteColumn()]


@contextmanager
def token_progress(
    description: str, total: int, progress: bool | TokenProgress
) -> Iterator[Callable[[int], None]]:
    """Tell somebody of tokens; yields a function that sets how many are done.

    Args:
        total: tokens in all.
        progress: a function is called with each number and the total; True draws a bar, unless
            there is nothing to do; False tells nobody.
    """
    if callable(progress):
        tell = progress
        yield lambda done: tell(done, total)
        return
    with bar(description, total, unit="tokens", enabled=progress and total > 0) as show:
        yield show


class Parts:
    """Adds up the tokens of parts that are done one after the other.

    Args:
        show: is told how many tokens of all parts are done.
    """

    def __init__(self, show: Callable[[int], None]) -> None:
        self._show = show
        self._before = self._done = 0

    def tell(self, done: int, total: int) -> None:
        """The :data:`TokenProgress` of the part that is being done."""
        self._done = done
        self._show(self._before + done)

    def next(self) -> None:
        """The part is done, another begins."""
        self._before, self._done = self._before + self._done, 0


def quiet_libraries() -> None:
    """Without transformers' own bars and hints: the command line has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
