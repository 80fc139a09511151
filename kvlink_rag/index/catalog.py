"""What an index knows without a model: its texts, vectors and sources in one SQLite file.

``index.sqlite`` is the truth: a chunk is in the index when its row is committed. Everything else in
the folder (FAISS snapshots, chunk caches) is derived from it and made anew when it is lost.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from kvlink_rag.chunk import Chunk
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.index.embeddings import Vectors
from kvlink_rag.store import KVStore, StoreStat
from kvlink_rag.store.folder.database import Database, explained

FILE = "index.sqlite"
CACHES = "kv"
SNAPSHOTS = "vectors-*.faiss*"
VERSION = 1
# AUTOINCREMENT: the id of a removed row is never given to another vector
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE chunks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL,
    title TEXT, metadata TEXT NOT NULL, source TEXT, embedding BLOB NOT NULL
);
CREATE INDEX chunks_by_source ON chunks (source);
CREATE TABLE sources (path TEXT PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE releases (id TEXT PRIMARY KEY, keep TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('generation', '0')
"""
COLUMNS = "id, text, title, metadata"


@dataclass(frozen=True)
class IndexStat:
    """Size and identity of an index; ``embedding_dim`` is 0 while it is empty."""

    chunks: int
    sources: int
    embedding_name: str
    embedding_dim: int
    model_name: str
    fingerprint: str
    nbytes: int
    """Bytes of the SQLite file, its write-ahead log and the FAISS snapshots."""
    caches: StoreStat


class IndexCatalog:
    """The rows of an index.

    Args:
        folder: the index' folder; made with mode 0700 when ``create`` is set.
        create: False refuses a folder that is no index.

    Raises:
        StoreError: it cannot be opened, is damaged, or another version made it.
    """

    def __init__(self, folder: str | os.PathLike[str], *, create: bool = False) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.path = self.folder / FILE
        with explained("open the index", self.folder):
            if not create and not self.path.is_file():
                raise StoreError(f"{self.folder} is no index: it has no {FILE}")
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700, parents=True)
            os.listdir(self.folder)  # unreadable: say so before anything is made
            self._database = Database(self.path, SCHEMA, VERSION)
            self._lock = FileLock(f"{self.path}.lock", mode=0o600, poll_interval=0.01)

    @property
    def readonly(self) -> bool:
        """Whether nothing can be written."""
        return self._database.readonly

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keep other threads and processes from changing rows and caches together meanwhile.

        Readers go on. Not to be confused with a transaction: it may last for a batch of encoding.
        """
        with explained("lock the index", self.folder):
            if self.readonly:
                raise StoreError(f"cannot change {self.folder}: it is read-only")
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view."""
        with explained("read the index", self.folder), self._database.reading() as tx:
            yield tx

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One commit: all of it or nothing, also when the process is killed."""
        with explained("write the index", self.folder), self._database.writing() as tx:
            yield tx
            tx.execute("UPDATE meta SET value = value + 1 WHERE name = 'generation'")

    def generation(self) -> int:
        """Counts the commits: whoever sees another number than before has something to read."""
        with self.reading() as tx:
            return generation_of(tx)

    def meta(self, name: str) -> str | None:
        """A remembered value."""
        with self.reading() as tx:
            row = tx.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, values: Mapping[str, str]) -> None:
        """Remember values."""
        with self.writing() as tx:
            write_meta(tx, values)

    def ids(self, source: str | None = None) -> list[str]:
        """Ids of all chunks, or of those whose ``metadata["source"]`` is ``source``, as added."""
        which = "" if source is None else "WHERE source = :source"
        with self.reading() as tx:
            query = f"SELECT id FROM chunks {which} ORDER BY number"
            return [row[0] for row in tx.execute(query, {"source": source})]

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        """Chunks by id, in the order asked for; unknown ids are left out."""
        with self.reading() as tx:
            rows = (_find(tx, COLUMNS, id) for id in ids)
            return [chunk_of(*row) for row in rows if row is not None]

    def __len__(self) -> int:
        with self.reading() as tx:
            return int(tx.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def __contains__(self, id: object) -> bool:
        with self.reading() as tx:
            return isinstance(id, str) and _find(tx, "number", id) is not None

    def sources(self) -> dict[str, str]:
        """Digests of the indexed files, by path."""
        with self.reading() as tx:
            return dict(tx.execute("SELECT path, digest FROM sources ORDER BY path").fetchall())

    def set_source(self, path: str, digest: str) -> None:
        """Remember that a file was indexed in full."""
        with self.writing() as tx:
            tx.execute("INSERT OR REPLACE INTO sources VALUES (?, ?)", (path, digest))

    def drop_source(self, path: str) -> None:
        """Forget a file; its chunks stay (delete them by ``ids(source)``)."""
        with self.writing() as tx:
            tx.execute("DELETE FROM sources WHERE path = ?", (path,))

    def finish_releases(self, store: KVStore) -> None:
        """Release the caches of removed and replaced chunks. Call it as the only writer.

        What is to be released is committed with the rows, so that a killed process' releases are
        done by the next one.
        """
        with self.reading() as tx:
            waiting = releases_of(tx)
        together: dict[frozenset[str], list[str]] = {}  # chunks of one batch keep the same caches
        for id, keep in waiting.items():
            together.setdefault(keep, []).append(id)
        for keep, ids in together.items():
            store.release(ids, keep=keep)
            with explained("write the index", self.folder), self._database.writing() as tx:
                tx.executemany("DELETE FROM releases WHERE id = ?", [(id,) for id in ids])

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy into a new file."""
        with explained("read the index", self.folder):
            self._database.copy_to(path)

    def sound(self) -> bool:
        """Whether SQLite finds the file whole."""
        return self._database.sound()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


# What can be done inside a transaction.


def add_rows(tx: sqlite3.Connection, chunks: Sequence[Chunk], vectors: Vectors) -> None:
    """Insert chunks with their vectors ``[chunks, dim]``, in place of those with the same ids."""
    for chunk, vector in zip(chunks, vectors, strict=True):
        id, source = chunk.document_id, chunk.metadata.get("source")
        tx.execute("DELETE FROM chunks WHERE id = ?", (id,))
        tx.execute(
            "INSERT INTO chunks (id, text, title, metadata, source, embedding) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (id, chunk.text, chunk.title, metadata_json(chunk), source, vector.tobytes()),
        )


def update_metadata(tx: sqlite3.Connection, chunks: Iterable[Chunk]) -> None:
    """Replace the metadata of chunks whose text stays."""
    for chunk in chunks:
        tx.execute(
            "UPDATE chunks SET metadata = ?, source = ? WHERE id = ?",
            (metadata_json(chunk), chunk.metadata.get("source"), chunk.document_id),
        )


def delete_rows(tx: sqlite3.Connection, ids: Iterable[str]) -> list[str]:
    """Remove chunks; the ids that were there."""
    return [id for id in ids if tx.execute("DELETE FROM chunks WHERE id = ?", (id,)).rowcount]


def plan_release(tx: sqlite3.Connection, ids: Iterable[str], keep: Collection[str]) -> None:
    """Commit with the rows that caches of these documents, except ``keep``, are to be released."""
    keys = json.dumps(sorted(keep))
    tx.executemany("INSERT OR REPLACE INTO releases VALUES (?, ?)", [(id, keys) for id in ids])


def releases_of(tx: sqlite3.Connection) -> dict[str, frozenset[str]]:
    """Documents whose caches are still to be released, and the keys that they keep."""
    rows = tx.execute("SELECT id, keep FROM releases")
    return {id: frozenset(json.loads(keep)) for id, keep in rows}


def write_meta(tx: sqlite3.Connection, values: Mapping[str, str]) -> None:
    """Remember values."""
    tx.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))


def rows_of(tx: sqlite3.Connection, numbers: Sequence[int]) -> list[tuple[int, Chunk]]:
    """Rows by number, in the order asked for; removed ones are left out."""
    query = f"SELECT {COLUMNS} FROM chunks WHERE number = ?"
    rows = ((number, tx.execute(query, (number,)).fetchone()) for number in numbers)
    return [(number, chunk_of(*row)) for number, row in rows if row is not None]


def generation_of(tx: sqlite3.Connection) -> int:
    """Number of the last commit."""
    return int(tx.execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()[0])


def numbers_of(tx: sqlite3.Connection) -> set[int]:
    """The numbers of all rows."""
    return {row[0] for row in tx.execute("SELECT number FROM chunks")}


def vectors_of(tx: sqlite3.Connection, numbers: Sequence[int], dim: int) -> Vectors:
    """Vectors ``[numbers, dim]`` of rows.

    Raises:
        StoreError: a row's vector does not have ``dim`` numbers.
    """
    vectors = np.empty((len(numbers), dim), dtype=np.float32)
    query = "SELECT id, embedding FROM chunks WHERE number = ?"
    for place, number in enumerate(numbers):
        id, blob = tx.execute(query, (number,)).fetchone()
        if len(blob) != vectors[place].nbytes:
            raise StoreError(
                f"the vector of chunk {id!r} is damaged: delete the chunk, add it anew"
            )
        vectors[place] = np.frombuffer(blob, dtype=np.float32)
    return vectors


def chunk_of(id: str, text: str, title: str | None, metadata: str) -> Chunk:
    """A row as a chunk."""
    return Chunk(text, id=id, title=title, metadata=json.loads(metadata))


def metadata_json(chunk: Chunk) -> str:
    """A chunk's metadata as it is kept.

    Raises:
        InputError: JSON cannot hold it, or its ``source`` is no string.
    """
    source = chunk.metadata.get("source")
    if source is not None and not isinstance(source, str):
        raise InputError(f"chunk {chunk.document_id!r}: metadata source {source!r} is no str")
    try:
        text = json.dumps(dict(chunk.metadata), allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"chunk {chunk.document_id!r}: metadata cannot be kept as JSON ({error}): "
            "use str, int, float, bool, None, lists and dicts of these"
        ) from error
    return text


def _find(tx: sqlite3.Connection, columns: str, id: str) -> Any:
    return tx.execute(f"SELECT {columns} FROM chunks WHERE id = ?", (id,)).fetchone()
