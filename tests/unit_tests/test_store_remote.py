"""A folder in front of a remote: what is shared, and what a remote may do wrong."""

from __future__ import annotations

import functools
import gc
import http.server
import importlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch

from kvlink_rag import Chunk
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store import (
    FolderStore,
    FsspecRemote,
    MemoryStore,
    RamTier,
    RedisRemote,
    Remote,
    RemoteError,
    RemoteRefused,
    RemoteTier,
    open_store,
    redacted,
)
from kvlink_rag.store.folder.migrate import migrate
from kvlink_rag.store.folder.outbox import Operation, Outbox

pytestmark = pytest.mark.usefixtures("raw_folders")

ABSENT = "0" * 64
PATIENCE_S = 30.0
SOON_S = 0.05
"""How long a remote that has failed is left alone here."""


def make_record(*token_ids: int) -> ChunkKV:
    tensor = torch.full((2, 1, len(token_ids), 4), float(token_ids[0]))
    return ChunkKV(token_ids, (), "model-a", tensor, tensor + 1)


class Shared:
    """A remote in a dictionary that fails, waits or refuses when told to."""

    name, writable = "shared://", True

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def _called(self, what: str, key: str) -> None:
        self.calls.append((what, key))
        self.begun.release()
        assert self.gate.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error

    def read(self, key: str) -> bytes | None:
        data = self.objects.get(key)
        self._called("read", key)
        return data

    def write(self, key: str, data: bytes) -> None:
        self._called("write", key)
        self.objects[key] = data

    def delete(self, key: str) -> None:
        self._called("delete", key)
        self.objects.pop(key, None)

    def has(self, key: str) -> bool:
        self._called("has", key)
        return key in self.objects

    def close(self) -> None:
        pass

    def count(self, what: str) -> int:
        return sum(called == what for called, _ in self.calls)


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.gate.set()


@contextmanager
def told() -> Iterator[list[str]]:
    """The texts of the warnings of a block, once it has ended."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", KVLinkWarning)
        yield texts
    texts += [str(warning.message) for warning in found]


Machine = Callable[..., RemoteTier]


@pytest.fixture
def machine(tmp_path: Path, shared: Shared) -> Iterator[Machine]:
    """Makes tiers with a folder of their own, by name, before one remote."""
    made = []

    def make(name: str, remote: Remote = shared, **options: float) -> RemoteTier:
        options = {"retry_s": SOON_S, **options}
        tier = RemoteTier(FolderStore(tmp_path / name), remote, **options)  # type: ignore[arg-type]
        made.append(tier)
        return tier

    yield make
    shared.gate.set()
    for tier in made:
        tier._stop()
        tier.close()


def is_right(found: ChunkKV | None, record: ChunkKV) -> bool:
    return (
        found is not None
        and found.is_for(record.fingerprint, record.behind, record.token_ids)
        and torch.equal(found.keys, record.keys)
        and torch.equal(found.values, record.values)
    )


def wait_until(happened: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if happened():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


class TestFsspecRemote:
    @pytest.fixture(params=["file", "memory"])
    def remote(self, request: pytest.FixtureRequest, tmp_path: Path) -> FsspecRemote:
        name = tmp_path.name if request.param == "memory" else str(tmp_path / "a b")
        return FsspecRemote(f"{request.param}://{name}")

    def test_objects(self, remote: FsspecRemote) -> None:
        key = make_record(1).key
        assert isinstance(remote, Remote)
        assert remote.read(key) is None
        assert not remote.has(key)
        remote.delete(key)
        remote.write(key, b"one")
        remote.write(key, b"two")
        assert remote.read(key) == b"two"
        assert remote.has(key)
        remote.delete(key)
        assert remote.read(key) is None

    def test_a_folder_never_shows_a_part_of_a_file(self, tmp_path: Path) -> None:
        remote = FsspecRemote(f"file://{tmp_path}/kv")
        key = make_record(1).key
        remote.write(key, b"one")
        assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{key}.safetensors"]
        whole, seen = [bytes([byte]) * (1 << 20) for byte in range(2)], set()
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                seen.add(remote.read(key))

        reader = threading.Thread(target=read)
        reader.start()
        for turn in range(20):
            remote.write(key, whole[turn % 2])
        stop.set()
        reader.join()
        assert seen <= {b"one", *whole}

    def test_one_that_hangs_is_left(self, tmp_path: Path) -> None:
        remote = FsspecRemote(f"file://{tmp_path}", transfer_s=0.05)
        folder = tmp_path / "00"
        folder.mkdir()
        os.mkfifo(folder / f"{ABSENT}.safetensors")  # reading waits for a writer
        with pytest.raises(RemoteError, match=r"cannot read from file://.*Timeout"):
            remote.read(ABSENT)
        os.close(os.open(folder / f"{ABSENT}.safetensors", os.O_WRONLY))

    def test_a_place_that_cannot_be_written_to_refuses(self) -> None:
        if not Path("/proc/self").exists():
            pytest.skip("there is no /proc here, where nobody may make a folder")
        with pytest.raises(RemoteRefused, match=r"cannot write to file:///proc"):
            FsspecRemote("file:///proc").write(ABSENT, b"x")


class TestSharing:
    def test_what_one_machine_puts_another_gets(self, machine: Machine) -> None:
        one, other, record = machine("a"), machine("b"), make_record(1, 2)
        one.put(record, ["document"])
        assert one.flush(PATIENCE_S)
        assert other.has(record.key)
        assert not other.folder.has(record.key)
        assert is_right(other.get(record.key), record)
        files = [tier.folder.file_bytes(record.key) for tier in (one, other)]
        assert files[0] == files[1] is not None
        assert other.folder.verify().clean
        assert other.stat().entries == 1
        assert other.get(ABSENT) is None
        assert not other.has(ABSENT)

    @pytest.mark.parametrize("codec", ["bf16", "int8"])
    def test_folders_with_a_codec(self, tmp_path: Path, codec: str) -> None:
        record = make_record(1, 2)
        tiers = [
            open_store(tmp_path / name, codec=codec, remote=f"file://{tmp_path}/kv")
            for name in "ab"
        ]
        tiers[0].put(record)
        assert tiers[0].flush(PATIENCE_S)  # type: ignore[attr-defined]
        found = tiers[1].get(record.key_as(codec))
        assert found is not None
        assert found.is_for("model-a", (), (1, 2))
        for tier in tiers:
            tier.close()

    def test_with_memory_in_front(self, machine: Machine) -> None:
        one, record = machine("a"), make_record(1)
        one.put(record)
        assert one.flush(PATIENCE_S)
        tier = RamTier(machine("b"), 1 << 20)
        assert is_right(tier.get(record.key, 5.0), record)
        tier.flush()
        assert is_right(tier.get(record.key), record)
        assert (tier.hits, tier.misses) == (1, 1)

    def test_what_a_folder_held_before_is_uploaded(
        self, tmp_path: Path, machine: Machine, shared: Shared
    ) -> None:
        folder, record = FolderStore(tmp_path / "a"), make_record(1)
        folder.put(record)
        folder.close()
        assert machine("a").flush(PATIENCE_S)
        assert list(shared.objects) == [record.key]

    def test_what_is_there_is_not_uploaded_again(self, machine: Machine, shared: Shared) -> None:
        for name in "ab":
            tier = machine(name)
            tier.put(make_record(1))
            assert tier.flush(PATIENCE_S)
        assert shared.count("write") == 1

    def test_uploads_go_side_by_side(
        self, tmp_path: Path, machine: Machine, shared: Shared
    ) -> None:
        folder = FolderStore(tmp_path / "a")
        for number in range(4):
            folder.put(make_record(number + 1))
        folder.close()
        together, write = threading.Barrier(4), shared.write

        def meet(key: str, data: bytes) -> None:
            together.wait(PATIENCE_S)  # fails unless four are being written
            write(key, data)

        shared.write = meet  # type: ignore[method-assign]
        assert machine("a").flush(PATIENCE_S)
        assert len(shared.objects) == 4

    def test_many_ask_and_one_downloads(self, machine: Machine, shared: Shared) -> None:
        one, other, record = machine("a"), machine("b"), make_record(1)
        one.put(record)
        assert one.flush(PATIENCE_S)
        shared.gate.clear()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(other.get, record.key) for _ in range(8)]
            wait_until(lambda: shared.count("read") == 1)
            shared.gate.set()
            assert all(is_right(each.result(), record) for each in asked)
        assert shared.count("read") == 1


class TestDeletion:
    def test_released_documents_are_deleted(self, machine: Machine, shared: Shared) -> None:
        tier, gone, stays = machine("a"), make_record(1), make_record(2)
        tier.put(gone, ["a"])
        tier.put(stays, ["a", "b"])
        assert tier.flush(PATIENCE_S)
        assert len(shared.objects) == 2
        assert tier.release(["a"]) == 1
        assert tier.flush(PATIENCE_S)
        assert list(shared.objects) == [stays.key]

    def test_until_it_is_done_it_is_not_found(self, machine: Machine, shared: Shared) -> None:
        tier, record = machine("a"), make_record(1)
        tier.put(record, ["a"])
        assert tier.flush(PATIENCE_S)
        shared.gate.clear()
        tier.release(["a"])
        assert record.key in shared.objects
        assert tier.get(record.key) is None
        assert not tier.has(record.key)
        tier.put(record, ["b"])  # comes back before it has gone
        shared.gate.set()
        assert tier.flush(PATIENCE_S)
        assert list(shared.objects) == [record.key]
        assert is_right(tier.get(record.key), record)

    def test_pruning_deletes_what_was_put_here_alone(
        self, machine: Machine, shared: Shared
    ) -> None:
        one, other = machine("a"), machine("b")
        theirs, mine = make_record(1), make_record(2)
        one.put(theirs, ["theirs"])
        assert one.flush(PATIENCE_S)
        assert other.get(theirs.key) is not None
        other.put(mine)
        assert other.flush(PATIENCE_S)
        assert len(other.prune().unreferenced) == 2
        assert other.flush(PATIENCE_S)
        assert list(shared.objects) == [theirs.key]
        assert other.stat().entries == 0

    def test_what_is_released_while_it_comes_is_not_kept(
        self, machine: Machine, shared: Shared
    ) -> None:
        one, other, record = machine("a"), machine("b"), make_record(1)
        one.put(record)
        assert one.flush(PATIENCE_S)
        shared.gate.clear()
        other.refer([("a", record.key)])
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(other.get, record.key)
            wait_until(lambda: shared.count("read") == 1)
            other.release(["a"])
            shared.gate.set()
            assert asked.result() is None
        assert other.flush(PATIENCE_S)
        assert shared.objects == {}
        assert not other.folder.has(record.key)
        assert other.folder.verify().orphans == []

    def test_a_deletion_that_cannot_be_noted_is_not_made(self, machine: Machine) -> None:
        tier, record = machine("a"), make_record(1)
        tier.put(record, ["a"])
        assert tier.flush(PATIENCE_S)
        tier._uploads.stop()
        tier._outbox.close()
        with pytest.raises(StoreError):
            tier.release(["a"])
        assert tier.folder.get(record.key) is not None
        assert tier.references() == [("a", record.key)]


@pytest.mark.parametrize("bad", [b"", b"garbage", "truncated", "another"])
def test_damaged_objects_are_replaced(machine: Machine, shared: Shared, bad: bytes | str) -> None:
    one, other = machine("a"), machine("b")
    records = [make_record(number) for number in (1, 2)]
    for record in records:
        one.put(record)
    assert one.flush(PATIENCE_S)
    good = dict(shared.objects)
    for key in good:
        stands_for = {
            "truncated": good[key][:-1],
            "another": next(v for k, v in good.items() if k != key),
        }
        shared.objects[key] = bad if isinstance(bad, bytes) else stands_for[bad]
    with told() as texts:
        assert [other.get(record.key) for record in records] == [None, None]
        assert not other.has(records[0].key)
        assert other.get(records[0].key) is None
    assert len(texts) == 1
    assert "shared:// holds damaged objects" in texts[0]
    assert other.folder.verify().checked == 0
    for record in records:
        other.put(record)
    assert other.flush(PATIENCE_S)
    assert shared.objects == good
    assert is_right(machine("c").get(records[0].key), records[0])


class TestTrouble:
    def test_one_warning_and_it_recovers_by_itself(self, machine: Machine, shared: Shared) -> None:
        tier, record = machine("a"), make_record(1)
        shared.error = ConnectionError("no route, said http://user:password@host")
        with told() as texts:
            for number in range(10):
                assert tier.get(f"{number:064x}") is None
                assert not tier.has(f"{number:064x}")
            tier.put(record)
            assert is_right(tier.get(record.key), record)
            assert not tier.flush(4 * SOON_S)
        assert len(texts) == 1
        assert re.search("shared://.*computed meanwhile", texts[0])
        assert "password" not in texts[0]
        shared.error = None
        wait_until(lambda: record.key in shared.objects)
        wait_until(lambda: tier.has(next(iter(shared.objects))))
        assert tier.flush(PATIENCE_S)
        shared.error = ConnectionError()
        with told() as texts:  # of another failure
            for number in range(5):
                tier.get(f"{number:064x}")
        assert len(texts) == 1

    def test_while_it_is_down_nobody_asks(self, machine: Machine, shared: Shared) -> None:
        tier = machine("a", retry_s=3600)
        shared.error = ConnectionError()
        with told() as texts:
            for number in range(10):
                tier.get(f"{number:064x}")
        assert len(texts) == 1
        assert len(shared.calls) == 3

    def test_one_that_hangs(self, machine: Machine, shared: Shared) -> None:
        tier = machine("a", timeout_s=0.05, retry_s=3600)
        shared.gate.clear()
        with told() as texts:
            for number in range(10):
                assert tier.get(f"{number:064x}") is None
        assert len(texts) == 1
        assert "not answered within" in texts[0]
        assert len(shared.calls) == 3

    def test_one_that_refuses_to_be_written_to_is_read(
        self, machine: Machine, shared: Shared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, record = machine("a"), make_record(1)
        one.put(record)
        assert one.flush(PATIENCE_S)
        other = machine("b")

        def write(key: str, data: bytes) -> None:
            raise RemoteRefused("cannot write to shared://: no space")

        monkeypatch.setattr(shared, "write", write)
        with told() as texts:
            for number in range(2, 8):
                other.put(make_record(number))
            wait_until(lambda: "refuses" in other._guard._noticed)
            assert not other.flush(0.1)
            assert is_right(other.get(record.key), record)
        assert len(texts) == 1
        assert "no space" in texts[0]

    def test_an_object_that_is_refused_holds_up_no_other(
        self, machine: Machine, shared: Shared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvlink_rag.store.remote.uploads.REFUSED_S", 0.01)
        records = [make_record(number) for number in range(1, 4)]
        write = shared.write

        def picky(key: str, data: bytes) -> None:
            if key == records[0].key:
                raise RemoteRefused("cannot write to shared://: too large")
            write(key, data)

        monkeypatch.setattr(shared, "write", picky)
        tier = machine("a")
        with told() as texts:
            for record in records:
                tier.put(record)
            wait_until(lambda: len(shared.objects) == 2)
            tier.has(ABSENT)
        assert len(texts) == 1
        assert "too large" in texts[0]
        monkeypatch.setattr(shared, "write", write)
        assert tier.flush(PATIENCE_S)
        assert len(shared.objects) == 3

    def test_uploads_that_wait_are_bounded(self, machine: Machine, shared: Shared) -> None:
        shared.error = ConnectionError()
        tier = machine("a", retry_s=3600, most_uploads=2)
        records = [make_record(number) for number in range(1, 7)]
        with told() as texts:
            tier.put(records[0], ["gone"])
            tier.release(["gone"])
            for record in records[1:]:
                tier.put(record)
            wait_until(lambda: "fails" in tier._guard._noticed)
            tier.has(ABSENT)
        assert sum("oldest are given up" in text for text in texts) == 1
        waiting = [tier._outbox.operation(record.key) for record in records]
        assert waiting == [Operation.DELETE, *[None] * 3, *[Operation.WRITE] * 2]
        assert all(tier.get(record.key) is not None for record in records[1:])

    def test_warnings_turned_into_errors_do_not_stop_uploads(
        self, machine: Machine, shared: Shared
    ) -> None:
        tier = machine("a")
        shared.error = ConnectionError()
        tier.put(make_record(1))
        wait_until(lambda: not tier._guard.answers)
        shared.error = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(KVLinkWarning):
                tier.flush(PATIENCE_S)
        assert len(shared.objects) == 1


class TestWithin:
    @pytest.fixture
    def stored(self, machine: Machine) -> ChunkKV:
        one, record = machine("a"), make_record(1)
        one.put(record)
        assert one.flush(PATIENCE_S)
        return record

    def test_what_comes_late_is_there_the_next_time(
        self, machine: Machine, shared: Shared, stored: ChunkKV
    ) -> None:
        other = machine("b")
        shared.gate.clear()
        assert other.get(stored.key, within_s=0.05) is None
        shared.gate.set()
        wait_until(lambda: other.folder.has(stored.key))
        assert is_right(other.get(stored.key, within_s=0.0), stored)
        assert shared.count("read") == 1

    def test_one_known_to_be_slow_is_not_asked(
        self, machine: Machine, shared: Shared, stored: ChunkKV
    ) -> None:
        other = machine("b")
        other._guard.speed.note(0.2, 1000)
        assert other.get(stored.key, within_s=0.1) is None
        assert shared.count("read") == 0
        assert is_right(other.get(stored.key, within_s=PATIENCE_S), stored)
        assert shared.count("read") == 1

    def test_an_old_measurement_says_nothing(
        self, machine: Machine, stored: ChunkKV, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = machine("b")
        other._guard.speed.note(100.0, 1000)
        monkeypatch.setattr("kvlink_rag.store.remote.guard.FORGOTTEN_S", 0.0)
        assert is_right(other.get(stored.key, within_s=PATIENCE_S), stored)

    def test_the_estimate_follows_latency_and_size(self, machine: Machine) -> None:
        speed = machine("a")._guard.speed
        assert speed.expected_s() is None
        speed.note(0.1, 0)
        assert speed.expected_s() is None
        speed.note(0.6, 1000)
        assert speed.expected_s() == pytest.approx(0.6)
        for _ in range(50):
            speed.note(0.1, 0)
            speed.note(0.3, 1000)
        assert speed.expected_s() == pytest.approx(0.3)

    def test_an_engine_waits_no_longer_than_it_computes(self) -> None:
        limits: list[float | None] = []

        class Store(MemoryStore):
            def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
                limits.append(within_s)
                return None

        engine = tiny.engine(store=Store())
        short, long = Chunk("Bees."), Chunk("Bees dance. " * 10)
        engine.answer("What?", [short], max_new_tokens=1)
        assert set(limits) == {None}
        limits.clear()
        engine.answer("What?", [short, long], max_new_tokens=1)
        known = [limit for limit in limits if limit is not None]
        assert len(known) == len(limits)
        assert max(known) > 5 * min(known) > 0


class TestProcesses:
    def test_a_killed_process_leaves_its_uploads_to_the_next(
        self, tmp_path: Path, machine: Machine, shared: Shared
    ) -> None:
        records = [make_record(number) for number in range(1, 4)]
        child = os.fork()
        if child == 0:  # nothing of the test's own runs here
            shared.gate.clear()
            tier = RemoteTier(FolderStore(tmp_path / "a"), shared)
            for record in records:
                tier.put(record, [f"{record.token_ids}"])
            tier.release([f"{records[0].token_ids}"])
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        shared.objects[records[0].key] = b"was uploaded before"
        tier = machine("a")
        assert tier.flush(PATIENCE_S)
        assert sorted(shared.objects) == sorted(record.key for record in records[1:])

    def test_a_forked_child_goes_on(self, tmp_path: Path, machine: Machine) -> None:
        remote = FsspecRemote(f"file://{tmp_path}/kv")
        tier, before, after = machine("a", remote), make_record(1), make_record(2)
        tier.put(before)
        assert tier.flush(PATIENCE_S)
        child = os.fork()
        if child == 0:
            os._exit(_goes_on(tier, before, after))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert is_right(tier.get(after.key), after)
        assert remote.has(after.key)

    def test_a_child_made_while_a_thread_writes(self, tmp_path: Path) -> None:
        outbox = Outbox(tmp_path / "outbox.sqlite", 10)
        holds, forked = threading.Event(), threading.Event()

        def write() -> None:
            with outbox._database.writing():
                holds.set()
                assert forked.wait(PATIENCE_S)

        thread = threading.Thread(target=write)
        thread.start()
        assert holds.wait(PATIENCE_S)
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends a child that waits for the thread, which it does not have
            os._exit(len(outbox))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        forked.set()
        thread.join()
        outbox.close()

    def test_what_closing_leaves_is_uploaded_by_the_next(
        self, machine: Machine, shared: Shared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvlink_rag.store.remote.tier.CLOSE_S", 0.05)
        monkeypatch.setattr("kvlink_rag.store.remote.uploads.STOP_S", 0.05)
        tier = machine("a")
        shared.gate.clear()
        tier.put(make_record(1))
        tier.close()
        tier.close()
        assert tier.get(ABSENT) is None
        shared.gate.set()
        assert machine("a").flush(PATIENCE_S)
        assert len(shared.objects) == 1

    def test_two_at_a_time_upload_for_one_folder(self, machine: Machine, shared: Shared) -> None:
        tiers = [machine("a"), machine("a")]
        for number in range(1, 9):
            tiers[number % 2].put(make_record(number))
        assert all(tier.flush(PATIENCE_S) for tier in tiers)
        assert shared.count("write") == len(shared.objects) == 8

    def test_one_that_is_forgotten_goes_away(self, tmp_path: Path, shared: Shared) -> None:
        before = threading.active_count()
        tier = RemoteTier(FolderStore(tmp_path / "a"), shared)
        tier.put(make_record(1))
        assert tier.flush(PATIENCE_S)
        del tier
        wait_until(lambda: bool(gc.collect() + 1) and threading.active_count() <= before)


def _goes_on(tier: RemoteTier, before: ChunkKV, after: ChunkKV) -> int:
    tier.folder._files.remove(before.key)
    right = is_right(tier.get(before.key), before)
    tier.put(after)
    return 0 if right and tier.flush(PATIENCE_S) else 1


class TestOutbox:
    def test_a_task_done_is_not_the_one_that_took_its_place(self, tmp_path: Path) -> None:
        outbox = Outbox(tmp_path / "outbox.sqlite", 10)
        outbox.add(Operation.WRITE, ["a", "b"])
        (task,) = outbox.next(1)
        outbox.add(Operation.DELETE, ["a"])
        for strike in (outbox.done, outbox.drop, outbox.postpone):
            strike(task)
        assert outbox.operation("a") is Operation.DELETE
        assert [_taken(outbox) for _ in range(3)] == ["b", "a", None]
        assert outbox.own(["a", "b"]) == ["b"]
        outbox.close()

    def test_who_fails_is_behind_the_others(self, tmp_path: Path) -> None:
        outbox = Outbox(tmp_path / "outbox.sqlite", 10)
        outbox.add(Operation.WRITE, ["a", "b"])
        (first,) = outbox.next(1)
        outbox.postpone(first)
        assert [_taken(outbox) for _ in range(2)] == ["b", "a"]
        outbox.close()


def _taken(outbox: Outbox) -> str | None:
    for task in outbox.next(1):
        outbox.done(task)
        return task.key
    return None


class TestReadOnly:
    def test_over_http(self, tmp_path: Path, machine: Machine) -> None:
        source = FsspecRemote(f"file://{tmp_path}/kv")
        one, record = machine("a", source), make_record(1)
        one.put(record, ["a"])
        assert one.flush(PATIENCE_S)
        handler = functools.partial(Quiet, directory=str(tmp_path / "kv"))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                url = f"http://user:password@127.0.0.1:{server.server_port}"
                other = machine("b", FsspecRemote(url))
                assert other.has(record.key)
                assert is_right(other.get(record.key), record)
                assert other.get(ABSENT) is None
                with told() as texts:
                    for number in (2, 3):
                        other.put(make_record(number), ["b"])
                    other.release(["b"])
                assert len(texts) == 1
                assert re.search(r"http://\*\*\*@127.*only be read", texts[0])
                assert other.flush(0.0)
                with pytest.raises(RemoteRefused, match="only be read"):
                    other.remote.write(ABSENT, b"")
            finally:
                server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class TestOpenStore:
    def test_by_urls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVLINK_CACHE", str(tmp_path / "cache"))
        url = f"file://{tmp_path}/kv"
        stores = [
            open_store(url, ram_bytes=1000),
            open_store(url),
            open_store(tmp_path / "a", remote=url),
        ]
        assert isinstance(stores[0], RamTier)
        tiers = stores[1:]
        assert all(isinstance(tier, RemoteTier) for tier in tiers)
        folders = [tier.folder.path for tier in tiers]  # type: ignore[attr-defined]
        assert folders[0].is_relative_to(tmp_path / "cache")
        assert folders[1] == tmp_path / "a"
        for store in stores:
            store.close()

    def test_a_folder_is_that_of_its_url_whatever_the_password(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVLINK_CACHE", str(tmp_path))
        for url in ("redis://a:1@localhost:1/0", "redis://b:2@localhost:1/0"):
            open_store(url).close()
        assert len(list((tmp_path / "remote").iterdir())) == 1
        open_store("redis://localhost:1/1").close()
        assert len(list((tmp_path / "remote").iterdir())) == 2

    @pytest.mark.parametrize(
        ("url", "match"),
        [
            ("nosuch://u:hidden@host/kv", "known are .*file.*redis.*s3"),
            ("s3://", "names no bucket"),
            ("redis://u:hidden/x@host", "is no URL.*%2F"),
        ],
    )
    def test_urls_that_cannot_be_used(self, tmp_path: Path, url: str, match: str) -> None:
        for arguments in ({"store": url}, {"store": tmp_path / "a", "remote": url}):
            with pytest.raises(InputError, match=match) as error:
                open_store(**arguments).close()  # type: ignore[arg-type]
            assert "hidden" not in str(error.value)
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize("package", ["s3fs", "redis", "pybreaker", "tenacity", "fsspec"])
    def test_a_missing_package_is_named_with_its_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        url = "s3://bucket/kv" if package == "s3fs" else "redis://localhost:1"
        url = f"file://{tmp_path}/kv" if package == "fsspec" else url
        if package == "s3fs":  # fsspec has it already
            monkeypatch.delitem(
                importlib.import_module("fsspec.registry")._registry, "s3", raising=False
            )
        with pytest.raises(InputError, match=rf"{package}.*pip install 'kvlink-rag\[remote\]'"):
            open_store(tmp_path / "a", remote=url)

    def test_a_remote_is_behind_a_folder(self, tmp_path: Path, shared: Shared) -> None:
        for store in (None, MemoryStore(), "file:///tmp/x"):
            with pytest.raises(InputError, match="folder"):
                open_store(store, remote=shared)
        for remote in ("bucket/kv", "", 3):
            with pytest.raises(InputError, match="pass a URL"):
                open_store(tmp_path, remote=remote)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["timeout_s", "retry_s", "most_uploads"])
    def test_numbers_are_above_0(self, tmp_path: Path, shared: Shared, name: str) -> None:
        with pytest.raises(InputError, match=f"{name} is 0"):
            RemoteTier(FolderStore(tmp_path), shared, **{name: 0})

    def test_ttl_is_a_number_of_seconds(self) -> None:
        with pytest.raises(InputError, match="ttl_s is 0"):
            RedisRemote("redis://localhost", ttl_s=0)


class TestCredentials:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("s3://bucket/kv@home", "s3://bucket/kv@home"),
            ("redis://user:pass@host:1/0", "redis://***@host:1/0"),
            ("redis://user:p%40ss@host/0?password=x", "redis://***@host/0?***"),
            ("redis://user:pass/word@host:1/0", "redis://***"),
            ("https://host/kv?token=x", "https://host/kv?***"),
        ],
    )
    def test_urls_are_shown_without(self, url: str, shown: str) -> None:
        assert redacted(url) == shown

    def test_errors_are_told_without(self, tmp_path: Path) -> None:
        remote = FsspecRemote(
            "file:///hidden1:hidden2/kv?sig=hidden3",
            client_kwargs={"aws_secret": "hidden4"},
            token="hidden5",
            retries=3,
        )
        text = remote._messages.told(ValueError("hidden4, hidden5 and retries 3: hidden3"))
        assert text == "ValueError: ***, *** and retries 3: ***"


@pytest.mark.parametrize("other", [None, b"2" * 32])
def test_nobody_without_the_key_touches_sealed_objects(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, other: bytes | None
) -> None:
    shared, record = Shared(), make_record(1, 2)
    sealed = RemoteTier(FolderStore(tmp_path / "a", encryption_key=b"1" * 32), shared)
    sealed.put(record, ["d"])
    assert sealed.flush(PATIENCE_S)
    ((name, data),) = shared.objects.items()
    assert name != record.key  # which who guesses the text could compute
    foreign = RemoteTier(FolderStore(tmp_path / "b", encryption_key=other), shared)
    assert foreign.get(record.key) is None
    foreign.put(record, ["d"])
    assert foreign.flush(PATIENCE_S)
    assert foreign.release(["d"]) == 1
    assert foreign.flush(PATIENCE_S)
    assert shared.objects == {name: data}
    foreign.close()
    with_key = RemoteTier(FolderStore(tmp_path / "c", encryption_key=b"1" * 32), shared)
    assert with_key.has(record.key)
    assert with_key.get(record.key) is not None
    assert with_key.release(["d"]) == 0  # it has no such document
    assert sealed.release(["d"]) == 1
    assert sealed.flush(PATIENCE_S)
    assert not shared.objects
    with_key.close()
    sealed.close()
    # from 3.13 on sqlite3 also warns of connections that others have left to the collector
    assert not [w for w in recwarn.list if not issubclass(w.category, ResourceWarning)]


class TestAFolderUsedWithoutItsRemote:
    """By a command, say: what it changes is not lost on the remote."""

    def test_the_next_process_with_it_catches_up(
        self, machine: Machine, shared: Shared, tmp_path: Path
    ) -> None:
        a, b, c = (make_record(number) for number in (1, 2, 3))
        tier = machine("a")
        for name, record in (("a", a), ("b", b)):
            tier.put(record, [name])
        assert tier.flush(PATIENCE_S)
        tier.close()
        folder = FolderStore(tmp_path / "a")
        folder.release(["a"])
        folder.put(c, ["c"])
        folder.put(make_record(4))
        assert folder.prune().unreferenced == [make_record(4).key]
        folder.close()
        assert machine("a").flush(PATIENCE_S)
        assert set(shared.objects) == {b.key, c.key}

    def test_a_migration_moves_the_objects(
        self, machine: Machine, shared: Shared, tmp_path: Path
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn((2, 1, 5, 8), generator=generator)
        rope = (RopeGroup(slice(0, 2), torch.tensor([1.0, 0.1, 0.1, 0.1])),)
        record = ChunkKV((1, 2, 3, 4, 5), (), "model-a", keys, keys, rope)
        tier = machine("a")
        tier.put(record, ["d"])
        assert tier.flush(PATIENCE_S)
        tier.close()
        migrate(tmp_path / "a", "int8")
        assert machine("a").flush(PATIENCE_S)
        assert set(shared.objects) == {record.key_as("int8")}

    def test_without_one_nothing_is_noted(self, machine: Machine, tmp_path: Path) -> None:
        folder = FolderStore(tmp_path / "b")
        folder.put(make_record(1), ["d"])
        folder.close()
        assert not (tmp_path / "b" / "outbox.sqlite").exists()
        remote = Shared()
        remote.writable = False
        with told():
            machine("b", remote).close()
        folder = FolderStore(tmp_path / "b")
        folder.put(make_record(2), ["d"])
        folder.release(["d"])
        folder.close()
        outbox = Outbox(tmp_path / "b" / "outbox.sqlite", 9)
        assert len(outbox) == 0
        outbox.close()
