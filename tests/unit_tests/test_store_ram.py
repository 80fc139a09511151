"""Recently used chunk caches in memory: what is kept, for how long, and what never is."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store import FolderStore, KVStore, MemoryStore, RamTier, open_store
from kvlink_rag.store import ram as ram_module

pytestmark = pytest.mark.usefixtures("raw_folders")

PATIENCE_S = 60.0


def make_record(*token_ids: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(token_ids))
    tensor = torch.randn((2, 1, len(token_ids), 4), generator=generator).to(dtype)
    return ChunkKV(token_ids, (9, 8), "model-a", tensor, tensor + 1)


SIZE = make_record(1).nbytes
"""Of a record of one token."""


def same(found: ChunkKV | None, record: ChunkKV) -> bool:
    return (
        found is not None
        and found.is_for(record.fingerprint, record.behind, record.token_ids)
        and torch.equal(found.keys, record.keys)
        and torch.equal(found.values, record.values)
        and found.keys.dtype == record.keys.dtype
    )


@pytest.fixture(params=["memory", "folder"])
def below(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KVStore]:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # not what is tested
    store = MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "kv")
    yield store
    store.close()


class Asked:
    """Keys that the store below was asked for; it may be made to wait before it gives its find."""

    def __init__(self, store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.wait: Callable[[], object] = lambda: None
        get = store.get

        def asked(key: str, within_s: float | None = None) -> ChunkKV | None:
            self.keys.append(key)
            found = get(key)
            self.wait()
            return found

        monkeypatch.setattr(store, "get", asked)


class Copies:
    """Keys that were copied; copying waits while ``gate`` is not set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        copied = ram_module._copied

        def copy(request: ram_module._Request) -> ChunkKV | None:
            self.keys.append(request.key)
            self.begun.release()
            assert self.gate.wait(PATIENCE_S)
            return copied(request)

        monkeypatch.setattr(ram_module, "_copied", copy)

    def wait_for_one(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE_S)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    copies = Copies(monkeypatch)
    yield copies
    copies.gate.set()


def in_threads(work: Callable[[int], object], number: int) -> None:
    """Run ``work(0)``, ``work(1)`` ... at once, and raise the first of their errors."""
    errors: list[BaseException] = []

    def guarded(place: int) -> None:
        try:
            work(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def get_all(tier: RamTier, records: Iterable[ChunkKV]) -> None:
    """Read one after the other, so that they are kept in this order."""
    for record in records:
        assert same(tier.get(record.key), record)
        tier.flush()


def kept(tier: RamTier) -> list[str]:
    return list(tier._kept)


class TestGet:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_the_second_time_from_memory(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        record = make_record(1, 2, 3, dtype=dtype)
        below.put(record)
        asked = Asked(below, monkeypatch)
        tier = RamTier(below, 1 << 20)
        first = tier.get(record.key)
        assert same(first, record)
        tier.flush()
        second = tier.get(record.key)
        assert same(second, record)
        assert second is not None
        assert second.key == record.key
        assert tier.get(record.key) is second
        assert asked.keys == [record.key]
        assert (tier.hits, tier.misses, tier.nbytes) == (2, 1, record.nbytes)

    def test_what_is_found_below_is_given_back_as_it_is(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = make_record(1)
        monkeypatch.setattr(below, "get", lambda key, within_s: record)
        assert RamTier(below, 1 << 20).get(record.key) is record

    def test_the_copy_has_memory_of_its_own(self, below: KVStore) -> None:
        record = make_record(1, 2)
        below.put(record)
        tier = RamTier(below, 1 << 20)
        first = tier.get(record.key)
        tier.flush()
        copy = tier.get(record.key)
        assert first is not None
        assert copy is not None
        for old, new in ((first.keys, copy.keys), (first.values, copy.values)):
            assert new.is_contiguous()
            assert new.untyped_storage().nbytes() == new.nbytes
            assert new.data_ptr() != old.data_ptr()
            old.zero_()
        assert same(copy, make_record(1, 2))

    def test_parts_of_a_larger_tensor_are_copied_whole(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = torch.randn(2, 3, 7, 4, requires_grad=True)
        record = ChunkKV((1, 2), (), "m", batch[:, 1:, 2:4], batch.mT[:, 1:, 1:3])
        below = MemoryStore()
        monkeypatch.setattr(below, "get", lambda key, within_s: record)
        tier = RamTier(below, 1 << 20)
        tier.get(record.key)
        tier.flush()
        copy = tier.get(record.key)
        assert copy is not record
        assert same(copy, record)
        assert copy is not None
        assert copy.keys.untyped_storage().nbytes() == copy.keys.nbytes
        assert not copy.keys.requires_grad

    def test_what_is_nowhere_is_none_and_found_once_it_is_stored(self, below: KVStore) -> None:
        record = make_record(1)
        tier = RamTier(below, 1 << 20)
        assert tier.get(record.key) is None
        assert not tier.has(record.key)
        tier.flush()
        tier.put(record)
        assert tier.has(record.key)
        get_all(tier, [record])
        assert kept(tier) == [record.key]

    def test_an_error_below_is_raised_and_the_next_try_is_kept(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = make_record(1)
        below.put(record)
        tier = RamTier(below, 1 << 20)

        def broken(key: str, within_s: float | None) -> ChunkKV | None:
            raise StoreError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(below, "get", broken)
            with pytest.raises(StoreError, match="disk is gone"):
                tier.get(record.key)
        get_all(tier, [record])
        assert kept(tier) == [record.key]

    def test_a_copy_that_memory_does_not_suffice_for_is_not_made(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(tensor: torch.Tensor) -> torch.Tensor:
            raise MemoryError

        first, second = make_record(1), make_record(2)
        below.put(first)
        below.put(second)
        tier = RamTier(below, 1 << 20)
        with monkeypatch.context() as patch:
            patch.setattr(ram_module, "_own", full)
            get_all(tier, [first, second])
        assert tier.nbytes == 0
        get_all(tier, [first, second])
        assert kept(tier) == [first.key, second.key]

    def test_without_a_thread_nothing_is_kept(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        record = make_record(1)
        below.put(record)
        tier = RamTier(below, 1 << 20)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            get_all(tier, [record])
        assert tier.nbytes == 0
        get_all(tier, [record])
        assert kept(tier) == [record.key]


class TestFiles:
    def test_a_file_overwritten_later_does_not_matter(self, tmp_path: Path) -> None:
        record = make_record(*range(1, 2000))
        tier = RamTier(FolderStore(tmp_path), 1 << 20)
        tier.put(record, ["a"])
        tier.get(record.key)
        tier.flush()
        [file] = (tmp_path / "chunks").rglob("*.safetensors")
        with open(file, "r+b") as stream:  # in place, as seen through any mapping of it
            stream.write(b"\xff" * file.stat().st_size)
        assert same(tier.get(record.key), record)
        with open(file, "r+b") as stream:
            stream.truncate(10)
        assert same(tier.get(record.key), record)
        with pytest.warns(KVLinkWarning, match=record.key):
            assert FolderStore(tmp_path).get(record.key) is None
        assert same(tier.get(record.key), record)
        tier.close()

    def test_prune_of_a_corrupt_file_forgets_it(self, tmp_path: Path) -> None:
        record, other = make_record(1), make_record(2)
        tier = RamTier(FolderStore(tmp_path), 1 << 20)
        tier.put(record, ["a"])
        tier.put(other, ["a"])
        get_all(tier, [record, other])
        [file] = (tmp_path / "chunks").rglob(f"{record.key}.safetensors")
        file.write_bytes(b"damaged")
        assert tier.verify().corrupt == [str(file)]
        assert tier.prune().corrupt == [str(file)]
        assert tier.get(record.key) is None
        assert kept(tier) == [other.key]
        tier.close()

    def test_progress_reaches_the_folder(self, tmp_path: Path) -> None:
        tier = RamTier(FolderStore(tmp_path), 1)
        tier.put(make_record(1), ["a"])
        seen: list[tuple[int, int]] = []
        assert tier.verify(lambda done, total: seen.append((done, total))).checked == 1
        assert tier.prune(progress=lambda done, total: seen.append((done, total))).checked == 1
        assert seen == [(1, 1), (1, 1)]
        tier.close()

    def test_what_is_no_key_is_refused(self, tmp_path: Path) -> None:
        tier = RamTier(FolderStore(tmp_path), 1)
        for use in (tier.get, tier.has):
            with pytest.raises(InputError, match="no key"):
                use("../etc")
        tier.close()


class TestBound:
    def test_the_least_recently_used_one_makes_room(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b, c, d = records = [make_record(number) for number in range(1, 5)]
        for record in records:
            below.put(record)
        tier = RamTier(below, 3 * SIZE)
        get_all(tier, [a, b, c])
        assert kept(tier) == [a.key, b.key, c.key]
        tier.get(a.key)
        assert kept(tier) == [b.key, c.key, a.key]
        get_all(tier, [d])
        assert kept(tier) == [c.key, a.key, d.key]
        assert tier.nbytes == 3 * SIZE
        asked = Asked(below, monkeypatch)
        get_all(tier, [c, a, d])
        assert asked.keys == []
        get_all(tier, [b])
        assert asked.keys == [b.key]

    def test_a_large_one_makes_several_others_go(self, below: KVStore) -> None:
        small = [make_record(number) for number in (1, 2, 3)]
        large = make_record(4, 5)
        for record in [*small, large]:
            below.put(record)
        tier = RamTier(below, 3 * SIZE)
        get_all(tier, [*small, large])
        assert kept(tier) == [small[2].key, large.key]
        assert tier.nbytes == 3 * SIZE

    def test_it_is_met_to_the_byte(self, below: KVStore) -> None:
        records = [make_record(number) for number in (1, 2, 3)]
        for record in records:
            below.put(record)
        exact, less = RamTier(below, 3 * SIZE), RamTier(below, 3 * SIZE - 1)
        get_all(exact, records)
        get_all(less, records)
        assert (exact.nbytes, less.nbytes) == (3 * SIZE, 2 * SIZE)

    def test_one_that_does_not_fit_drops_nothing(self, below: KVStore, copies: Copies) -> None:
        small, fitting, large = make_record(1), make_record(2, 3), make_record(4, 5, 6)
        for record in (small, fitting, large):
            below.put(record)
        tier = RamTier(below, 2 * SIZE)
        get_all(tier, [small, large])
        assert kept(tier) == [small.key]
        get_all(tier, [fitting])
        assert kept(tier) == [fitting.key]
        assert copies.keys == [small.key, fitting.key]

    def test_it_holds_while_a_copy_is_made(self, below: KVStore, copies: Copies) -> None:
        old, new = make_record(1, 2), make_record(3)
        below.put(old)
        below.put(new)
        tier = RamTier(below, 2 * SIZE)
        get_all(tier, [old])
        copies.wait_for_one()
        copies.gate.clear()
        tier.get(new.key)
        copies.wait_for_one()
        assert tier.nbytes == 0  # room was made before the copy
        copies.gate.set()
        tier.flush()
        assert kept(tier) == [new.key]

    def test_it_holds_under_threads(self, below: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
        records = [make_record(*range(first, first + 1 + first % 4)) for first in range(1, 30)]
        for record in records:
            below.put(record, ["a"])
        tier = RamTier(below, 11 * SIZE)
        most = 0
        copied = ram_module._copied

        def measured(request: ram_module._Request) -> ChunkKV | None:
            nonlocal most
            copy = copied(request)
            assert copy is not None
            with tier._changed:
                held = sum(record.nbytes for record in tier._kept.values())
            most = max(most, held + copy.nbytes)
            return copy

        monkeypatch.setattr(ram_module, "_copied", measured)

        def work(seed: int) -> None:
            choice = random.Random(seed)
            for _ in range(300):
                record = choice.choice(records)
                assert same(tier.get(record.key), record)
                assert tier.nbytes <= tier.max_bytes

        in_threads(work, 4)
        tier.flush()
        assert 8 * SIZE < most <= tier.max_bytes
        assert tier.nbytes == sum(record.nbytes for record in tier._kept.values())
        assert tier.hits + tier.misses == 4 * 300

    def test_a_full_queue_makes_nobody_wait(
        self, below: KVStore, copies: Copies, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ram_module, "QUEUE", 2)
        records = [make_record(number) for number in range(1, 7)]
        for record in records:
            below.put(record)
        tier = RamTier(below, 1 << 20)
        copies.gate.clear()
        tier.get(records[0].key)
        copies.wait_for_one()
        for record in records[1:]:
            assert same(tier.get(record.key), record)
        copies.gate.set()
        tier.flush()
        assert kept(tier) == [record.key for record in records[:3]]  # being made, and two waiting
        get_all(tier, records[3:])
        assert kept(tier) == [record.key for record in records]

    def test_a_key_waits_only_once(self, below: KVStore, copies: Copies) -> None:
        first, second = make_record(1), make_record(2)
        below.put(first)
        below.put(second)
        tier = RamTier(below, 1 << 20)
        copies.gate.clear()
        for _ in range(3):
            tier.get(first.key)
            tier.get(second.key)
        copies.gate.set()
        tier.flush()
        assert copies.keys == [first.key, second.key]


class TestChanges:
    def test_put_keeps_nothing(self, below: KVStore) -> None:
        record = make_record(1)
        tier = RamTier(below, 1 << 20)
        tier.put(record, ["a"])
        tier.flush()
        assert tier.nbytes == 0
        assert below.references() == [("a", record.key)]
        assert same(below.get(record.key), record)

    def test_put_replaces_what_is_kept(self, below: KVStore) -> None:
        old, new = make_record(1, seed=0), make_record(1, seed=1)
        assert old.key == new.key
        tier = RamTier(below, 1 << 20)
        tier.put(old)
        get_all(tier, [old])
        tier.put(new)
        get_all(tier, [new, new])

    def test_put_replaces_what_is_being_copied(self, below: KVStore, copies: Copies) -> None:
        old, new = make_record(1, seed=0), make_record(1, seed=1)
        tier = RamTier(below, 1 << 20)
        tier.put(old)
        copies.gate.clear()
        tier.get(old.key)
        copies.wait_for_one()
        tier.put(new)
        copies.gate.set()
        tier.flush()
        assert tier.nbytes == 0
        get_all(tier, [new, new])

    def test_an_error_of_put_is_raised_and_nothing_is_kept(self, below: KVStore) -> None:
        bad = ChunkKV((1, 2), (), "m", torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
        tier = RamTier(below, 1 << 20)
        with pytest.raises(InputError):
            tier.put(bad)
        tier.flush()
        assert not tier.has(bad.key)
        assert tier.get(bad.key) is None
        assert tier.nbytes == 0

    def test_release_forgets_what_was_removed_and_only_that(self, below: KVStore) -> None:
        gone, shared, told = make_record(1), make_record(2), make_record(3)
        tier = RamTier(below, 1 << 20)
        tier.put(gone, ["a"])
        tier.put(shared, ["a"])
        tier.put(told, ["a"])
        tier.refer([("b", shared.key)])
        get_all(tier, [gone, shared, told])
        assert tier.release(["a"], keep=[told.key]) == 1
        assert tier.get(gone.key) is None
        assert not tier.has(gone.key)
        assert kept(tier) == [shared.key, told.key]
        assert tier.nbytes == 2 * SIZE
        assert tier.references() == below.references()
        assert tier.references("b") == [("b", shared.key)]

    def test_prune_forgets_what_was_removed_and_only_that(self, below: KVStore) -> None:
        held, loose = make_record(1), make_record(2)
        tier = RamTier(below, 1 << 20)
        tier.put(held, ["a"])
        tier.put(loose)
        get_all(tier, [held, loose])
        assert tier.verify().unreferenced == [loose.key]
        assert tier.prune().unreferenced == [loose.key]
        assert tier.get(loose.key) is None
        assert kept(tier) == [held.key]
        assert tier.stat() == below.stat()
        assert tier.stat().entries == 1

    @pytest.mark.parametrize("change", ["release", "prune"])
    def test_a_change_that_fails_half_way_forgets_too(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        record = make_record(1)
        tier = RamTier(below, 1 << 20)
        tier.put(record, ["a"])
        get_all(tier, [record])
        release = below.release

        def half(*ignored: object) -> int:
            release(["a"])
            raise StoreError("the disk is gone")

        monkeypatch.setattr(below, change, half)
        with pytest.raises(StoreError, match="disk is gone"):
            tier.release(["a", "b"]) if change == "release" else tier.prune()
        assert tier.get(record.key) is None

    @pytest.mark.parametrize("change", ["release", "prune"])
    def test_what_is_removed_before_its_copy_is_made(
        self, below: KVStore, copies: Copies, change: str
    ) -> None:
        making, waiting, stays = (make_record(number) for number in (1, 2, 3))
        tier = RamTier(below, 1 << 20)
        tier.put(making, ["a"] if change == "release" else [])
        tier.put(waiting, ["a"] if change == "release" else [])
        tier.put(stays, ["b"])
        copies.gate.clear()
        tier.get(making.key)
        copies.wait_for_one()
        tier.get(waiting.key)
        tier.get(stays.key)
        if change == "release":
            assert tier.release(["a"]) == 2
        else:
            assert len(tier.prune().unreferenced) == 2
        copies.gate.set()
        tier.flush()
        assert tier.get(making.key) is None
        assert tier.get(waiting.key) is None
        assert kept(tier) == [stays.key]
        assert copies.keys == [making.key, stays.key]

    def test_what_is_removed_while_it_is_read(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = make_record(1)
        tier = RamTier(below, 1 << 20)
        tier.put(record, ["a"])
        asked = Asked(below, monkeypatch)
        asked.wait = lambda: tier.release(["a"])  # found, but not given back yet
        assert same(tier.get(record.key), record)
        tier.flush()
        asked.wait = lambda: None
        assert tier.nbytes == 0
        assert tier.get(record.key) is None

    def test_what_is_replaced_while_it_is_read(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = make_record(1, seed=0), make_record(1, seed=1)
        tier = RamTier(below, 1 << 20)
        tier.put(old)
        asked = Asked(below, monkeypatch)
        asked.wait = lambda: tier.put(new)
        assert tier.get(old.key) is not None
        tier.flush()
        asked.wait = lambda: None
        get_all(tier, [new, new])

    def test_threads_never_get_what_was_released(self, below: KVStore) -> None:
        records = [make_record(number) for number in range(1, 9)]
        tier = RamTier(below, 5 * SIZE)

        def work(place: int) -> None:
            choice = random.Random(place)
            if place >= 2:  # reads whatever there is
                for _ in range(600):
                    record = choice.choice(records)
                    found = tier.get(record.key)
                    assert found is None or same(found, record)
            else:  # writes a half of its own
                for _ in range(100):
                    record = choice.choice(records[place::2])
                    tier.put(record, [record.key[:8]])
                    assert same(tier.get(record.key), record)
                    assert tier.release([record.key[:8]]) == 1
                    assert tier.get(record.key) is None

        in_threads(work, 4)
        tier.flush()
        assert tier.nbytes == 0
        assert tier.stat().entries == 0


class Model:
    """What a tier over a store should do, one plain dictionary for each thing it knows."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stored: dict[str, ChunkKV] = {}
        self.references: set[tuple[str, str]] = set()
        self.kept: OrderedDict[str, int] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: str) -> ChunkKV | None:
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
            return self.stored[key]
        self.misses += 1
        found = self.stored.get(key)
        if found is not None and found.nbytes <= self.max_bytes:
            while sum(self.kept.values()) + found.nbytes > self.max_bytes:
                self.kept.popitem(last=False)
            self.kept[key] = found.nbytes
        return found

    def put(self, record: ChunkKV, documents: list[str]) -> None:
        self.stored[record.key] = record
        self.references |= {(document, record.key) for document in documents}
        self.kept.pop(record.key, None)

    def release(self, documents: list[str], keep: list[str]) -> int:
        lost = {pair for pair in self.references if pair[0] in documents and pair[1] not in keep}
        self.references -= lost
        return self._remove({key for _, key in lost} - {key for _, key in self.references})

    def prune(self) -> int:
        return self._remove(self.stored.keys() - {key for _, key in self.references})

    def _remove(self, keys: Iterable[str]) -> int:
        gone = [key for key in keys if key in self.stored]
        for key in gone:
            del self.stored[key]
            self.kept.pop(key, None)
        return len(gone)


DEEDS = {"get": 65, "has": 8, "put": 15, "refer": 3, "release": 8, "prune": 1}
"""How often each is done, in percent."""


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_in_whatever_order(below: KVStore, seed: int) -> None:
    choice = random.Random(seed)
    token_ids = [tuple(range(first, first + 1 + first % 5)) for first in range(1, 9)]
    keys = [make_record(*ids).key for ids in token_ids]
    documents = ["a", "b", "c", "d"]
    model, tier = Model(9 * SIZE // 2), RamTier(below, 9 * SIZE // 2)

    def some(items: list[str]) -> list[str]:
        return choice.sample(items, choice.randint(0, 2))

    for step in range(400):
        [deed] = choice.choices(list(DEEDS), list(DEEDS.values()))
        match deed:
            case "get":
                key = choice.choice(keys)
                expected, found = model.get(key), tier.get(key)
                tier.flush()
                assert same(found, expected) if expected is not None else found is None
            case "has":
                key = choice.choice(keys)
                assert tier.has(key) == (key in model.stored)
            case "put":
                record = make_record(*choice.choice(token_ids), seed=step)
                owners = some(documents)
                model.put(record, owners)
                tier.put(record, owners)
            case "refer" if model.stored:
                pairs = [
                    (document, choice.choice(list(model.stored))) for document in some(documents)
                ]
                model.references |= set(pairs)
                tier.refer(pairs)
            case "release":
                owners, stay = some(documents), some(keys)
                assert tier.release(owners, keep=stay) == model.release(owners, stay)
            case "prune":
                assert len(tier.prune().unreferenced) == model.prune()
        assert kept(tier) == list(model.kept)
        assert tier.nbytes == sum(model.kept.values()) <= tier.max_bytes
        assert (tier.hits, tier.misses) == (model.hits, model.misses)
    assert sorted(tier.references()) == sorted(model.references)
    assert tier.stat().entries == len(model.stored)
    assert model.hits > 20


class TestEnd:
    def test_close_lets_go_and_may_be_repeated(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = make_record(1)
        closed: list[bool] = []
        tier = RamTier(below, 1 << 20)
        tier.put(record, ["a"])
        get_all(tier, [record])
        close = below.close

        def closing() -> None:
            closed.append(True)
            close()

        monkeypatch.setattr(below, "close", closing)
        thread = tier._thread
        assert thread is not None
        tier.close()
        tier.close()
        tier.flush()
        assert closed == [True]
        assert tier.nbytes == 0
        assert not thread.is_alive()

    def test_a_closed_tier_keeps_nothing(self, tmp_path: Path) -> None:
        record = make_record(1)
        tier = RamTier(FolderStore(tmp_path), 1 << 20)
        tier.put(record, ["a"])
        tier.close()
        tier.get(record.key)
        tier.flush()
        assert tier.nbytes == 0
        with pytest.raises(StoreError, match="closed"):
            tier.put(record)

    def test_close_does_not_wait_for_the_queue(self, below: KVStore, copies: Copies) -> None:
        records = [make_record(number) for number in (1, 2, 3)]
        tier = RamTier(below, 1 << 20)
        for record in records:
            tier.put(record)
        copies.gate.clear()
        for record in records:
            tier.get(record.key)
        copies.wait_for_one()
        closing = threading.Thread(target=tier.close)
        closing.start()
        while not tier._stopped:
            time.sleep(0.001)
        copies.gate.set()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert copies.keys == [records[0].key]
        assert tier.nbytes == 0

    def test_the_thread_ends_when_idle_and_starts_again(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ram_module, "IDLE_S", 0.01)
        tier = RamTier(below, 1 << 20)
        for number in (1, 2):
            tier.put(make_record(number))
            tier.get(make_record(number).key)
            if (thread := tier._thread) is not None:  # None: already done and gone
                assert thread.daemon
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
            assert len(kept(tier)) == number

    def test_a_forgotten_tier_is_no_leak(
        self, below: KVStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ram_module, "IDLE_S", 0.01)
        record = make_record(1)
        tier = RamTier(below, 1 << 20)
        tier.put(record)
        tier.get(record.key)
        thread = tier._thread
        gone = weakref.ref(tier)
        del tier
        if thread is not None:
            thread.join(PATIENCE_S)
        gc.collect()
        assert gone() is None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_a_forked_process_keeps_and_goes_on(self, below: KVStore, copies: Copies) -> None:
        old, new, waiting = (make_record(number) for number in (1, 2, 3))
        tier = RamTier(below, 1 << 20)
        for record in (old, new, waiting):
            tier.put(record)
        get_all(tier, [old])
        copies.wait_for_one()
        copies.gate.clear()
        tier.get(waiting.key)
        copies.wait_for_one()  # a copy is being made,
        held, fork = threading.Event(), threading.Event()

        def hold() -> None:
            with tier._changed:
                held.set()
                assert fork.wait(PATIENCE_S)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(PATIENCE_S)  # and a thread that the child will not have holds the lock
        pid = os.fork()
        if pid == 0:
            os._exit(in_child(tier, copies, old, new, waiting))
        fork.set()
        holder.join(PATIENCE_S)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        copies.gate.set()
        tier.flush()
        assert kept(tier) == [old.key, waiting.key]

    def test_a_process_may_end_while_a_copy_is_made(self, tmp_path: Path) -> None:
        store = FolderStore(tmp_path)
        store.put(make_record(*range(300)))
        store.close()
        done = subprocess.run(
            [sys.executable, "-c", ENDS_EARLY, str(tmp_path), make_record(*range(300)).key],
            env={**os.environ, "PYTHONPATH": str(Path(ram_module.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def in_child(tier: RamTier, copies: Copies, old: ChunkKV, new: ChunkKV, waiting: ChunkKV) -> int:
    """Exit code of a forked process: 0 when the tier works there."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(PATIENCE_S))  # ends the process where it would wait for ever
    try:
        copies.gate = threading.Event()
        copies.gate.set()
        assert tier.nbytes == SIZE
        hits = tier.hits
        assert same(tier.get(old.key), old)
        assert tier.hits == hits + 1
        get_all(tier, [new, waiting])
        assert kept(tier) == [old.key, new.key, waiting.key]
        tier.close()
        return 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        return 1


ENDS_EARLY = """
import sys, threading
from kvlink_rag.store import FolderStore, RamTier, ram

begun = threading.Event()

def long(tensor):
    begun.set()
    for _ in range(20_000):
        copy = tensor.clone()
    return copy

ram._own = long
RamTier(FolderStore(sys.argv[1]), 1 << 30).get(sys.argv[2])
begun.wait()
"""


class TestSettings:
    @pytest.mark.parametrize("max_bytes", [0, -1, 1.5, "1", None, True])
    def test_a_bound_is_a_positive_int(self, max_bytes: object) -> None:
        with pytest.raises(InputError, match=rf"max_bytes is {max_bytes!r}.*an int >= 1"):
            RamTier(MemoryStore(), max_bytes)  # type: ignore[arg-type]

    def test_it_is_a_store(self) -> None:
        tier = RamTier(MemoryStore(), 1)
        assert isinstance(tier, KVStore)
        assert open_store(tier, ram_bytes=5) is tier

    def test_open_store_wraps_a_folder_only(self, tmp_path: Path) -> None:
        record = make_record(1)
        for name in (str(tmp_path / "a"), tmp_path / "b"):
            store = open_store(name, ram_bytes=SIZE)
            assert isinstance(store, RamTier)
            assert store.max_bytes == SIZE
            store.put(record, ["a"])
            get_all(store, [record, record])
            assert store.hits == 1
            store.close()
        plain = open_store(tmp_path / "b", ram_bytes=0)
        assert isinstance(plain, FolderStore)
        assert same(plain.get(record.key), record)
        assert open_store(plain, ram_bytes=SIZE) is plain
        assert isinstance(open_store(None, ram_bytes=SIZE), MemoryStore)
        plain.close()

    @pytest.mark.parametrize("ram_bytes", [-1, 0.5, "1", None, True])
    def test_open_store_refuses_other_sizes(self, tmp_path: Path, ram_bytes: object) -> None:
        with pytest.raises(InputError, match=rf"ram_bytes is {ram_bytes!r}.*number of bytes"):
            open_store(tmp_path / "a", ram_bytes=ram_bytes)  # type: ignore[arg-type]
        assert not (tmp_path / "a").exists()
