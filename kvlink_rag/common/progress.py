"""Progress bars on stderr, in one look for downloads, conversions and indexing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

Unit = Literal["items", "bytes", "tokens", "share"]

TokenProgress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


class TimeLeftColumn(ProgressColumn):
    """The time left at the speed so far. It counts down while a long batch is being done."""

    def render(self, task: Task) -> Text:
        """Unknown before anything is done."""
        at, elapsed = task.fields["at"], task.finished_time or task.elapsed or 0.0
        if not task.total or not task.completed or not at:
            return Text("-:--:-- left", style="progress.remaining")
        left = at * (task.total - task.completed) / task.completed - (elapsed - at)
        return Text(f"{timedelta(seconds=max(0, round(left)))} left", style="progress.remaining")


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
        columns.append(TimeLeftColumn())
    with Progress(*columns, console=_console(), disable=not enabled) as progress:
        task = progress.add_task(description, total=total, at=0.0)

        def done(amount: float) -> None:
            progress.update(task, completed=amount, at=progress.tasks[0].elapsed)

        yield done
        # A pulse that ends is full: a bar that stops half way looks like a failure.
        progress.update(task, total=total or 1, completed=total or 1)


def _console() -> Console:
    """Stderr; in a notebook without its widgets, where rich would only warn, the bar at its end."""
    return Console(file=sys.stderr, force_jupyter=None if find_spec("ipywidgets") else False)


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
