"""What commands have in common: how they speak, and what they load."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from kvlink_rag.common.text import one_line, printable
from kvlink_rag.errors import InputError, KVLinkError, KVLinkWarning

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.index.documents import Document, Skipped
    from kvlink_rag.index.index import KVIndex
    from kvlink_rag.prompt.layout import EncodeBehind

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

MOST_LISTED = 20
"""Lines of one kind that are printed before the rest is only counted."""
MOST_LEFT_OUT = 5
"""The same of files that nobody meant to be read."""


class Commands(TyperGroup):
    """Turns what goes wrong in any command into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # `kvlink ask ... | head`: the reader has what it wanted; and nothing is to be flushed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (KVLinkError, OSError) as error:
            complain(f"error: {one_line(error)}")
            raise typer.Exit(1) from None


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for ``(files checked, files in all)``."""
    from kvlink_rag.common.progress import bar

    with bar(description, 1.0, unit="share") as done:
        yield lambda checked, total: done(checked / max(total, 1))


def prepare() -> None:
    """Quiet libraries, and our warnings as one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, KVLinkWarning):
            complain(f"warning: {one_line(message)}")

    warnings.showwarning = show


def load_engine(
    model: str,
    adapter: str = "",
    dtype: str = "auto",
    encode_behind: EncodeBehind | None = None,
) -> KVLinkEngine:
    """An engine whose own store is in memory: commands give it theirs.

    Args:
        adapter: empty for none.
        encode_behind: None for the adapter's, or the default, or what the index has that is opened.
    """
    from kvlink_rag.common.progress import quiet_libraries
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.store import MemoryStore

    quiet_libraries()
    return KVLinkEngine.from_pretrained(
        model,
        store=MemoryStore(),
        adapter=adapter or None,
        dtype=dtype,
        encode_behind=encode_behind,
    )


def open_index(
    folder: Path, adapter: str | None = None, dtype: str | None = None, remote: str | None = None
) -> KVIndex:
    """An index with chunks in it, and the engine that it was made for.

    Args:
        adapter, dtype: None takes what is recorded.

    Raises:
        InputError: there is nothing in it.
    """
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

    with closing(IndexCatalog(folder)) as catalog:
        model = catalog.meta("model") or catalog.meta("model_name") or DEFAULT_MODEL
        adapter = catalog.meta("adapter") or "" if adapter is None else adapter
        cache_after = int(catalog.meta("cache_after") or 0)
        recorded = catalog.meta("dtype") or "auto"
        if len(catalog) == 0:
            raise InputError(
                f"{folder} holds no chunks: run kvlink index PATH... --out {folder} first"
            )
    from kvlink_rag.index.index import KVIndex

    engine = load_engine(model, adapter, dtype or recorded)
    return KVIndex.open(folder, engine, remote=remote or None, cache_after=cache_after)


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """The documents in files and folders; what is skipped and left out is listed."""
    from kvlink_rag.index.documents import Skipped, look, read_file

    found = look(paths)
    read = [read_file(file) for file in found.files]
    list_skipped([each for each in read if isinstance(each, Skipped)], found.left_out)
    return [each for each in read if not isinstance(each, Skipped)]


def list_skipped(skipped: list[Skipped], left_out: list[Skipped]) -> None:
    """Name the files that were not read, and why."""
    lines = [f"{each.path}: {each.reason}" for each in skipped]
    print_list("skipped", lines, err=True)
    lines = [f"{each.path}: {each.reason}" for each in left_out]
    print_list("left out", lines, err=True, most=MOST_LEFT_OUT)


def print_list(word: str, lines: list[str], err: bool = False, most: int = MOST_LISTED) -> None:
    for line in lines[:most]:
        typer.echo(f"{word:<8} {printable(line)}", err=err)
    if len(lines) > most:
        typer.echo(f"{word:<8} ... and {len(lines) - most} more", err=err)


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``, ``1.5 GiB`` or ``1000000``.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    try:
        size = int(float(match[1]) * unit) if match and unit else 0
    except (ValueError, OverflowError):  # two points, or so many digits that it is infinite
        size = 0
    if size < 1:
        raise InputError(f"{text!r} is no size: write it as 500MB, 1.5GiB or a number of bytes")
    return size


def size_text(nbytes: int) -> str:
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def complain(line: str) -> None:
    typer.echo(printable(line), err=True)
