"""The FAISS side of an index: nearest vectors by cosine, kept in step with the rows.

It is derived from the rows. A row's number stands for one vector for ever, so any older snapshot is
brought up to date by the numbers alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sqlite3
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import xxhash

from kvlink_rag.index.catalog import SNAPSHOTS, numbers_of, vectors_of
from kvlink_rag.index.embeddings import Vectors

FLAT_LIMIT = 20_000
"""Up to so many vectors every one is compared: exact, and fast enough."""
SNAPSHOT = re.compile(r"vectors-(\d+)\.faiss")
DIGEST_BYTES = 16

Numbers = npt.NDArray[np.int64]


def make_faiss(vectors: Vectors, numbers: Numbers, flat_limit: int = FLAT_LIMIT) -> Any:
    """A FAISS index by inner product over ``vectors [n, dim]``, which answers with ``numbers [n]``.

    Flat up to ``flat_limit`` vectors. Above, an inverted file with 2 sqrt(n) lists, of which a
    quarter and no fewer than 16 are searched.
    """
    count, dim = vectors.shape
    if count <= flat_limit:
        flat = faiss.IndexIDMap(faiss.IndexFlatIP(dim))
        flat.add_with_ids(vectors, numbers)
        return flat
    lists = max(1, round(2 * count**0.5))
    # no IndexIDMap around it: that one supports removal over flat indexes only
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.train(vectors)
    inverted.add_with_ids(vectors, numbers)
    inverted.nprobe = max(16, lists // 4)
    return inverted


def outgrown(index: Any, count: int, flat_limit: int = FLAT_LIMIT) -> bool:
    """Whether ``count`` vectors ask for another index: of the other kind, or of twice the size."""
    if not isinstance(index, faiss.IndexIVF):
        return count > flat_limit
    made_for = (index.nlist / 2) ** 2
    return count > 2 * made_for or count < flat_limit / 2


class VectorTable:
    """The vectors of an index' rows.

    Args:
        folder: where snapshots ``vectors-<generation>.faiss`` are kept.
        flat_limit: see :func:`make_faiss`.
    """

    def __init__(self, folder: Path, flat_limit: int = FLAT_LIMIT) -> None:
        self.folder = folder
        self.flat_limit = flat_limit
        self.generation = -1
        self._index: Any = None
        self._numbers: set[int] = set()

    def forget_later(self, generation: int) -> None:
        """Remove snapshots of a later state than ``generation``.

        They are there when an older SQLite file was put back: its next rows get numbers that those
        snapshots hold with other vectors.
        """
        for saved, path in self._snapshots():
            if saved > generation:
                with contextlib.suppress(OSError):
                    path.unlink()

    def sync(self, tx: sqlite3.Connection, generation: int, dim: int) -> None:
        """Bring it in step with the rows that a transaction sees."""
        if self._index is not None and self.generation == generation:
            return
        if self._index is None:
            self._load(generation, dim)
        numbers = numbers_of(tx)
        if self._index is None or outgrown(self._index, len(numbers), self.flat_limit):
            ordered = sorted(numbers)
            vectors = vectors_of(tx, ordered, dim)
            self._index = make_faiss(vectors, np.array(ordered, np.int64), self.flat_limit)
        else:
            if gone := sorted(self._numbers - numbers):
                self._index.remove_ids(np.array(gone, np.int64))
            if new := sorted(numbers - self._numbers):
                self._index.add_with_ids(vectors_of(tx, new, dim), np.array(new, np.int64))
        self._numbers = numbers
        self.generation = generation

    def search(self, vector: Vectors, k: int) -> dict[int, float]:
        """The ``k`` nearest of ``vector [1, dim]``: row numbers and cosines, best first."""
        k = min(k, len(self._numbers))
        if k == 0:
            return {}
        scores, numbers = self._index.search(vector, k)
        if -1 in numbers:  # the lists of an inverted file that were searched hold fewer: search all
            everything = faiss.SearchParametersIVF()
            everything.nprobe = self._index.nlist
            scores, numbers = self._index.search(vector, k, params=everything)
        pairs = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
        return {number: score for number, score in pairs if number >= 0}

    def saved(self, generation: int) -> bool:
        """Whether there is a snapshot of this state already."""
        return (self.folder / f"vectors-{generation}.faiss").is_file()

    def save(self) -> None:
        """Write a snapshot and remove older ones.

        A folder that cannot be written to is left alone: a snapshot only saves time.
        """
        path = self.folder / f"vectors-{self.generation}.faiss"
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        data = faiss.serialize_index(self._index)  # uint8 [bytes]
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data.data)
                # behind the index, where FAISS itself does not look
                file.write(xxhash.xxh3_128(data.data).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        for old in set(self.folder.glob(SNAPSHOTS)) - {path}:
            with contextlib.suppress(OSError):
                old.unlink()

    def _load(self, generation: int, dim: int) -> None:
        """Take the newest snapshot that is whole and not of a later state than the rows."""
        for saved, path in self._snapshots():
            if saved <= generation and (index := _read(path, dim)) is not None:
                self._index = index
                self._numbers = set(_numbers(index).tolist())
                return

    def _snapshots(self) -> list[tuple[int, Path]]:
        """Generations and files, newest first."""
        found = ((SNAPSHOT.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(name[1]), path) for name, path in found if name), reverse=True)


def _read(path: Path, dim: int) -> Any:
    """The index in a snapshot; None when it is damaged."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError:
        return None
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    # checked before FAISS parses it, which trusts the sizes it finds
    if len(body) == 0 or xxhash.xxh3_128(body.data).digest() != digest.tobytes():
        return None
    try:
        index = faiss.deserialize_index(body)
    except RuntimeError:  # another version's format
        return None
    return index if index.d == dim else None


def _numbers(index: Any) -> Numbers:
    if isinstance(index, faiss.IndexIDMap):
        return np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64)
    inverted = index.invlists
    ids = [
        faiss.rev_swig_ptr(inverted.get_ids(place), inverted.list_size(place)).copy()
        for place in range(index.nlist)
        if inverted.list_size(place)
    ]
    return np.concatenate(ids).astype(np.int64) if ids else np.empty(0, np.int64)
