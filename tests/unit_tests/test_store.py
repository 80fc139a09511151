"""What every store can do, and what a folder survives."""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store import (
    FolderStore,
    KVStore,
    MemoryStore,
    RamTier,
    RemoteTier,
    StoreStat,
    open_store,
)
from kvlink_rag.store.folder import files as files_module
from kvlink_rag.store.folder import uses as uses_module
from kvlink_rag.store.record import CorruptRecord, map_record

pytestmark = pytest.mark.usefixtures("raw_folders")

ABSENT = "0" * 64


def make_record(*token_ids: int, seed: int = 0) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn((2, 1, len(token_ids), 4), generator=generator)
    return ChunkKV(token_ids, (), "model-a", tensor, tensor + 1)


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVStore]:
    store = MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "kv")
    yield store
    store.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[FolderStore]:
    store = FolderStore(tmp_path / "kv")
    yield store
    store.close()


def file_of(store: FolderStore, record: ChunkKV) -> Path:
    return store.path / "chunks" / record.key[:2] / f"{record.key}.safetensors"


def all_files(store: FolderStore) -> list[Path]:
    return [path for path in (store.path / "chunks").rglob("*") if path.is_file()]


def test_what_is_put_is_got(store: KVStore) -> None:
    record = make_record(1, 2, 3)
    assert store.get(record.key) is None
    assert not store.has(record.key)
    store.put(record, ["document é 日本"])
    found = store.get(record.key)
    assert found is not None
    assert found.is_for("model-a", (), (1, 2, 3))
    assert torch.equal(found.keys, record.keys)
    assert torch.equal(found.values, record.values)
    assert store.has(record.key)


def test_a_file_of_a_killed_put_belongs_to_who_refers_to_it(folder: FolderStore) -> None:
    """Killed between the file's new name and the commit: a file without a row."""
    record = make_record(1, 2)
    folder.put(record, ["a"])
    with sqlite3.connect(folder.path / "catalog.sqlite") as catalog:
        catalog.execute("DELETE FROM entries")
        catalog.execute("DELETE FROM refs")
    assert folder.has(record.key)
    folder.refer([("b", record.key)])
    assert folder.prune().clean
    assert folder.get(record.key) is not None
    assert folder.references() == [("b", record.key)]
    assert folder.release(["b"]) == 1
    assert not folder.has(record.key)


def test_tensors_that_do_not_fit_are_refused(store: KVStore) -> None:
    bad = ChunkKV((1, 2), (), "m", torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    with pytest.raises(InputError):
        store.put(bad)
    assert not store.has(bad.key)


def test_an_entry_lasts_as_long_as_its_last_document(store: KVStore) -> None:
    record, other = make_record(1), make_record(2)
    store.put(record, ["a", "b"])
    store.refer([("c", record.key), ("c", record.key)])
    store.put(other, ["a"])
    assert store.release(["a", "unknown"]) == 1
    assert not store.has(other.key)
    assert store.release(["b"]) == 0
    assert store.has(record.key)
    assert store.release(["c"]) == 1
    assert store.get(record.key) is None
    assert store.stat() == StoreStat(0, 0, 0, 0, 0)


def test_release_keeps_what_it_is_told_to(store: KVStore) -> None:
    old, new = make_record(1), make_record(2)
    store.put(old, ["a"])
    store.put(new, ["a"])
    assert store.release(["a"], keep=[new.key]) == 1
    assert (store.has(old.key), store.has(new.key)) == (False, True)
    assert store.release(["a"]) == 1


def test_one_id_is_no_list_of_ids(store: KVStore) -> None:
    with pytest.raises(InputError, match="pass \\[id\\]"):
        store.release("a")


def test_a_reference_holds_before_its_entry_is_there(store: KVStore) -> None:
    record = make_record(1)
    store.refer([("a", record.key)])
    store.put(record)
    assert store.stat().unreferenced == 0
    assert store.release(["a"]) == 1


def test_references_are_listed(store: KVStore) -> None:
    first, second = make_record(1), make_record(2)
    store.put(first, ["a", "b"])
    store.put(second, ["a"])
    assert sorted(store.references()) == sorted(
        [("a", first.key), ("a", second.key), ("b", first.key)]
    )
    store.release(["a"])
    assert store.references() == [("b", first.key)]


def test_references_are_listed_by_the_start_of_the_document_id(store: KVStore) -> None:
    first, second = make_record(1), make_record(2)
    store.put(first, ["a:1", "a:2", "ab", "é"])
    store.put(second, ["a:1", "%a:1"])
    a = [("a:1", first.key), ("a:1", second.key), ("a:2", first.key)]
    rest = [("%a:1", second.key), ("ab", first.key), ("é", first.key)]
    assert sorted(store.references()) == sorted(a + rest)
    assert sorted(store.references("a:")) == sorted(a)
    assert store.references("é") == [("é", first.key)]
    assert store.references("none") == []
    store.release(["a:1"])
    assert sorted(store.references("a:")) == [("a:2", first.key)]


def test_stat_counts(store: KVStore) -> None:
    store.put(make_record(1, 2), ["a", "b"])
    store.put(make_record(3), [])
    store.put(make_record(3), [])
    stat = store.stat()
    assert (stat.entries, stat.tokens, stat.documents, stat.unreferenced) == (2, 3, 2, 1)
    assert stat.nbytes >= 3 * 2 * 2 * 4 * 4


def test_prune_removes_what_nobody_refers_to(store: KVStore) -> None:
    held, loose = make_record(1), make_record(2)
    store.put(held, ["a"])
    store.put(loose)
    assert store.verify().unreferenced == [loose.key]
    assert store.verify().clean
    assert store.has(loose.key)
    assert store.prune().unreferenced == [loose.key]
    assert (store.has(held.key), store.has(loose.key)) == (True, False)
    assert store.verify().unreferenced == []


def test_many_threads_may_use_it(store: KVStore) -> None:
    records = [make_record(number, number) for number in range(12)]
    wrong: list[object] = []

    def work(start: int) -> None:
        try:
            for record in records[start:] + records[:start]:
                store.put(record, [f"thread {start}"])
                found = store.get(record.key)
                if found is None or not torch.equal(found.keys, record.keys):
                    wrong.append(record)
            store.release([f"thread {start}"], keep=[records[0].key])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # a thread may read a record that the last other one has just released
    assert [item for item in wrong if not isinstance(item, ChunkKV)] == []
    assert store.stat().entries == 1
    assert store.verify().clean


def test_memory_does_not_keep_the_batch_alive() -> None:
    batch = torch.randn(2, 1, 1000, 4)
    store = MemoryStore()
    store.put(ChunkKV((1,), (), "m", batch[:, :, :1], batch[:, :, :1]))
    found = store.get(ChunkKV((1,), (), "m", batch, batch).key)
    assert found is not None
    assert found.keys.untyped_storage().nbytes() == found.keys.nbytes


def test_entries_last(folder: FolderStore) -> None:
    record = make_record(1, 2)
    folder.put(record, ["a"])
    before = folder.stat()
    folder.close()
    again = FolderStore(folder.path)
    assert again.has(record.key)
    assert again.get(record.key) is not None
    assert again.stat() == before
    again.close()


def test_a_closed_store_says_so(folder: FolderStore) -> None:
    folder.close()
    with pytest.raises(StoreError, match="closed"):
        folder.put(make_record(1))
    assert all_files(folder) == []


def test_nobody_else_may_read_it(folder: FolderStore) -> None:
    folder.put(make_record(1))
    for path in [folder.path, *folder.path.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("key", ["", "a", "A" * 64, "0" * 63 + "\n", "../" * 22, "0" * 63 + "/"])
def test_what_is_no_key_becomes_no_path(folder: FolderStore, key: str) -> None:
    for use in (folder.get, folder.has, lambda key: folder.refer([("a", key)])):
        with pytest.raises(InputError, match="no key"):
            use(key)


def damage(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.unlink()
    path.write_bytes(data)


def test_a_corrupt_file_is_dropped_with_a_warning(folder: FolderStore) -> None:
    record = make_record(1)
    folder.put(record, ["a"])
    damage(file_of(folder, record))
    with pytest.warns(KVLinkWarning, match=record.key):
        assert folder.get(record.key) is None
    assert not folder.has(record.key)
    assert folder.stat().entries == 0
    folder.put(record)  # computed anew: the document still refers to it
    assert folder.stat().unreferenced == 0
    assert folder.get(record.key) is not None


def test_a_record_under_another_name_is_corrupt(folder: FolderStore) -> None:
    record, other = make_record(1), make_record(2)
    folder.put(record)
    folder.put(other)
    os.replace(file_of(folder, record), file_of(folder, other))
    with pytest.warns(KVLinkWarning, match="another chunk"):
        assert folder.get(other.key) is None


def test_a_dropped_file_is_not_one_that_was_stored_anew(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(1)
    folder.put(record, ["a"])

    def damaged_once(path: Path, key: str, cipher: None) -> ChunkKV:
        monkeypatch.setattr(files_module, "map_record", map_record)
        raise CorruptRecord("another process replaces it right now")

    monkeypatch.setattr(files_module, "map_record", damaged_once)
    with pytest.warns(KVLinkWarning):
        assert folder.get(record.key) is None
    assert folder.get(record.key) is not None


def test_a_file_without_row_is_served_and_taken_in(folder: FolderStore) -> None:
    record = make_record(1, 2)
    folder.put(record)
    database = sqlite3.connect(folder.path / "catalog.sqlite")
    database.execute("DELETE FROM entries")
    database.commit()
    database.close()
    assert folder.verify().orphans == [str(file_of(folder, record))]
    assert folder.get(record.key) is not None
    stat = folder.stat()
    assert (stat.entries, stat.tokens) == (1, 2)
    assert stat.nbytes == file_of(folder, record).stat().st_size


def test_reading_does_not_write_the_catalog(folder: FolderStore) -> None:
    records = [make_record(number) for number in range(uses_module.TOUCHES)]
    for record in records:
        folder.put(record)
    database = sqlite3.connect(folder.path / "catalog.sqlite")

    def version() -> int:
        return int(database.execute("PRAGMA data_version").fetchone()[0])

    before = version()
    for record in records[:-1]:
        folder.get(record.key)
    assert version() == before
    folder.get(records[-1].key)  # enough are remembered
    assert version() != before
    database.close()


def test_reading_does_not_wait_for_a_writer(folder: FolderStore) -> None:
    record = make_record(1)
    folder.put(record)
    database = sqlite3.connect(folder.path / "catalog.sqlite", isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    folder._uses._asked = uses_module.TOUCHES  # the next one writes what is remembered
    assert folder.get(record.key) is not None  # a wait would take 30 s and the test's patience
    damage(file_of(folder, record))
    with pytest.warns(KVLinkWarning):
        assert folder.get(record.key) is None
    database.execute("ROLLBACK")
    database.close()


def test_last_use_is_remembered(folder: FolderStore) -> None:
    used, unused = make_record(1), make_record(2)
    folder.put(used)
    folder.put(unused)
    folder.get(used.key)
    folder.close()
    with sqlite3.connect(folder.path / "catalog.sqlite") as database:
        times = dict(database.execute("SELECT key, last_used FROM entries").fetchall())
    database.close()
    assert times[used.key] > times[unused.key]


def test_a_thousand_entries(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # not what is tested
    records = [make_record(number) for number in range(1000)]
    for number, record in enumerate(records):
        folder.put(record, [f"document {number}"])
    folder.close()
    again = FolderStore(folder.path)
    assert again.stat().entries == again.stat().documents == 1000
    assert all(again.has(record.key) for record in records)
    assert again.get(records[500].key) is not None
    assert again.release([f"document {number}" for number in range(1000)]) == 1000
    assert all_files(again) == []
    again.close()


class TestOpenStore:
    def test_by_what_a_user_names_it(self, tmp_path: Path) -> None:
        memory = open_store(None)
        assert isinstance(memory, MemoryStore)
        assert open_store(memory) is memory
        for name in (str(tmp_path / "a"), tmp_path / "b"):
            store = open_store(name)
            assert isinstance(store, FolderStore)
            assert isinstance(store, KVStore)
            store.close()

    def test_nothing_is_said_of_memory(self) -> None:
        assert isinstance(open_store(), MemoryStore)
        assert open_store().cache_after == 0

    @pytest.mark.parametrize("store", ["", 3])
    def test_other_things_are_refused(self, store: object) -> None:
        with pytest.raises(InputError):
            open_store(store)  # type: ignore[arg-type]

    @pytest.mark.parametrize("store", ["folder", None, "memory"])
    def test_the_codec_that_needs_a_model_is_refused(
        self, tmp_path: Path, store: str | None
    ) -> None:
        given = {"folder": tmp_path / "kv", None: None, "memory": MemoryStore()}[store]
        with pytest.raises(InputError, match="measured with a model") as error:
            open_store(given, codec="auto")
        for way in (
            "KVIndex.open(..., codec='auto')",
            "kvlink index --codec auto",
            "open_store(..., codec=choose_codec(engine).codec)",
            "kvlink_rag.tuning.codec.choose_codec",
        ):
            assert way in str(error.value)
        assert not (tmp_path / "kv").exists()

    def test_a_store_that_hands_on_what_it_is_asked(self) -> None:
        class Counted:
            def __init__(self) -> None:
                self.store, self.got = MemoryStore(), 0

            def __getattr__(self, name: str) -> object:
                return getattr(self.store, name)

            def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
                self.got += 1
                return self.store.get(key, within_s)

        counted = Counted()
        store = open_store(counted)  # type: ignore[arg-type]
        assert store is counted
        assert store.get(ABSENT) is None
        assert counted.got == 1

    def test_what_a_store_lacks_is_named(self) -> None:
        class Half:
            codec, cache_after, close, get, has, prune, put, references = (None,) * 8

        with pytest.raises(InputError) as refused:
            open_store(Half())  # type: ignore[arg-type]
        assert str(refused.value) == (
            "store is a Half without refer, release, count_misses, stat, verify: "
            "pass a folder, a KVStore or None"
        )


class TestCacheAfter:
    def test_every_kind_of_store_has_it(self, tmp_path: Path) -> None:
        for number, (arguments, kind) in enumerate(
            [
                ({"store": None}, MemoryStore),
                ({"store": tmp_path / "a"}, FolderStore),
                ({"store": tmp_path / "b", "ram_bytes": 1000}, RamTier),
                ({"store": tmp_path / "c", "remote": f"file://{tmp_path}/kv"}, RemoteTier),
                (
                    {"store": tmp_path / "d", "remote": f"file://{tmp_path}/kv", "ram_bytes": 1},
                    RamTier,
                ),
            ]
        ):
            for after in (0, number + 1):
                store = open_store(**arguments, cache_after=after)  # type: ignore[arg-type]
                assert isinstance(store, kind)
                assert isinstance(store, KVStore)
                assert store.cache_after == after
                store.close()

    def test_it_is_of_the_object_and_not_of_the_folder(self, tmp_path: Path) -> None:
        first, second = open_store(tmp_path, cache_after=2), open_store(tmp_path)
        assert (first.cache_after, second.cache_after) == (2, 0)
        first.close()
        second.close()

    @pytest.mark.parametrize("bad", [-1, 1.0, "1", True, None])
    def test_other_numbers_are_refused(self, tmp_path: Path, bad: object) -> None:
        for make in (
            lambda: open_store(tmp_path / "kv", cache_after=bad),  # type: ignore[arg-type]
            lambda: open_store(MemoryStore(), cache_after=bad),  # type: ignore[arg-type]
            lambda: FolderStore(tmp_path / "kv", cache_after=bad),  # type: ignore[arg-type]
            lambda: MemoryStore(cache_after=bad),  # type: ignore[arg-type]
        ):
            with pytest.raises(InputError, match=r"cache_after is .*: pass 0 .* retrievals"):
                make()
        assert not (tmp_path / "kv").exists()

    def test_a_store_keeps_its_own(self) -> None:
        store = MemoryStore(cache_after=2)
        assert open_store(store) is store
        assert open_store(store, cache_after=2) is store
        with pytest.raises(InputError, match="opened with 2; leave it out, or open the folder"):
            open_store(store, cache_after=1)
        assert store.cache_after == 2


def test_prompts_at_a_time_share_one_mapping_of_a_file(folder: FolderStore) -> None:
    record = make_record(1, 2, 3)
    folder.put(record)
    one, other = folder.get(record.key), folder.get(record.key)
    assert one is other
    del one, other
    gc.collect()
    assert folder.get(record.key) is not None


def test_threads_at_a_time_share_one_mapping(folder: FolderStore) -> None:
    record = make_record(1, 2, 3)
    folder.put(record)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(folder.get, [record.key] * 40))
    assert len({id(each) for each in found}) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_made_while_another_thread_counts(folder: FolderStore) -> None:
    record = make_record(1)
    folder.put(record)
    folder.get(record.key)
    with folder._uses._lock:  # as that thread holds it
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            found = folder.get(record.key)
            folder.close()
            os._exit(0 if found is not None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert folder.usage().hits == 2  # of each its own


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_reads_whatever_threads_did_when_it_was_made(folder: FolderStore) -> None:
    record = make_record(1, 2, 3)
    folder.put(record)
    for lock in folder._files._locks:
        lock.acquire()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if folder.get(record.key) is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    folder._files._new_locks()


@pytest.mark.parametrize("again", [True, False], ids=["as if unchanged", "later"])
def test_a_shared_mapping_is_verified_each_time(folder: FolderStore, again: bool) -> None:
    record = make_record(1, 2, 3)
    folder.put(record)
    held = folder.get(record.key)
    path = file_of(folder, record)
    before = path.stat()
    damage(path)
    if again:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.warns(KVLinkWarning, match="checksum"):
        assert folder.get(record.key) is None
    assert held is not None


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_file_that_is_shortened_while_it_is_held_is_read_anew(
    folder: FolderStore, keep: int
) -> None:
    record = make_record(1, 2, 3)
    folder.put(record)
    held = folder.get(record.key)
    path = file_of(folder, record)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.warns(KVLinkWarning, match="dropped"):
        assert folder.get(record.key) is None
    assert held is not None


def test_mappings_that_nobody_holds_are_forgotten(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAPPED", 3)
    records = [make_record(number) for number in range(8)]
    for record in records:
        folder.put(record)
    held = folder.get(records[0].key)
    for record in records[1:]:
        assert folder.get(record.key) is not None
    assert len(folder._files._mapped) <= 4
    assert folder.get(records[0].key) is held
