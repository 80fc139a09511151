"""The command ``kvlink``.

Nothing heavy is imported before a command runs, so that ``kvlink --help`` answers at once.
"""

from kvlink_rag.cli.commands import app, main

__all__ = ["app", "main"]
