"""What a folder may hold: its budget, what is never evicted, and what is evicted first.

Functions run inside a transaction of the catalog, so that all processes keep one budget together.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from kvlink_rag.errors import StoreError
from kvlink_rag.store.base import Budget, ModelUsage, StoreUsage
from kvlink_rag.store.folder.catalog import Entry, drop

PART = "#"
"""Between a document's id and what tells its parts from each other, in the ids of these."""

_TO_LAST = f"rtrim(refs.document, replace(refs.document, '{PART}', ''))"
PINNED = (
    "EXISTS (SELECT 1 FROM refs JOIN pins ON pins.document IN "
    f"(refs.document, substr({_TO_LAST}, 1, length({_TO_LAST}) - 1)) "
    "WHERE refs.key = entries.key)"
)
"""Whether a document that is pinned, or a part of one, refers to an entry."""

TOTAL, DOCUMENT, NAMESPACE = "all", "document", "namespace:"
"""Names of limits; a namespace's own name follows."""


def budget_of(tx: sqlite3.Connection) -> Budget:
    """What the folder may hold."""
    limits = dict(tx.execute("SELECT name, nbytes FROM limits").fetchall())
    spaces = {
        name.removeprefix(NAMESPACE): nbytes
        for name, nbytes in limits.items()
        if name.startswith(NAMESPACE)
    }
    return Budget(limits.get(TOTAL), limits.get(DOCUMENT), spaces)


def set_budget(tx: sqlite3.Connection, budget: Budget) -> None:
    """Say what the folder may hold from now on."""
    limits = {TOTAL: budget.max_bytes, DOCUMENT: budget.document_bytes}
    limits |= {f"{NAMESPACE}{name}": nbytes for name, nbytes in budget.namespaces.items()}
    tx.execute("DELETE FROM limits")
    tx.executemany(
        "INSERT INTO limits VALUES (?, ?)",
        [(name, nbytes) for name, nbytes in limits.items() if nbytes is not None],
    )


def pin(tx: sqlite3.Connection, documents: Iterable[str]) -> None:
    """Never evict what these documents refer to, now or later."""
    tx.executemany("INSERT OR IGNORE INTO pins VALUES (?)", [(each,) for each in documents])


def unpin(tx: sqlite3.Connection, documents: Iterable[str]) -> None:
    """Take a pin back."""
    tx.executemany("DELETE FROM pins WHERE document = ?", [(each,) for each in documents])


def pins(tx: sqlite3.Connection) -> list[str]:
    """The documents that are pinned."""
    return [row[0] for row in tx.execute("SELECT document FROM pins ORDER BY document")]


def usage(tx: sqlite3.Connection) -> StoreUsage:
    """How the folder is used."""
    hits, misses, evicted = tx.execute("SELECT hits, misses, evicted FROM totals").fetchone()
    oldest, last_used = tx.execute("SELECT min(created), max(last_used) FROM entries").fetchone()
    pinned = tx.execute(f"SELECT count(*) FROM entries WHERE {PINNED}").fetchone()[0]
    models = tx.execute(
        "SELECT fingerprint, count(*), sum(tokens), sum(nbytes) FROM entries "
        "GROUP BY fingerprint ORDER BY sum(nbytes) DESC, fingerprint"
    )
    return StoreUsage(
        budget_of(tx),
        hits,
        misses,
        evicted,
        pinned,
        oldest,
        last_used,
        [ModelUsage(*row) for row in models],
    )


@dataclass(frozen=True)
class _Share:
    """Entries that a limit is for, as a condition in SQL."""

    name: str
    limit: int
    where: str = ""
    values: tuple[str, ...] = ()

    def nbytes(self, tx: sqlite3.Connection) -> int:
        """Bytes of their files."""
        if not self.where:
            return int(tx.execute("SELECT nbytes FROM totals").fetchone()[0])
        query = f"SELECT coalesce(sum(nbytes), 0) FROM entries WHERE {self.where}"
        return int(tx.execute(query, self.values).fetchone()[0])

    def evictable(self, tx: sqlite3.Connection) -> Iterator[tuple[str, int, float]]:
        """``(key, bytes, priority)``, without pinned ones, what is missed least first."""
        where = f"{self.where} AND" if self.where else ""
        query = (
            f"SELECT key, nbytes, priority FROM entries WHERE {where} NOT {PINNED} "
            "ORDER BY priority"
        )
        yield from tx.execute(query, self.values)


def keep(
    tx: sqlite3.Connection,
    documents: Collection[str],
    held: Callable[[str], bool],
    new: Entry | None = None,
) -> list[str]:
    """Forget entries until no limit is exceeded: which files are to be removed.

    Args:
        documents: what refers to anything anew; limits of other documents cannot be exceeded.
        held: whether an answer is being made from a cache.
        new: an entry that stays.

    Raises:
        StoreError: the new entry does not fit, because of what is pinned or held.
    """
    gone: list[str] = []
    for share in _shares(budget_of(tx), documents):
        over = share.nbytes(tx) - share.limit
        victims = []
        for key, nbytes, priority in share.evictable(tx) if over > 0 else ():
            if over <= 0:
                break
            if (new is None or key != new.key) and not held(key):
                victims.append((key, priority))
                over -= nbytes
        if over > 0 and new is not None:
            raise _no_room(share, new)
        for key, priority in victims:
            _evict(tx, key, priority)
            gone.append(key)
    return gone


def _shares(budget: Budget, documents: Collection[str]) -> Iterator[_Share]:
    if budget.max_bytes is not None:
        yield _Share("the store", budget.max_bytes)
    if budget.document_bytes is not None:
        own = "key IN (SELECT key FROM refs WHERE document = ? OR document >= ? AND document < ?)"
        for whole in sorted({each.rpartition(PART)[0] or each for each in documents}):
            parts = (whole, whole + PART, whole + chr(ord(PART) + 1))
            yield _Share(f"document {whole!r}", budget.document_bytes, own, parts)
    for name, limit in budget.namespaces.items():
        if any(document.startswith(name) for document in documents):
            within = "key IN (SELECT key FROM refs WHERE document >= ? AND document < ?)"
            last = name + chr(sys.maxunicode)
            yield _Share(f"namespace {name!r}", limit, within, (name, last))


def _evict(tx: sqlite3.Connection, key: str, priority: float) -> None:
    """Its references stay, as with :func:`~kvlink_rag.store.folder.catalog.drop`."""
    drop(tx, key)
    tx.execute("UPDATE totals SET evicted = evicted + 1, clock = max(clock, ?)", (priority,))


def _no_room(share: _Share, new: Entry) -> StoreError:
    size = f"a cache of {new.tokens} tokens takes {new.nbytes} bytes, and {share.name} may hold"
    if new.nbytes > share.limit:
        return StoreError(f"{size} {share.limit}: raise the budget, or make chunks smaller")
    return StoreError(
        f"{size} {share.limit}, of which the rest is pinned or being answered from: raise the "
        "budget, or unpin documents"
    )
