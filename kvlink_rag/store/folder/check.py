"""Look for what does not belong in a folder store, and remove it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kvlink_rag.store.base import StoreCheck
from kvlink_rag.store.folder import catalog as sql
from kvlink_rag.store.folder.catalog import Catalog
from kvlink_rag.store.folder.files import ChunkFiles, State

THREADS = 4


@dataclass
class Findings:
    """What a walk over the files found; a file just being stored or released may look wrong."""

    checked: int = 0
    corrupt: set[Path] = field(default_factory=set)
    strays: set[Path] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    unreferenced: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(
            self.corrupt or self.strays or self.orphans or self.missing or self.unreferenced
        )

    def report(self, files: ChunkFiles) -> StoreCheck:
        """As the store's users see it: files by path, entries by key."""
        orphans = self.strays | {files.path(key) for key in self.orphans}
        return StoreCheck(
            checked=self.checked,
            corrupt=sorted(map(str, self.corrupt)),
            orphans=sorted(map(str, orphans)),
            missing=sorted(self.missing),
            unreferenced=sorted(self.unreferenced),
        )


def find(
    files: ChunkFiles, catalog: Catalog, progress: Callable[[int, int], None] | None = None
) -> Findings:
    """Read every file and compare with the catalog, without stopping writers."""
    paths = list(files.paths())
    found = Findings(checked=len(paths))
    whole: set[str] = set()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        states = zip(paths, pool.map(files.state, paths), strict=True)
        for done, (path, state) in enumerate(states, start=1):
            if state is State.WHOLE:
                whole.add(path.name[:64])
            elif state is State.CORRUPT:
                found.corrupt.add(path)
            elif state is State.STRAY:
                found.strays.add(path)
            if progress is not None:
                progress(done, len(paths))
    rows, found.unreferenced = catalog.read(lambda tx: (sql.keys(tx), sql.unreferenced(tx)))
    corrupt = {path.name[:64] for path in found.corrupt}
    found.orphans = whole - rows
    found.missing = rows - whole - corrupt
    found.unreferenced -= found.missing | corrupt
    return found


def settle(tx: sqlite3.Connection, found: Findings, files: ChunkFiles, remove: bool) -> None:
    """As the only writer, look again at what was found and keep what still holds.

    Args:
        tx: a write transaction, so that no file is being renamed or released.
        remove: also remove it. References to removed caches stay: they hold again when the caches
            are computed and stored anew.
    """
    found.corrupt = {path for path in found.corrupt if files.state(path) is State.CORRUPT}
    found.strays = {path for path in found.strays if files.state(path) is State.STRAY}
    found.orphans = {key for key in found.orphans if files.has(key) and not sql.knows(tx, key)}
    found.missing = {key for key in found.missing if sql.knows(tx, key) and not files.has(key)}
    found.unreferenced = {
        key for key in found.unreferenced if sql.knows(tx, key) and not sql.referred(tx, key)
    }
    if not remove:
        return
    for path in found.corrupt:
        sql.drop(tx, path.name[:64])
    for key in found.missing | found.unreferenced:
        sql.drop(tx, key)
    for path in found.corrupt | found.strays:
        path.unlink(missing_ok=True)
    for key in found.orphans | found.unreferenced:
        files.remove(key)
