"""The command ``kvlink demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvlink_rag.cli.options import ModelDtype
from kvlink_rag.cli.shared import prepare


def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Where the demo's index is kept; default: the user cache.")
    ] = None,
    dtype: ModelDtype = "auto",
) -> None:
    """Ask questions about five Wikipedia articles, with chunk reuse and with full prefill."""
    prepare()
    from kvlink_rag.demo import run

    run(folder, dtype)
