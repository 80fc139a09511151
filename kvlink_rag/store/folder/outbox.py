"""What is still to be done on a remote, in a file that outlives the process."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvlink_rag.store.folder.database import Database, explained

NAME = "outbox.sqlite"
MOST_UPLOADS = 100_000
VERSION = 1
SCHEMA = """
CREATE TABLE tasks (key TEXT PRIMARY KEY, operation TEXT NOT NULL, number INTEGER) WITHOUT ROWID;
CREATE INDEX tasks_by_number ON tasks (number) WHERE number IS NOT NULL
"""
PENDING = "number IS NOT NULL"
_NEXT = "(SELECT coalesce(max(number), 0) + 1 FROM tasks)"


class Operation(Enum):
    """What is to be done with an object, or was done."""

    WRITE = "write"
    REPLACE = "replace"
    """As WRITE, even where there is one: it is damaged."""
    DELETE = "delete"
    WRITTEN = "written"
    """Done: this folder has brought it there."""


@dataclass(frozen=True)
class Task:
    """Something to do. ``number`` tells it from a later task for the same key."""

    key: str
    operation: Operation
    number: int


def waiting(folder: Path) -> int | None:
    """Uploads and deletions that wait in a store's folder; None where no remote was ever behind it.

    Raises:
        StoreError: the outbox cannot be opened.
    """
    path = folder / NAME
    if not path.exists():
        return None
    outbox = Outbox(path, 0)
    try:
        return len(outbox)
    finally:
        outbox.close()


class Outbox:
    """Tasks in the order they came, one a key: a later one takes the place of an earlier.

    Args:
        path: the SQLite file; made when it is not there.
        most: objects that may wait to be written.

    Raises:
        StoreError: it cannot be opened.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most
        self._database = Database(path, SCHEMA, VERSION)

    def add(self, operation: Operation, keys: Iterable[str]) -> int:
        """Add tasks; returns how many of the oldest uploads were given up for want of room.

        Raises:
            StoreError: it cannot be written.
        """
        with explained("write to", self.path), self._database.writing() as tx:
            tx.executemany(
                f"INSERT INTO tasks VALUES (?, ?, {_NEXT}) ON CONFLICT (key) DO UPDATE SET "
                "operation = excluded.operation, number = excluded.number",
                [(key, operation.value) for key in keys],
            )
            return self._trim(tx)

    def next(self, most: int) -> list[Task]:
        """The oldest tasks, no more than ``most``."""
        query = f"SELECT key, operation, number FROM tasks WHERE {PENDING} ORDER BY number LIMIT ?"
        with explained("read", self.path), self._database.reading() as tx:
            rows = tx.execute(query, (most,)).fetchall()
        return [Task(key, Operation(operation), number) for key, operation, number in rows]

    def done(self, task: Task) -> None:
        """Strike a task out, unless another has taken its place."""
        what = "DELETE FROM tasks"
        if task.operation is not Operation.DELETE:
            what = f"UPDATE tasks SET operation = '{Operation.WRITTEN.value}', number = NULL"
        self._change(what, task)

    def drop(self, task: Task) -> None:
        """Give a task up, unless another has taken its place."""
        self._change("DELETE FROM tasks", task)

    def postpone(self, task: Task) -> None:
        """Put a task behind all others, unless another has taken its place."""
        self._change(f"UPDATE tasks SET number = {_NEXT}", task)

    def operation(self, key: str) -> Operation | None:
        """What is to be done, or was done, with an object."""
        with explained("read", self.path), self._database.reading() as tx:
            row = tx.execute("SELECT operation FROM tasks WHERE key = ?", (key,)).fetchone()
        return Operation(row[0]) if row else None

    def own(self, keys: Collection[str]) -> list[str]:
        """Of these, the keys that this folder writes or has written."""
        return [key for key in keys if self.operation(key) not in (None, Operation.DELETE)]

    def is_used(self) -> bool:
        """Whether anything was ever to be done: never for a remote that can only be read."""
        with explained("read", self.path), self._database.reading() as tx:
            return tx.execute("SELECT 1 FROM tasks LIMIT 1").fetchone() is not None

    def __len__(self) -> int:
        """Tasks that are yet to be done."""
        with explained("read", self.path), self._database.reading() as tx:
            return int(tx.execute(f"SELECT count(*) FROM tasks WHERE {PENDING}").fetchone()[0])

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def _change(self, statement: str, task: Task) -> None:
        with explained("write to", self.path), self._database.writing() as tx:
            tx.execute(f"{statement} WHERE key = ? AND number = ?", (task.key, task.number))

    def _trim(self, tx: sqlite3.Connection) -> int:
        """Give up the oldest uploads beyond the limit; deletions are never given up."""
        uploads = f"{PENDING} AND operation != '{Operation.DELETE.value}'"
        count = tx.execute(f"SELECT count(*) FROM tasks WHERE {uploads}").fetchone()[0]
        if count <= self.most:
            return 0
        oldest = f"SELECT key FROM tasks WHERE {uploads} ORDER BY number LIMIT ?"
        return tx.execute(
            f"DELETE FROM tasks WHERE key IN ({oldest})", (count - self.most,)
        ).rowcount


class Waiting:
    """Has changes wait for the remote of a folder that is being used without it.

    A :class:`FolderWatcher`: the next process with the remote does what
    is left. Where the folder has no remote, nothing is noted.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def stored(self, key: str) -> None:
        """Have a cache uploaded."""
        with self._outbox() as outbox:
            if outbox is not None:
                outbox.add(Operation.WRITE, [key])

    def released(self, keys: Collection[str]) -> None:
        """Have objects deleted."""
        with self._outbox() as outbox:
            if outbox is not None:
                outbox.add(Operation.DELETE, keys)

    def pruned(self, keys: Collection[str]) -> None:
        """Have those objects deleted that this folder has put there."""
        with self._outbox() as outbox:
            if outbox is not None:
                outbox.add(Operation.DELETE, outbox.own(keys))

    @contextmanager
    def _outbox(self) -> Iterator[Outbox | None]:
        if not self._path.exists():
            yield None
            return
        with closing(Outbox(self._path, MOST_UPLOADS)) as outbox:
            yield outbox if outbox.is_used() else None
