"""A folder whose caches are written with another codec, undisturbed and killed.

Run as a script, this file migrates copies of a folder and kills the migrations.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvlink_rag.store
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store import Budget, FolderStore, StoreStat
from kvlink_rag.store.codec import CODECS, codec_for, coded
from kvlink_rag.store.folder import migrate as migrate_module
from kvlink_rag.store.folder.files import ChunkFiles
from kvlink_rag.store.folder.migrate import migrate

pytestmark = pytest.mark.usefixtures("raw_folders")

KEY = bytes(range(32))
RECORDS = 8
KILLS = 15


def make_record(number: int, dtype: torch.dtype = torch.float32) -> ChunkKV:
    generator = torch.Generator().manual_seed(number)
    keys = torch.randn((2, 1, 5, 8), generator=generator).to(dtype)
    rope = (RopeGroup(slice(0, 2), torch.tensor([1.0, 0.1])),)
    return ChunkKV(tuple(range(number, number + 5)), (1,), "model-a", keys, keys + 1, rope)


def documents(number: int) -> list[str]:
    """One is a part of another one's id, and all share one."""
    return [f"d{number}", f"d{number}:part", "all"]


def fill(path: Path, codec: str | None = None, dtype: torch.dtype = torch.float32) -> None:
    store = FolderStore(path, codec)
    for number in range(RECORDS):
        store.put(make_record(number, dtype), documents(number))
    store.close()


def contents(path: Path) -> dict[str, bytes]:
    """The chunk files."""
    files = [each for each in (path / "chunks").rglob("*.*") if each.is_file()]
    return {each.name: each.read_bytes() for each in files}


def check_migrated(path: Path, codec: str, dtype: torch.dtype = torch.float32) -> StoreStat:
    """All is there as if it had been stored with the codec, and nothing else."""
    store = FolderStore(path)
    assert store.codec == codec
    wanted = []
    for number in range(RECORDS):
        record = coded(make_record(number, dtype), codec)
        found = store.get(record.key)
        assert found is not None
        assert torch.equal(found.keys, record.keys)
        assert torch.equal(found.values, record.values)
        wanted += [(document, record.key) for document in documents(number)]
    assert sorted(store.references()) == sorted(wanted)
    check = store.verify()
    assert check.clean
    assert check.unreferenced == []
    assert check.checked >= RECORDS
    stat = store.stat()
    store.close()
    return stat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_as_if_it_had_been_stored_so(tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    fill(tmp_path / "kv", dtype=dtype)
    fill(tmp_path / "new", codec, dtype)
    seen: list[tuple[int, int]] = []
    stat = migrate(tmp_path / "kv", codec, progress=lambda *done: seen.append(done))
    assert check_migrated(tmp_path / "kv", codec, dtype) == stat
    assert stat == check_migrated(tmp_path / "new", codec, dtype)
    assert contents(tmp_path / "kv") == contents(tmp_path / "new")
    steps = 0 if codec == "raw" else RECORDS
    assert seen == [(number + 1, RECORDS) for number in range(steps)]
    assert migrate(tmp_path / "kv", codec) == stat  # once more: nothing to do


def test_bfloat16_goes_on_from_bf16(tmp_path: Path) -> None:
    """There the numbers are as they were."""
    fill(tmp_path, "bf16", torch.bfloat16)
    migrate(tmp_path, "int8")
    check_migrated(tmp_path, "int8", torch.bfloat16)


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_what_went_through_a_codec_is_refused(tmp_path: Path, codec: str) -> None:
    fill(tmp_path, codec)
    with pytest.raises(InputError, match=rf"codec '{codec}'.*cannot become 'int4'.*index again"):
        migrate(tmp_path, "int4")
    check_migrated(tmp_path, codec)


def test_caches_without_their_rotation_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    store = FolderStore(tmp_path)
    store.put(replace(make_record(100), rope=()), ["old"])
    store.close()
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"do not say how their keys are rotated.*index again"):
        migrate(tmp_path, "int8")
    assert contents(tmp_path) == before
    migrate(tmp_path, "bf16")  # takes keys as they are
    assert FolderStore(tmp_path).get(make_record(100).key_as("bf16")) is not None


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8", "int4"])
def test_an_engine_finds_what_was_migrated(tmp_path: Path, codec: str) -> None:
    import tiny  # the processes that are killed do without a model

    chunks = ["one fox in the snow", "two dogs", "three bees"]
    for name, made_with in (("raw", None), ("new", codec)):
        engine = tiny.engine("gemma3", store=tmp_path / name, codec=made_with)
        engine.index(chunks, progress=False)
        engine.prefill("How many?", chunks)  # stores the prefix too
    migrate(tmp_path / "raw", codec)
    engine, other = (tiny.engine("gemma3", store=tmp_path / name) for name in ("raw", "new"))
    prefill = engine.prefill("How many?", chunks)
    assert (prefill.report.hits, prefill.report.misses) == (3, 0)
    assert torch.equal(prefill.logits, other.prefill("How many?", chunks).logits)
    assert sorted(engine.store.references()) == sorted(other.store.references())
    assert contents(tmp_path / "raw") == contents(tmp_path / "new")


def test_what_was_used_much_is_still_not_evicted_first(tmp_path: Path) -> None:
    fill(tmp_path / "kv")
    store = FolderStore(tmp_path / "kv")
    for _ in range(5):
        assert store.get(make_record(3).key) is not None
    oldest = store.usage().oldest
    store.close()
    migrate(tmp_path / "kv", "int8")
    store = FolderStore(tmp_path / "kv")
    assert store.usage().oldest == oldest
    records = [coded(make_record(number), "int8") for number in range(RECORDS)]
    store.set_budget(Budget(store.path_of(records[3].key).stat().st_size))
    assert [store.has(record.key) for record in records].index(True) == 3
    store.close()


def test_encrypted_folders_stay_encrypted(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, encryption_key=KEY)
    for number in range(RECORDS):
        store.put(make_record(number), documents(number))
    store.close()
    with pytest.raises(InputError, match="is encrypted"):
        migrate(tmp_path, "int8")
    migrate(tmp_path, "int8", encryption_key=KEY)
    store = FolderStore(tmp_path, encryption_key=KEY)
    assert store.codec == "int8"
    assert store.get(make_record(3).key_as("int8")) is not None
    assert len(store.references()) == 3 * RECORDS
    assert store.verify().clean
    assert {Path(name).suffix for name in contents(tmp_path)} == {".sealed"}
    with pytest.raises(InputError, match="is encrypted"):
        FolderStore(tmp_path)


def test_a_damaged_file_is_named_and_stops_it(tmp_path: Path) -> None:
    fill(tmp_path)
    store = FolderStore(tmp_path)
    path = store._files.path(make_record(3).key)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=rf"{path.name} is damaged .*kvlink store prune"):
        migrate(tmp_path, "int8")
    assert store.codec == FolderStore(tmp_path).codec == "raw"
    assert store.prune().corrupt == [str(path)]
    assert migrate(tmp_path, "int8").entries == RECORDS - 1


def test_references_to_what_is_not_stored_stay(tmp_path: Path) -> None:
    fill(tmp_path)
    store = FolderStore(tmp_path)
    store.refer([("d1", "0" * 64)])
    store.close()
    migrate(tmp_path, "int8")
    assert ("d1", "0" * 64) in FolderStore(tmp_path).references()


@pytest.mark.parametrize("path", ["none", "file"])
def test_no_store(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="no store of chunk caches"):
        migrate(tmp_path / path, "int8")
    assert not (tmp_path / "none").exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    fill(tmp_path)
    with (
        migrate_module._alone(tmp_path),
        pytest.raises(StoreError, match="another process is migrating"),
    ):
        migrate(tmp_path, "int8")
    migrate(tmp_path, "int8")


def test_nothing_is_lost_that_is_stored_meanwhile(tmp_path: Path) -> None:
    fill(tmp_path)
    other = FolderStore(tmp_path)
    late = [make_record(100 + number) for number in range(3)]

    def store(done: int, total: int) -> None:
        if done == 3:
            other.put(late[0], ["late"])
            other.refer([("came later", make_record(number).key) for number in range(RECORDS)])
        if done == total:
            other.put(late[1], ["late"])

    migrate(tmp_path, "int8", progress=store)
    other.put(late[2], ["late"])
    assert other.codec == "int8"
    assert all(other.get(record.key_as("int8")) for record in late)
    assert other.references("late") == [
        ("late", key) for key in sorted(record.key_as("int8") for record in late)
    ]
    assert other.references("came later") == [
        ("came later", key)
        for key in sorted(make_record(number).key_as("int8") for number in range(RECORDS))
    ]
    assert other.verify().checked == RECORDS + 3  # none in the old codec
    assert other.verify().clean
    other.close()


def test_what_is_released_meanwhile_does_not_come_back(tmp_path: Path) -> None:
    fill(tmp_path)
    other = FolderStore(tmp_path)

    def release(done: int, total: int) -> None:
        if done == 3:
            for number in range(RECORDS):
                other.release(documents(number))

    assert migrate(tmp_path, "int8", progress=release).entries == 0
    assert other.references() == []
    assert contents(tmp_path) == {}
    other.close()


def test_who_only_reads_finds_the_new_caches(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = FolderStore(tmp_path)
    migrate(tmp_path, "int8")
    assert reader.get(make_record(1).key) is None
    assert reader.codec == "int8"  # so that the next one asked for is found
    reader.close()


def test_a_cache_on_its_way_when_the_codec_changes_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    other, write = FolderStore(tmp_path), ChunkFiles.write

    def slow(files: ChunkFiles, record: ChunkKV, codec: str) -> tuple[Path, int]:
        written = write(files, record, codec)
        monkeypatch.undo()
        migrate(tmp_path, "int8")
        return written

    monkeypatch.setattr(ChunkFiles, "write", slow)
    with pytest.raises(StoreError, match=r"migrated to codec 'int8'.*again"):
        other.put(make_record(100), ["late"])
    other.put(make_record(100), ["late"])
    assert other.get(make_record(100).key_as("int8")) is not None
    assert other.verify().clean
    assert other.verify().checked == RECORDS + 1
    other.close()


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    calls = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"cannot migrate .*No space left.*free some space"):
            migrate(tmp_path, "int8")
    store = FolderStore(tmp_path)
    assert store.codec == "raw"
    assert all(store.get(make_record(number).key) for number in range(RECORDS))
    check = store.verify()
    assert check.clean
    assert RECORDS < check.checked < 2 * RECORDS
    store.close()
    migrate(tmp_path, "int8")
    check_migrated(tmp_path, "int8")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        fill(disk / "kv")
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        spare = disk / "spare"
        spare.write_bytes(bytes(free - 100_000))
        with pytest.raises(StoreError, match=r"full|No space left"):
            migrate(disk / "kv", "int8")
        spare.unlink()
        check_killed(disk / "kv", 0)
        migrate(disk / "kv", "int8")
        check_migrated(disk / "kv", "int8")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # files are mapped


def test_given_up_half_way(tmp_path: Path) -> None:
    """What a migration left is removed by one back, or to another codec."""
    fill(tmp_path / "kv")
    for codec, then in (("int8", "raw"), ("int8", "int4")):

        def stop(done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            migrate(tmp_path / "kv", codec, progress=stop)
        assert FolderStore(tmp_path / "kv").stat().entries == RECORDS + 3
        migrate(tmp_path / "kv", then)
        check_migrated(tmp_path / "kv", then)


def test_killed_at_any_instant(tmp_path: Path) -> None:
    root = str(Path(kvlink_rag.store.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def migrate_until(path: Path, step: int) -> None:
    """In a process of its own: be killed before the given operation on files."""
    steps = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps
        if event in ("open", "os.rename", "os.remove", "os.mkdir"):
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    migrate(path, "int8")


def in_a_child(path: Path, step: int) -> bool:
    """Whether it was killed."""
    child = os.fork()
    if child == 0:
        migrate_until(path, step)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def check_killed(path: Path, killed_at: int) -> None:
    """Right after the kill: all caches are there for who opens the folder, and their references."""
    store = FolderStore(path)
    assert store.verify().corrupt == [], killed_at
    references = set(store.references())
    for number in range(RECORDS):
        key = make_record(number).key_as(codec_for(store.codec, torch.float32))
        assert store.get(key) is not None, (killed_at, number)
        assert references >= {(document, key) for document in documents(number)}, killed_at
    store.close()


def kill_at_random_steps(folder: Path) -> None:
    fill(folder / "raw")
    shutil.copytree(folder / "raw", folder / "whole")
    migrate(folder / "whole", "int8")
    wanted, chance = contents(folder / "whole"), random.Random(0)
    steps = next(n for n in range(20, 1000, 20) if not survives(folder, n))
    for _ in range(KILLS):
        path = folder / "kv"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder / "raw", path)
        while in_a_child(path, step := chance.randint(1, steps)):
            check_killed(path, step)  # then run again, to be killed again or not
        check_migrated(path, "int8")
        assert contents(path) == wanted


def survives(folder: Path, step: int) -> bool:
    """Whether a migration comes as far as this step."""
    shutil.rmtree(folder / "kv", ignore_errors=True)
    shutil.copytree(folder / "raw", folder / "kv")
    return in_a_child(folder / "kv", step)


if __name__ == "__main__":
    kill_at_random_steps(Path(sys.argv[1]))
