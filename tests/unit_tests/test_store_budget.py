"""What a folder may hold, what is evicted for what is new, and what never is."""

from __future__ import annotations

import mmap
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store import (
    Budget,
    FolderStore,
    MemoryStore,
    RamTier,
    RemoteTier,
    open_store,
)
from kvlink_rag.store import record as record_module
from kvlink_rag.store.folder.catalog import BASE

pytestmark = pytest.mark.usefixtures("raw_folders")


def make_record(number: int, tokens: int = 4) -> ChunkKV:
    keys = torch.full((2, 1, tokens, 4), float(number))
    return ChunkKV((number,) * tokens, (), "model-a", keys, keys + 1)


def size_of_one(folder: Path, tokens: int = 4) -> int:
    store = FolderStore(folder / "one")
    store.put(make_record(0, tokens))
    nbytes = store.stat().nbytes
    store.close()
    return nbytes


def disk(store: FolderStore) -> int:
    return sum(path.stat().st_size for path in (store.path / "chunks").rglob("*") if path.is_file())


def held(store: FolderStore, records: list[ChunkKV]) -> list[int]:
    return [number for number, record in enumerate(records) if store.has(record.key)]


@pytest.fixture
def one(tmp_path: Path) -> int:
    return size_of_one(tmp_path)


@pytest.fixture
def three(tmp_path: Path, one: int) -> Iterator[FolderStore]:
    """Room for three."""
    store = FolderStore(tmp_path / "kv", budget=3 * one)
    yield store
    store.close()


def test_what_is_used_least_makes_room(three: FolderStore, one: int) -> None:
    records = [make_record(number) for number in range(4)]
    for record in records[:3]:
        three.put(record, ["a"])
    for record in (records[0], records[2]):
        assert three.get(record.key) is not None
    three.put(records[3], ["a"])
    assert held(three, records) == [0, 2, 3]
    assert three.stat().nbytes == disk(three) == 3 * one
    assert three.usage().evicted == 1
    assert three.verify().clean


def test_it_never_holds_more(three: FolderStore, one: int) -> None:
    for number in range(40):
        three.put(make_record(number, 4 + number % 3), [f"document {number}"])
        assert disk(three) == three.stat().nbytes <= 3 * one
        three.get(make_record(number // 2, 4 + number // 2 % 3).key)
    assert three.stat().entries >= 2
    assert three.verify().clean


def test_what_was_used_often_long_ago_goes_in_the_end(three: FolderStore) -> None:
    old = make_record(0)
    three.put(old)
    for _ in range(5):
        three.get(old.key)
    for number in range(1, 30):
        three.put(make_record(number))
    assert not three.has(old.key)


def test_what_saves_more_tokens_a_byte_stays(tmp_path: Path) -> None:
    def record(number: int, layers: int) -> ChunkKV:
        keys = torch.full((layers, 1, 4, 4), float(number))
        return ChunkKV((number,) * 4, (), f"model of {layers}", keys, keys)

    small, large, new = record(1, 1), record(2, 40), record(3, 1)
    store = FolderStore(tmp_path / "kv")
    for each in (small, large):
        store.put(each)
        store.get(each.key)
    store.set_budget(Budget(store.stat().nbytes))
    store.put(new)
    assert [store.has(each.key) for each in (small, large, new)] == [True, False, True]
    store.close()


def test_what_an_answer_is_made_from_is_not_evicted(three: FolderStore) -> None:
    records = [make_record(number) for number in range(8)]
    for record in records[:3]:
        three.put(record)
    found = three.get(records[0].key)
    for record in records[1:]:
        three.put(record)
    assert three.has(records[0].key)
    assert found is not None
    assert torch.equal(found.keys, records[0].keys)
    del found
    for record in records[1:]:
        three.get(record.key)
        three.put(record)
    assert not three.has(records[0].key)


def test_another_process_eviction_leaves_the_mapping(three: FolderStore) -> None:
    record = make_record(0)
    three.put(record)
    found = three.get(record.key)
    other = FolderStore(three.path)
    for number in range(1, 5):
        other.put(make_record(number))
    other.close()
    assert not three.has(record.key)
    assert found is not None
    assert torch.equal(found.keys, record.keys)
    assert torch.equal(found.values, record.values)


def test_evicted_while_it_is_being_opened(
    three: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened twice, and another process may come between."""
    record, opened = make_record(0), record_module._views
    three.put(record)

    def evict_and_open(*arguments: Any, **options: Any) -> Any:
        three.path_of(record.key).unlink()
        return opened(*arguments, **options)

    monkeypatch.setattr(record_module, "_views", evict_and_open)
    assert three.get(record.key) is None  # and no warning: it is not there
    monkeypatch.undo()
    three.put(record)
    assert three.get(record.key) is not None


def test_no_memory_to_map_a_file(three: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record(0)
    three.put(record)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.warns(KVLinkWarning, match="cannot read .*Cannot allocate memory"):
        assert three.get(record.key) is None
    monkeypatch.undo()
    assert three.get(record.key) is not None


def test_pinned_documents_stay(three: FolderStore) -> None:
    records = [make_record(number) for number in range(6)]
    three.pin(["kept"])
    three.put(records[0], ["kept"])
    three.put(records[1], ["other", "kept"])
    for record in records[2:]:
        three.put(record, ["other"])
    assert held(three, records) == [0, 1, 5]
    assert (three.pinned(), three.usage().pinned) == (["kept"], 2)
    three.unpin(["kept", "unknown"])
    three.put(records[2])
    three.put(records[3])
    assert len(held(three, records)) == 3
    assert set(held(three, records)) >= {2, 3}


def test_parts_are_pinned_with_their_document(three: FolderStore) -> None:
    records = [make_record(number) for number in range(7)]
    three.pin(["/a#b/kept.txt"])
    three.put(records[0], ["/a#b/kept.txt#1"])
    three.put(records[1], ["/a#b/kept.txt#2"])
    others = ["/a#b/kept.txt2", "/a#b/kept", "/a#b/kept.txt2#1", "kept.txt#1", "#"]
    for record, other in zip(records[2:], others, strict=True):
        three.put(record, [other])
    assert held(three, records) == [0, 1, 6]


def test_a_limit_for_documents_is_for_all_their_parts(tmp_path: Path, one: int) -> None:
    store = FolderStore(tmp_path / "kv", budget=Budget(document_bytes=2 * one))
    records = [make_record(number) for number in range(6)]
    for number, record in enumerate(records[:4]):
        store.put(record, [f"/a/one.txt#{number}"])
    store.put(records[4], ["/a/one.txt2#0"])
    store.put(records[5], ["/a/two.txt#0"])
    assert held(store, records) == [2, 3, 4, 5]
    store.close()


def test_no_room_beside_what_is_pinned(three: FolderStore, one: int) -> None:
    records = [make_record(number) for number in range(4)]
    three.pin(["kept"])
    for record in records[:3]:
        three.put(record, ["kept"])
    with pytest.raises(StoreError, match=f"the store may hold {3 * one}.*unpin"):
        three.put(records[3], ["other"])
    assert held(three, records) == [0, 1, 2]
    assert disk(three) == 3 * one  # nothing left behind
    assert three.references("other") == []
    assert three.verify().clean


def test_one_that_never_fits_evicts_nothing(three: FolderStore) -> None:
    three.put(make_record(0))
    with pytest.raises(StoreError, match="make chunks smaller"):
        three.put(make_record(1, 4000))
    assert three.has(make_record(0).key)
    assert three.verify().clean


def test_one_that_is_stored_again_needs_no_more_room(three: FolderStore) -> None:
    records = [make_record(number) for number in range(3)]
    for record in [*records, *records]:
        three.put(record)
    assert held(three, records) == [0, 1, 2]


def test_a_documents_share(tmp_path: Path, one: int) -> None:
    store = FolderStore(tmp_path / "kv", budget=Budget(document_bytes=2 * one))
    records = [make_record(number) for number in range(6)]
    for record in records[:4]:
        store.put(record, ["greedy"])
    for record in records[4:]:
        store.put(record, ["modest"])
    assert len(held(store, records[:4])) == 2
    assert store.has(records[3].key)
    assert held(store, records)[-2:] == [4, 5]
    store.refer([("greedy", records[4].key)])  # counts, too
    assert sum(store.has(key) for document, key in store.references("greedy")) == 2
    store.close()


def test_a_namespaces_share(tmp_path: Path, one: int) -> None:
    store = FolderStore(tmp_path / "kv", budget=Budget(9 * one, namespaces={"a/": 2 * one}))
    for number in range(5):
        store.put(make_record(number), [f"a/{number}"])
        store.put(make_record(10 + number), [f"b/{number}"])
    assert [sum(store.has(key) for _, key in store.references(name)) for name in ("a/", "b/")] == [
        2,
        5,
    ]
    store.close()


def test_the_budget_belongs_to_the_folder(three: FolderStore, one: int) -> None:
    other = FolderStore(three.path)
    assert other.budget == Budget(3 * one)
    for number in range(5):
        other.put(make_record(number))
    assert disk(three) == 3 * one
    other.set_budget(Budget(one))
    assert three.budget == Budget(one)
    assert disk(three) == one
    other.set_budget(Budget())
    for number in range(5):
        three.put(make_record(number))
    assert three.stat().entries == 5
    other.close()


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, 2**63])
def test_a_budget_is_a_number_of_bytes(bad: object) -> None:
    with pytest.raises(InputError, match="an int >= 1"):
        Budget(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="an int >= 1"):
        Budget(namespaces={"a": bad})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="no name"):
        Budget(namespaces={"": 1})


def test_usage(three: FolderStore, one: int) -> None:
    fresh = three.usage()
    assert (fresh.hit_rate, fresh.oldest, fresh.models) == (None, None, [])
    other = ChunkKV((9,), (), "model-b", torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    three.put(make_record(0))
    three.put(other)
    three.get(make_record(0).key)
    three.get(make_record(0).key)
    three.get(make_record(5).key)
    usage = three.usage()
    assert (usage.hits, usage.misses) == (2, 1)
    assert usage.hit_rate == pytest.approx(2 / 3)
    assert [(m.fingerprint, m.entries, m.tokens) for m in usage.models] == [
        ("model-a", 1, 4),
        ("model-b", 1, 1),
    ]
    assert usage.oldest is not None
    assert usage.last_used is not None
    assert usage.oldest <= usage.last_used


def test_misses_are_counted_until_it_is_stored(three: FolderStore) -> None:
    wanted, other = make_record(1), make_record(2)
    assert three.count_misses([wanted.key, other.key]) == [1, 1]
    assert three.count_misses([wanted.key]) == [2]
    again = FolderStore(three.path)
    assert again.count_misses([wanted.key]) == [3]
    again.put(wanted)
    assert again.count_misses([wanted.key, other.key]) == [1, 2]
    again.close()


def test_a_folder_of_the_first_version_is_brought_up_to_date(tmp_path: Path, one: int) -> None:
    path = tmp_path / "kv"
    store = FolderStore(path)
    for number in range(3):
        store.put(make_record(number), ["a"])
    store.close()
    new = sqlite3.connect(path / "catalog.sqlite")
    columns = "key, tokens, nbytes, fingerprint, created, last_used"
    rows = new.execute(f"SELECT {columns} FROM entries").fetchall()
    refs = new.execute("SELECT document, key FROM refs").fetchall()
    new.close()
    for file in path.glob("catalog.sqlite*"):
        file.unlink()
    old = sqlite3.connect(path / "catalog.sqlite")
    old.executescript(f"{BASE};")
    old.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)
    old.executemany("INSERT INTO refs VALUES (?, ?)", refs)
    old.execute("PRAGMA user_version = 1")
    old.commit()
    old.close()
    store = FolderStore(path)
    assert (store.stat().entries, store.stat().nbytes) == (3, 3 * one)
    assert len(store.references()) == 3
    store.set_budget(Budget(2 * one))
    assert store.stat().entries == 2
    assert store.verify().clean
    store.close()


@pytest.mark.parametrize("ram_bytes", [0, 10**6])
@pytest.mark.parametrize("remote", [None, "memory://budgets"])
def test_what_stands_before_a_folder_passes_it_on(
    tmp_path: Path, one: int, ram_bytes: int, remote: str | None
) -> None:
    """So that code does not change with the options of the store."""
    store = open_store(tmp_path / "kv", ram_bytes=ram_bytes, budget=2 * one, remote=remote)
    assert isinstance(store, (FolderStore, RamTier, RemoteTier))
    store.pin(["a"])
    for number, document in enumerate("ab"):
        store.put(make_record(number), [document])
    store.set_budget(Budget(one))
    assert store.budget == Budget(one)
    assert store.usage().pinned == 1
    assert store.stat().entries == 1
    assert store.pinned() == ["a"]
    store.unpin(["a"])
    assert store.pinned() == []
    store.close()


def test_memory_has_no_budget() -> None:
    with pytest.raises(InputError, match="MemoryStore has no budget"):
        RamTier(MemoryStore(), 1000).usage()


def test_what_memory_serves_is_in_use(tmp_path: Path, one: int) -> None:
    folder = FolderStore(tmp_path / "kv", budget=2 * one)
    store = RamTier(folder, 10**6)
    records = [make_record(number) for number in range(3)]
    for record in records[:2]:
        store.put(record, ["a"])
    assert store.get(records[0].key) is not None
    store.flush()  # now it is in memory
    for _ in range(5):
        assert store.get(records[0].key) is not None
    for _ in range(3):
        assert folder.get(records[1].key) is not None
    assert store.usage().hits == 9
    store.put(records[2], ["a"])
    assert held(folder, records) == [0, 2]
    store.close()
