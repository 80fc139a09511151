"""What a folder store was asked for, remembered until it is written to the catalog."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import weakref
from dataclasses import replace

from kvlink_rag.store.folder import catalog as sql
from kvlink_rag.store.folder.catalog import Catalog, Entry
from kvlink_rag.store.folder.contents import Contents

TOUCHES = 256
"""Times caches were asked for that are remembered before they are written to the catalog."""


class Uses:
    """Hits and misses that the catalog does not know of yet: reading a cache does not touch it.

    Safe to use from several threads.
    """

    def __init__(self, catalog: Catalog, contents: Contents) -> None:
        self._catalog = catalog
        self._contents = contents
        self.begin()
        _uses.add(self)

    def begin(self) -> None:
        """Remember nothing, as in a forked child: what was before, the parent writes."""
        self._lock = threading.Lock()
        self._touched: dict[str, Entry] = {}
        self._asked = 0
        self._missed = 0

    def count(self, used: Entry | None) -> None:
        """Remember that a cache was asked for, and which was found."""
        with self._lock:
            self._asked += 1
            if used is None:
                self._missed += 1
            else:
                before = self._touched.get(used.key)
                uses = used.uses + (before.uses if before else 0)
                self._touched[used.key] = replace(used, uses=uses)
            full = self._asked >= TOUCHES
        if full:
            self.flush(wait=False)  # somebody is waiting for an answer

    def flush(self, wait: bool = True) -> None:
        """Write what is remembered, and take in files that have no row (a put was killed).

        Args:
            wait: False forgets it when another process writes.

        Raises:
            StoreError: the catalog is closed, or damaged and cannot be made anew.
        """
        with self._lock:
            touched, self._touched = self._touched, {}
            asked, self._asked = self._asked, 0
            missed, self._missed = self._missed, 0

        def write(tx: sqlite3.Connection) -> None:
            sql.count(tx, asked - missed, missed)
            unknown = [entry for entry in touched.values() if not sql.touch(tx, entry)]
            self._contents.take_in_used(tx, unknown)

        if asked and not self._catalog.readonly:
            with contextlib.suppress(OSError, sqlite3.Error):  # a last use is no reason to fail
                self._catalog.write(write, wait)


_uses: weakref.WeakSet[Uses] = weakref.WeakSet()


def _begin_all() -> None:
    for uses in list(_uses):
        uses.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
