"""The catalog of a folder store: sizes, uses, budget, and which documents refer to an entry.

It only describes the files, which carry their own identity and checksum: when it is lost or
damaged it is made anew from them. What is lost is who refers to what, pins, the budget and counts.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import KVLinkWarning
from kvlink_rag.store.base import StoreStat
from kvlink_rag.store.folder.database import Damaged, Database, explained

T = TypeVar("T")

VERSION = 2
BASE = """
CREATE TABLE entries (
    key TEXT PRIMARY KEY, tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    fingerprint TEXT NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE refs (
    document TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (document, key)
) WITHOUT ROWID;
CREATE INDEX refs_by_key ON refs (key)
"""
"""What version 1 has."""
USE = """
ALTER TABLE entries ADD COLUMN uses INTEGER NOT NULL DEFAULT 1;
ALTER TABLE entries ADD COLUMN priority REAL NOT NULL DEFAULT 0;
CREATE INDEX entries_by_priority ON entries (priority);
CREATE TABLE pins (document TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE limits (name TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE demand (key TEXT PRIMARY KEY, misses INTEGER NOT NULL, last REAL NOT NULL)
    WITHOUT ROWID;
CREATE INDEX demand_by_last ON demand (last);
CREATE TABLE totals (
    entries INTEGER NOT NULL, tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    hits INTEGER NOT NULL, misses INTEGER NOT NULL, evicted INTEGER NOT NULL, clock REAL NOT NULL
);
INSERT INTO totals SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(nbytes), 0), 0, 0, 0, 0
    FROM entries;
UPDATE entries SET priority = CAST(tokens AS REAL) / max(nbytes, 1);
CREATE TRIGGER added AFTER INSERT ON entries BEGIN
    UPDATE totals SET entries = entries + 1, tokens = tokens + new.tokens,
        nbytes = nbytes + new.nbytes;
END;
CREATE TRIGGER replaced AFTER UPDATE OF tokens, nbytes ON entries BEGIN
    UPDATE totals SET tokens = tokens + new.tokens - old.tokens,
        nbytes = nbytes + new.nbytes - old.nbytes;
END;
CREATE TRIGGER dropped AFTER DELETE ON entries BEGIN
    UPDATE totals SET entries = entries - 1, tokens = tokens - old.tokens,
        nbytes = nbytes - old.nbytes;
END
"""
"""What version 2 has besides; sums are kept, so that no table is read through to know them."""
SCHEMA = f"{BASE};{USE}"
UPGRADES = {1: USE}
MOST_DEMAND = 100_000
"""Keys whose misses are counted; beyond, those not asked for longest are forgotten."""


@dataclass(frozen=True)
class Entry:
    """What the catalog knows of a file.

    Attributes:
        nbytes: the file's size.
        used: Unix time of the last use.
        uses: how often it was used, as far as this is new to the catalog.
    """

    key: str
    tokens: int
    nbytes: int
    fingerprint: str
    used: float
    uses: int = 1

    @classmethod
    def of(cls, key: str, record: ChunkKV, nbytes: int = 0) -> Entry:
        """That of a cache which is used now."""
        return cls(key, len(record.token_ids), nbytes, record.fingerprint, time.time())


class Catalog:
    """SQLite file beside the chunk files.

    Args:
        path: the SQLite file.
        files: lists the entries that are there as files, for a new catalog.

    Raises:
        StoreError: it cannot be opened.
    """

    def __init__(self, path: Path, files: Callable[[], Iterable[Entry]]) -> None:
        self.path = path
        self._files = files
        try:
            self._database = self._open()
        except Damaged as damage:
            self._rebuild(damage)

    @property
    def readonly(self) -> bool:
        """Whether nothing can be written."""
        return self._database.readonly

    def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function on one consistent view of the catalog."""
        return self._run(operation, lambda: self._database.reading())

    def write(self, operation: Callable[[sqlite3.Connection], T], wait: bool = True) -> T:
        """Run a function as the only writer among all processes; its errors roll it back.

        A damaged catalog is made anew and the function is run again.
        """
        return self._run(operation, lambda: self._database.writing(wait))

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy into a new file."""
        self._database.copy_to(path)

    def sound(self) -> bool:
        """Whether the file is an undamaged database."""
        return self._database.sound()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def rebuild(self) -> None:
        """Make a damaged catalog anew from the files, with a warning."""
        self._rebuild(Damaged(f"{self.path} is damaged"))

    def _run(
        self,
        operation: Callable[[sqlite3.Connection], T],
        transaction: Callable[[], contextlib.AbstractContextManager[sqlite3.Connection]],
    ) -> T:
        try:
            with transaction() as tx:
                return operation(tx)
        except Damaged as damage:
            self._rebuild(damage)
        with transaction() as tx:
            return operation(tx)

    def _open(self) -> Database:
        return Database(self.path, SCHEMA, VERSION, fill=self._fill, upgrades=UPGRADES)

    def _fill(self, tx: sqlite3.Connection) -> None:
        count = 0
        for entry in self._files():
            add(tx, entry)
            count += 1
        if count:
            warnings.warn(
                f"the catalog {self.path} was lost: made anew from {count} files; "
                "which documents refer to them, its pins and its budget are not known any more",
                KVLinkWarning,
                stacklevel=2,
            )

    def _rebuild(self, damage: Damaged) -> None:
        with explained("repair", self.path), FileLock(f"{self.path}.lock", mode=0o600):
            with contextlib.suppress(AttributeError):  # not there when opening failed
                self._database.close()
            with contextlib.suppress(Damaged):
                self._database = self._open()
                if self._database.sound():
                    return  # another process has repaired it meanwhile
                self._database.close()
            if not os.access(self.path.parent, os.W_OK):
                raise damage  # read-only: nothing can be repaired here
            os.replace(self.path, f"{self.path}.damaged")
            for suffix in ("-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            self._database = self._open()


# What can be done inside a transaction.


def add(tx: sqlite3.Connection, entry: Entry, documents: Iterable[str] = ()) -> None:
    """Insert or replace an entry and let documents refer to it."""
    tx.execute(
        "INSERT INTO entries (key, tokens, nbytes, fingerprint, created, last_used, uses) "
        "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
        "tokens = excluded.tokens, nbytes = excluded.nbytes, fingerprint = excluded.fingerprint, "
        "last_used = max(last_used, excluded.last_used)",
        (
            entry.key,
            entry.tokens,
            entry.nbytes,
            entry.fingerprint,
            time.time(),
            entry.used,
            entry.uses,
        ),
    )
    _rank(tx, entry.key)
    tx.execute("DELETE FROM demand WHERE key = ?", (entry.key,))
    refer(tx, ((document, entry.key) for document in documents))


def take_after(tx: sqlite3.Connection, key: str, other: str) -> None:
    """Let an entry be as old and have been used as much as another one, if there is that one."""
    tx.execute(
        "UPDATE entries SET (created, last_used, uses) = "
        "(SELECT created, last_used, uses FROM entries WHERE key = :other) "
        "WHERE key = :key AND EXISTS (SELECT 1 FROM entries WHERE key = :other)",
        {"key": key, "other": other},
    )
    _rank(tx, key)


def _rank(tx: sqlite3.Connection, key: str) -> None:
    """An entry's place in the order of eviction: GreedyDual-Size-Frequency (Cherkasova, 1998).

    What a byte of it saves, times its uses, on top of the clock, which is where the last evicted
    one stood: what is not used falls behind, however often it once was.
    """
    tx.execute(
        "UPDATE entries SET priority = (SELECT clock FROM totals) "
        "+ uses * CAST(tokens AS REAL) / max(nbytes, 1) WHERE key = ?",
        (key,),
    )


def refer(tx: sqlite3.Connection, references: Iterable[tuple[str, str]]) -> None:
    """Insert references ``(document, key)``; a key may lack its entry (a miss to be stored)."""
    tx.executemany("INSERT OR IGNORE INTO refs VALUES (?, ?)", references)


def drop(tx: sqlite3.Connection, key: str) -> None:
    """Forget an entry. Its references stay: they hold again when the cache is stored again."""
    tx.execute("DELETE FROM entries WHERE key = ?", (key,))


def knows(tx: sqlite3.Connection, key: str) -> bool:
    """Whether there is such an entry."""
    return tx.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is not None


def referred(tx: sqlite3.Connection, key: str) -> bool:
    """Whether any document refers to this key."""
    return tx.execute("SELECT 1 FROM refs WHERE key = ? LIMIT 1", (key,)).fetchone() is not None


def holders(tx: sqlite3.Connection, key: str) -> list[str]:
    """The documents that refer to this key."""
    return [row[0] for row in tx.execute("SELECT document FROM refs WHERE key = ?", (key,))]


def forget_holders(tx: sqlite3.Connection, key: str) -> None:
    """Remove all references to this key."""
    tx.execute("DELETE FROM refs WHERE key = ?", (key,))


def touch(tx: sqlite3.Connection, entry: Entry) -> bool:
    """Note uses; False when there is no such entry."""
    cursor = tx.execute(
        "UPDATE entries SET last_used = max(last_used, ?), uses = uses + ? WHERE key = ?",
        (entry.used, entry.uses, entry.key),
    )
    if cursor.rowcount:
        _rank(tx, entry.key)
    return cursor.rowcount > 0


def count(tx: sqlite3.Connection, hits: int, misses: int) -> None:
    """Add to how often caches were asked for."""
    tx.execute("UPDATE totals SET hits = hits + ?, misses = misses + ?", (hits, misses))


def count_misses(tx: sqlite3.Connection, keys: Sequence[str], now: float) -> list[int]:
    """Note that caches were wanted and not there; how often so far, each."""
    found = []
    for key in keys:
        row = tx.execute(
            "INSERT INTO demand VALUES (?, 1, ?) ON CONFLICT (key) DO UPDATE SET "
            "misses = misses + 1, last = excluded.last RETURNING misses",
            (key, now),
        ).fetchone()
        found.append(int(row[0]))
    tx.execute(
        "DELETE FROM demand WHERE key IN (SELECT key FROM demand ORDER BY last LIMIT "
        "max(0, (SELECT count(*) FROM demand) - ?))",
        (MOST_DEMAND,),
    )
    return found


def let_go(tx: sqlite3.Connection, documents: Iterable[str], keep: Collection[str]) -> set[str]:
    """Remove the references of documents except to ``keep``; the keys left without any."""
    freed: set[str] = set()
    for document in documents:
        rows = tx.execute("SELECT key FROM refs WHERE document = ?", (document,)).fetchall()
        freed |= (keys := {row[0] for row in rows if row[0] not in keep})
        tx.executemany(
            "DELETE FROM refs WHERE document = ? AND key = ?", [(document, key) for key in keys]
        )
    return {key for key in freed if not referred(tx, key)}


def keys(tx: sqlite3.Connection) -> set[str]:
    """The keys of all entries."""
    return {row[0] for row in tx.execute("SELECT key FROM entries")}


def references(tx: sqlite3.Connection, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs ``(document, key)`` of the documents that start with ``prefix``."""
    last = prefix + chr(sys.maxunicode)  # a range, so that the primary key serves it
    query = "SELECT document, key FROM refs WHERE document >= ? AND document < ?"
    yield from tx.execute(query, (prefix, last))


def unreferenced(tx: sqlite3.Connection) -> set[str]:
    """The keys of entries that no document refers to."""
    query = (
        "SELECT key FROM entries WHERE NOT EXISTS (SELECT 1 FROM refs WHERE refs.key = entries.key)"
    )
    return {row[0] for row in tx.execute(query)}


def stat(tx: sqlite3.Connection) -> StoreStat:
    """Counts and sizes."""
    entries, tokens, nbytes = tx.execute("SELECT entries, tokens, nbytes FROM totals").fetchone()
    documents = tx.execute("SELECT count(DISTINCT document) FROM refs").fetchone()[0]
    return StoreStat(entries, tokens, nbytes, documents, len(unreferenced(tx)))
