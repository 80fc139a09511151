"""One SQLite file, used from several threads (one connection, one lock) and several processes."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvlink_rag.errors import StoreError

BUSY_TIMEOUT_S = 30.0


class Damaged(StoreError):
    """A file is no SQLite database any more, or its pages do not fit together."""


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system and of SQLite into a StoreError.

    It names the path, the cause and the remedy.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StoreError(f"cannot {doing} {path}: {cause}; {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "full" in text:
        return "free some space there, or use a folder on another disk"
    if number == errno.EROFS or "readonly" in text:
        return "it is read-only: make it writable, or use another folder"
    if number in (errno.EACCES, errno.EPERM):
        return "give this user the permission, or use another folder"
    if "locked" in text:
        return "another process is writing to it for long: wait until it is done"
    return "check that it is a folder on a working disk that this user can write to"


class Database:
    """A SQLite file in WAL mode with one schema.

    A folder that cannot be written to is opened for reading only (``readonly``).

    Args:
        path: the file; made with mode 0600 when it is not there.
        schema: statements that make the tables of a new file.
        version: kept as ``user_version``; a file with another one is refused.
        fill: called in the transaction that makes the tables, to fill them.
        upgrades: statements that bring a file of an older version to the next, by that version.

    Raises:
        StoreError: it cannot be opened, or another (version of the) program made it.
        Damaged: its contents are no database.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        version: int,
        fill: Callable[[sqlite3.Connection], None] | None = None,
        upgrades: Mapping[int, str] | None = None,
    ) -> None:
        self.path = path
        self.readonly = not os.access(path.parent, os.W_OK) or (
            path.exists() and not os.access(path, os.W_OK)
        )
        self._lock = threading.RLock()
        _databases.add(self)
        self._inherited: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._derived = fill is not None
        self._prepare = partial(self._bring_up_to_date, schema, version, fill, upgrades or {})
        try:
            with explained("open", path), _damage(path):
                self._connection = self._connect()
                self._prepare()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file."""
        with self._lock, _damage(self.path):
            connection = self._own()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    @contextmanager
    def writing(self, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """The only writer among all processes, until the block ends: committed, or rolled back.

        Args:
            wait: False raises sqlite3.OperationalError at once when another process writes.
        """
        with self._lock, _damage(self.path):
            connection = self._own()
            if self.readonly:
                raise sqlite3.OperationalError("attempt to write a readonly database")
            _set_timeout(connection, BUSY_TIMEOUT_S if wait else 0)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have ended it already
                    connection.execute("ROLLBACK")
                raise

    def copy_to(self, path: Path) -> None:
        """Write one consistent view into a new file of mode 0600, of one piece, without a log."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        with self._lock, _damage(self.path), contextlib.closing(self._open(str(path))) as copy:
            self._own().backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")

    def sound(self) -> bool:
        """Whether SQLite finds the pages and the indexes of the file whole."""
        try:
            with self.reading() as tx:
                return [row[0] for row in tx.execute("PRAGMA quick_check(1)")] == ["ok"]
        except Damaged:
            return False

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _own(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self.path} is closed: open it again")
        if self._pid != os.getpid():
            # SQLite connections do not survive a fork; closing the parent's here is not safe either
            self._inherited, self._connection = self._connection, self._connect()
            self._pid = os.getpid()
        elif self._file != self._found():
            # its disk was mounted anew, or its folder restored: the old file is nobody's any more
            self._connection.close()
            self._connection = self._connect()
            self._prepare()
        return self._connection

    def _found(self) -> tuple[int, int] | None:
        """What identifies the file at the path now; None when it is gone and can be made anew.

        Raises:
            FileNotFoundError: it is gone.
        """
        try:
            stat = self.path.stat()
            return stat.st_dev, stat.st_ino
        except FileNotFoundError:
            if self._derived and self.path.parent.is_dir():
                return None
            raise

    def _connect(self) -> sqlite3.Connection:
        if not self.readonly:
            # made here for its mode, which SQLite hands down to the WAL
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        stat = self.path.stat()
        self._file = stat.st_dev, stat.st_ino
        return self._connect_readonly() if self.readonly else self._connect_writable()

    def _connect_writable(self) -> sqlite3.Connection:
        connection = self._open(str(self.path))
        try:
            _switch_to_wal(connection)
            # with FULL a commit survives a power failure, as the synced files beside it do
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_readonly(self) -> sqlite3.Connection:
        address = self.path.absolute().as_uri()
        connection = self._open(f"{address}?mode=ro", uri=True)
        try:
            connection.execute("SELECT * FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError:
            # WAL mode needs a file beside the database, which cannot be made here
            connection.close()
            return self._open(f"{address}?immutable=1", uri=True)

    def _open(self, address: str, uri: bool = False) -> sqlite3.Connection:
        connection = sqlite3.connect(
            address,
            uri=uri,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,  # transactions are begun by name
            check_same_thread=False,  # the lock does it
        )
        # the file may be of an archive that somebody sent: its schema calls nothing
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection

    def _bring_up_to_date(
        self,
        schema: str,
        version: int,
        fill: Callable[[sqlite3.Connection], None] | None,
        upgrades: Mapping[int, str],
    ) -> None:
        with self.reading() as tx:
            found = _version(tx)
        if (found == 0 or found in upgrades) and not self.readonly:
            with self.writing() as tx:  # another process may have been faster: look again
                found = _version(tx)
                foreign = tx.execute("SELECT name FROM sqlite_master").fetchone()
                if found == 0 and not foreign:
                    _execute(tx, schema)
                    if fill is not None:
                        fill(tx)
                    found = version
                while found in upgrades:
                    _execute(tx, upgrades[found])
                    found += 1
                tx.execute(f"PRAGMA user_version = {found}")
        if found in upgrades:
            raise StoreError(
                f"{self.path} has format {found}, this version reads {version} and cannot bring it "
                "up to date, because it is read-only: open it once where it can be written to"
            )
        if found != version:
            newer = " (a newer version of kvlink-rag?)" if found > version else ""
            raise StoreError(
                f"{self.path} has format {found}{newer}, this version reads {version}: "
                "use the version that made it, or another folder"
            )


def _version(tx: sqlite3.Connection) -> int:
    return int(tx.execute("PRAGMA user_version").fetchone()[0])


def _execute(tx: sqlite3.Connection, script: str) -> None:
    """Statements one by one: sqlite3's own ``executescript`` would commit first."""
    statement = ""
    for part in script.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):  # a trigger has semicolons of its own
            tx.execute(statement)
            statement = ""


_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a child process: a lock that a thread held when it was made would stay held."""
    for database in list(_databases):
        database._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "malformed" in str(error) or "not a database" in str(error):
            raise Damaged(
                f"{path} is damaged ({error}): restore it from a backup, or make it anew"
            ) from error
        raise


def _set_timeout(connection: sqlite3.Connection, seconds: float) -> None:
    connection.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Two processes that open a new file at once: SQLite does not wait here by itself."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
