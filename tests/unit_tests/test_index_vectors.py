"""The FAISS side: right neighbours, and snapshots that are never trusted blindly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from kvlink_rag.chunk import Chunk
from kvlink_rag.index.catalog import IndexCatalog, add_rows, delete_rows, generation_of
from kvlink_rag.index.embeddings import Vectors, normalise
from kvlink_rag.index.vectors import VectorTable, make_faiss

DIM = 16


def clustered(count: int, seed: int = 0) -> Vectors:
    """Vectors about 50 centres, as texts have topics: ``[count, DIM]``."""
    centres = np.random.default_rng(99).standard_normal((50, DIM))
    chance = np.random.default_rng(seed)
    places = chance.integers(0, 50, count)
    return normalise(centres[places] + 0.5 * chance.standard_normal((count, DIM)))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[IndexCatalog]:
    catalog = IndexCatalog(tmp_path, create=True)
    yield catalog
    catalog.close()


def add(catalog: IndexCatalog, vectors: Vectors, prefix: str = "") -> None:
    chunks = [Chunk("text", id=f"{prefix}{place}") for place in range(len(vectors))]
    with catalog.writing() as tx:
        add_rows(tx, chunks, vectors)


def remove(catalog: IndexCatalog, *ids: str) -> None:
    with catalog.writing() as tx:
        delete_rows(tx, ids)


def synced(catalog: IndexCatalog, table: VectorTable) -> VectorTable:
    with catalog.reading() as tx:
        table.sync(tx, generation_of(tx), DIM)
    return table


def nearest(table: VectorTable, vector: Vectors) -> int:
    return next(iter(table.search(vector[None], 1)))


def no_rebuild(*_: object) -> Any:
    raise AssertionError("rebuilt")


def test_many_vectors_are_found_by_lists() -> None:
    vectors, numbers = clustered(3000), np.arange(3000) * 7 + 1
    exact = make_faiss(vectors, numbers, flat_limit=3000)
    lists = make_faiss(vectors, numbers, flat_limit=2999)
    assert isinstance(exact, faiss.IndexIDMap)
    assert isinstance(lists, faiss.IndexIVFFlat)
    assert lists.nprobe < lists.nlist
    questions = clustered(100, seed=1)
    _, wanted = exact.search(questions, 10)
    _, found = lists.search(questions, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(wanted, found, strict=True)])
    assert recall >= 0.9


@pytest.mark.parametrize("flat_limit", [1000, 50])
def test_follows_the_rows(catalog: IndexCatalog, flat_limit: int) -> None:
    table = VectorTable(catalog.folder, flat_limit)
    vectors = clustered(120)
    add(catalog, vectors[:100])
    assert nearest(synced(catalog, table), vectors[5]) == 6
    add(catalog, vectors[100:], prefix="later ")
    remove(catalog, "5", "6")
    synced(catalog, table)
    assert nearest(table, vectors[110]) == 111
    assert set(table.search(vectors[5][None], 200)) == set(range(1, 121)) - {6, 7}


def test_grows_from_flat_to_lists_and_back(catalog: IndexCatalog) -> None:
    table = VectorTable(catalog.folder, flat_limit=50)
    vectors = clustered(300)
    kinds = []
    for start in range(0, 300, 50):
        add(catalog, vectors[start : start + 50], prefix=f"{start} ")
        index = synced(catalog, table)._index
        kinds.append(getattr(index, "nlist", 0))
    assert kinds == [0, 20, 20, 20, 32, 32]
    remove(catalog, *(f"{start} {place}" for start in range(50, 300, 50) for place in range(50)))
    remove(catalog, *(f"0 {place}" for place in range(30)))
    assert isinstance(synced(catalog, table)._index, faiss.IndexIDMap)
    assert len(table.search(vectors[:1], 100)) == 20


@pytest.mark.parametrize("flat_limit", [1000, 50])
def test_a_snapshot_is_taken_up(
    catalog: IndexCatalog, monkeypatch: pytest.MonkeyPatch, flat_limit: int
) -> None:
    vectors = clustered(102)
    add(catalog, vectors[:100])
    synced(catalog, VectorTable(catalog.folder, flat_limit)).save()
    add(catalog, vectors[100:], prefix="later ")
    remove(catalog, "5")
    monkeypatch.setattr("kvlink_rag.index.vectors.make_faiss", no_rebuild)
    table = synced(catalog, VectorTable(catalog.folder, flat_limit))
    assert nearest(table, vectors[101]) == 102
    assert set(table.search(vectors[5][None], 200)) == set(range(1, 103)) - {6}


def test_only_the_newest_snapshot_stays(catalog: IndexCatalog) -> None:
    table = VectorTable(catalog.folder)
    for turn in range(3):
        add(catalog, clustered(3), prefix=f"{turn} ")
        synced(catalog, table).save()
    (catalog.folder / "vectors-2.faiss.00000000").write_bytes(b"left by a killed process")
    add(catalog, clustered(3), prefix="last ")
    synced(catalog, table).save()
    assert [path.name for path in catalog.folder.glob("vectors*")] == ["vectors-4.faiss"]
    assert table.saved(4)


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "flipped", "foreign"])
def test_a_damaged_snapshot_is_made_anew(catalog: IndexCatalog, damage: str) -> None:
    vectors = clustered(30)
    add(catalog, vectors)
    synced(catalog, VectorTable(catalog.folder)).save()
    (path,) = catalog.folder.glob("vectors-*")
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(b"something else" * 100)
    table = synced(catalog, VectorTable(catalog.folder))
    assert [nearest(table, vector) for vector in vectors] == list(range(1, 31))


def test_a_later_state_than_the_rows_is_forgotten(catalog: IndexCatalog) -> None:
    """An older index.sqlite was put back: its next rows reuse the numbers of lost ones."""
    vectors = clustered(3)
    add(catalog, vectors[:1])
    catalog.close()
    backup = catalog.path.read_bytes()
    later = IndexCatalog(catalog.folder)
    add(later, vectors[1:2], prefix="lost ")
    synced(later, VectorTable(later.folder)).save()
    later.close()
    later.path.write_bytes(backup)

    again = IndexCatalog(catalog.folder)
    table = VectorTable(again.folder)
    table.forget_later(again.generation())
    assert list(again.folder.glob("vectors*")) == []
    add(again, vectors[2:], prefix="new ")
    assert nearest(synced(again, table), vectors[2]) == 2
    again.close()


def test_a_snapshot_is_read_by_faiss_itself(catalog: IndexCatalog) -> None:
    add(catalog, clustered(3))
    synced(catalog, VectorTable(catalog.folder)).save()
    assert faiss.read_index(str(catalog.folder / "vectors-1.faiss")).ntotal == 3
