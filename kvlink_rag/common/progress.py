"""Progress bars on stderr, in one look for downloads, conversions and indexing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    TransferSpeedColumn,
)


@contextmanager
def bar(
    description: str, total: float | None = None, *, unit: str = "items", enabled: bool = True
) -> Iterator[Callable[[float], None]]:
    """A progress bar; yields a function that sets how much is done.

    Args:
        description: what is being done, a few words.
        total: how much there is to do; None shows a pulse and the elapsed time only.
        unit: ``items``, ``bytes``, or ``share`` for a percentage.
        enabled: False draws nothing.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=32)]
    if total is not None and unit == "bytes":
        columns += [DownloadColumn(), TransferSpeedColumn()]
    elif total is not None:
        columns.append(TaskProgressColumn() if unit == "share" else MofNCompleteColumn())
    columns.append(TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not enabled) as progress:
        task = progress.add_task(description, total=total)

        def done(amount: float) -> None:
            progress.update(task, completed=amount)

        yield done
        # A pulse that ends is full: a bar that stops half way looks like a failure.
        progress.update(task, total=total or 1, completed=total or 1)


def quiet_libraries() -> None:
    """Without transformers' own bars and hints: the command line has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
