"""What a folder store finds, repairs and refuses."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.store import FolderStore, StoreStat
from kvlink_rag.store.folder import files as files_module

pytestmark = pytest.mark.usefixtures("raw_folders")

ABSENT = "0" * 64


def make_record(*token_ids: int, seed: int = 0) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn((2, 1, len(token_ids), 4), generator=generator)
    return ChunkKV(token_ids, (), "model-a", tensor, tensor + 1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[FolderStore]:
    store = FolderStore(tmp_path / "kv")
    yield store
    store.close()


def file_of(store: FolderStore, record: ChunkKV) -> Path:
    return store.path / "chunks" / record.key[:2] / f"{record.key}.safetensors"


def all_files(store: FolderStore) -> list[Path]:
    return [path for path in (store.path / "chunks").rglob("*") if path.is_file()]


def damage(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.unlink()
    path.write_bytes(data)


class TestVerifyAndPrune:
    def test_finds_and_removes_everything(self, folder: FolderStore) -> None:
        good, bad, gone = make_record(1), make_record(2), make_record(3)
        for record in (good, bad, gone):
            folder.put(record, ["a"])
        damage(file_of(folder, bad))
        file_of(folder, gone).unlink()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        chunks = folder.path / "chunks"
        left = chunks / good.key[:2] / f".writing-{files_module.HOST}-{dead.pid}-00"
        left.write_bytes(b"half")
        alive = chunks / good.key[:2] / f".writing-{files_module.HOST}-{os.getpid()}-00"
        alive.write_bytes(b"half")
        foreign = chunks / "notes.txt"
        foreign.write_text("hello")
        misplaced = chunks / f"{good.key}.safetensors"
        misplaced.write_bytes(file_of(folder, good).read_bytes())

        seen: list[tuple[int, int]] = []
        check = folder.verify(progress=lambda done, total: seen.append((done, total)))
        assert seen == [(number, 6) for number in range(1, 7)]
        assert check.checked == 6
        assert check.corrupt == [str(file_of(folder, bad))]
        assert set(check.orphans) == {str(left), str(foreign), str(misplaced)}
        assert check.missing == [gone.key]
        assert not check.clean
        assert len(all_files(folder)) == 6  # changed nothing

        assert folder.prune() == check
        assert set(all_files(folder)) == {file_of(folder, good), alive}
        assert folder.verify().clean
        assert folder.get(good.key) is not None

    def test_an_old_temporary_file_is_left_behind_whoever_wrote_it(
        self, folder: FolderStore
    ) -> None:
        folder.put(make_record(1), ["a"])
        path = folder.path / "chunks" / f".writing-0badbeef-{os.getpid()}-00"
        path.write_bytes(b"half")
        assert folder.verify().clean
        os.utime(path, (0, 0))
        assert folder.prune().orphans == [str(path)]
        assert not path.exists()


def open_and_put(path: Path, record: ChunkKV) -> FolderStore:
    store = FolderStore(path)
    store.put(record, ["b"])
    return store


class TestWhatGoesWrong:
    def test_disk_full(self, folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        record = make_record(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match=r"No space left.*free some space") as caught:
                folder.put(record, ["a"])
        assert str(folder.path) in str(caught.value)
        assert all_files(folder) == []
        assert folder.stat() == StoreStat(0, 0, 0, 0, 0)
        folder.put(record, ["a"])
        assert folder.verify().clean

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
    def test_a_disk_that_is_really_full(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=False
        )
        if mounted.returncode != 0:
            pytest.skip("this machine does not let us mount a small disk")
        try:
            store = FolderStore(disk / "kv")
            small, big = make_record(1), make_record(*range(60_000))
            store.put(small, ["a"])
            with pytest.raises(StoreError, match=r"No space left.*free some space"):
                store.put(big, ["b"])
            assert all_files(store) == [file_of(store, small)]
            assert store.get(small.key) is not None
            assert store.verify().clean
            store.close()
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)  # files are mapped

    def test_renaming_fails(self, folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(source: Path, target: Path) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refused)
            with pytest.raises(StoreError, match=r"Permission denied.*permission"):
                folder.put(make_record(1), ["a"])
        assert all_files(folder) == []
        assert folder.stat() == StoreStat(0, 0, 0, 0, 0)

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "kv").write_text("hello")
        with pytest.raises(StoreError, match="cannot open the store"):
            FolderStore(tmp_path / "kv")
        with pytest.raises(StoreError):
            FolderStore(tmp_path / "kv" / "deeper")
        assert (tmp_path / "kv").read_text() == "hello"

    def test_another_programs_database(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "catalog.sqlite") as database:
            database.execute("CREATE TABLE theirs (x)")
        database.close()
        with pytest.raises(StoreError, match="format 0"):
            FolderStore(tmp_path)

    def test_a_newer_format(self, folder: FolderStore) -> None:
        folder.close()
        with sqlite3.connect(folder.path / "catalog.sqlite") as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
        with pytest.raises(StoreError, match=r"format 99 .*newer"):
            FolderStore(folder.path)

    def test_catalog_deleted(self, folder: FolderStore) -> None:
        record = make_record(1, 2)
        folder.put(record, ["a"])
        folder.close()
        (folder.path / "catalog.sqlite").unlink()
        with pytest.warns(KVLinkWarning, match="made anew from 1 files"):
            again = FolderStore(folder.path)
        assert again.get(record.key) is not None
        assert again.stat().tokens == 2
        assert again.verify().clean
        assert again.verify().unreferenced == [record.key]
        again.close()

    @pytest.mark.parametrize("kept", [0, 100, 5000])
    def test_catalog_overwritten(self, folder: FolderStore, kept: int) -> None:
        record = make_record(1, 2)
        folder.put(record, ["a"])
        folder.close()
        catalog = folder.path / "catalog.sqlite"
        data = catalog.read_bytes()
        catalog.write_bytes(data[:kept] + b"garbage " * ((len(data) - kept) // 8))
        with pytest.warns(KVLinkWarning, match="made anew from 1 files"):
            again = open_and_put(folder.path, make_record(3))  # damage further in is met later
        assert again.get(record.key) is not None
        assert again.stat().entries == 2
        assert again.verify().clean
        again.close()

    def test_verify_names_a_damaged_catalog_and_prune_repairs_it(self, folder: FolderStore) -> None:
        folder.put(make_record(1), ["a"])
        folder.close()
        catalog = folder.path / "catalog.sqlite"
        data = catalog.read_bytes()
        catalog.write_bytes(data[:8192] + b"\xff" * (len(data) - 8192))
        again = FolderStore(folder.path)
        assert again.verify().corrupt == [str(catalog)]
        with pytest.warns(KVLinkWarning, match="made anew"):
            again.prune()
        assert again.verify().clean
        again.close()


class TestWhatLeadsElsewhere:
    """A folder that was copied from somebody may hold links and pipes in the place of caches."""

    @pytest.mark.parametrize("what", ["link", "dangling link", "pipe"])
    def test_no_file_is_reached_through_a_file(
        self, folder: FolderStore, tmp_path: Path, what: str
    ) -> None:
        record = make_record(1)
        folder.put(record, ["a"])
        path = file_of(folder, record)
        outside = tmp_path / "outside"
        os.rename(path, outside)
        if what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(outside if what == "link" else tmp_path / "none")
        assert folder.verify().corrupt == [str(path)]
        with pytest.warns(KVLinkWarning, match="link or no regular file"):
            assert folder.get(record.key) is None
        assert not path.is_symlink()
        assert not path.exists()
        assert outside.exists()
        folder.put(record)
        assert folder.get(record.key) is not None

    def test_no_file_is_reached_through_a_folder(self, folder: FolderStore, tmp_path: Path) -> None:
        record = make_record(1)
        folder.put(record, ["a"])
        file = file_of(folder, record)
        outside = tmp_path / "outside"
        os.rename(file.parent, outside)
        file.parent.symlink_to(outside)
        with pytest.warns(KVLinkWarning, match="link in a folder's place"):
            assert folder.get(record.key) is None
        for change in (lambda: folder.put(record), lambda: folder.release(["a"])):
            with pytest.raises(StoreError, match="link in a folder's place"):
                change()
        assert not folder.has(record.key)
        assert folder.verify().missing == [record.key]
        assert [path.name for path in outside.iterdir()] == [file.name]
        file.parent.unlink()
        folder.put(record)
        assert folder.get(record.key) is not None

    def test_a_folder_in_a_files_place(self, folder: FolderStore) -> None:
        record = make_record(1)
        path = file_of(folder, record)
        path.mkdir(parents=True)
        with pytest.warns(KVLinkWarning, match="no regular file"):
            assert folder.get(record.key) is None
        with pytest.raises(StoreError, match="cannot store"):
            folder.put(record)

    @pytest.mark.parametrize(
        "key",
        [
            "../" + "0" * 61,
            "/" + "0" * 63,
            "0" * 64 + "/..",
            "\u0660" * 64,
            "0" * 63 + "\0",
            None,
            0,
        ],
    )
    def test_keys_do_not_leave_the_folder(self, folder: FolderStore, key: object) -> None:
        for use in (folder.get, folder.has, lambda key: folder.refer([("a", key)])):
            with pytest.raises(InputError, match="no key"):
                use(key)  # type: ignore[operator]


def as_nobody(code: str, *arguments: object) -> str:
    """Run code without the rights of root, to which no folder is read-only."""
    if os.getuid() == 0:
        code = f"import os; from kvlink_rag.store import *; os.setuid(65534)\n{code}"
    root = str(Path(files_module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_ONLY = """
from kvlink_rag.store import FolderStore
from kvlink_rag.errors import StoreError
store = FolderStore(sys.argv[1])
found = store.get(sys.argv[2])
print(len(found.token_ids), store.stat().entries, store.verify().clean)
for change in (lambda: store.put(found), lambda: store.release(["a"]), store.prune):
    try:
        change()
    except StoreError as error:
        print("read-only" in str(error))
store.close()
"""

UNREADABLE = """
from kvlink_rag.store import FolderStore
from kvlink_rag.errors import StoreError
try:
    FolderStore(sys.argv[1])
except StoreError as error:
    print(error)
"""


@pytest.fixture
def open_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users can reach (pytest's own are closed to them)."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        for path in [Path(name), *Path(name).rglob("*")]:
            path.chmod(0o755)


def test_a_read_only_folder_can_be_read(open_path: Path) -> None:
    record = make_record(1, 2, 3)
    store = FolderStore(open_path / "kv")
    store.put(record, ["a"])
    store.close()
    for path in [store.path, *store.path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = as_nobody(READ_ONLY, store.path, record.key).split()
    assert out == ["3", "1", "True", "True", "True", "True"]


def test_an_unreadable_folder_is_left_alone(open_path: Path) -> None:
    (open_path / "kv").mkdir(mode=0o300)
    (open_path / "kv").chmod(0o333)
    out = as_nobody(UNREADABLE, open_path / "kv")
    assert "Permission denied" in out
    assert list((open_path / "kv").iterdir()) == []


class TestAFolderThatVanishes:
    """Its disk is taken away and comes back, with what it had or empty."""

    def test_answers_stay_right_and_it_recovers_by_itself(self, tmp_path: Path) -> None:
        chunks, path = ["Fact one.", "Fact two."], tmp_path / "kv"
        expected = tiny.engine().answer("Which?", chunks, max_new_tokens=4).token_ids
        engine = tiny.engine(store=path)
        engine.index(chunks, progress=False)
        for comes_back in (True, False):
            path.rename(tmp_path / "away")
            with pytest.warns(KVLinkWarning, match="not kept.*kv.*No such file") as warned:
                answer = engine.answer("Which?", chunks, max_new_tokens=4)
            assert len(warned) == 1
            assert (answer.token_ids, answer.report.misses) == (expected, 2)
            assert not path.exists()  # whatever is there now may be another disk
            if comes_back:
                (tmp_path / "away").rename(path)
            else:
                path.mkdir()
                assert engine.answer("Which?", chunks, max_new_tokens=4).report.misses == 2
            answer = engine.answer("Which?", chunks, max_new_tokens=4)
            assert (answer.token_ids, answer.report.hits) == (expected, 2)
            assert engine.store.verify().clean
            assert FolderStore(path).stat().entries == engine.store.stat().entries
        engine.store.close()

    def test_what_is_restored_is_used(self, tmp_path: Path) -> None:
        store, record, late = FolderStore(tmp_path / "kv"), make_record(1), make_record(2)
        store.put(record, ["a"])
        store.stat()
        shutil.copytree(tmp_path / "kv", tmp_path / "backup")
        shutil.rmtree(tmp_path / "kv")
        assert store.get(record.key) is None
        with pytest.raises(StoreError, match="No such file"):
            store.put(late)
        shutil.copytree(tmp_path / "backup", tmp_path / "kv")
        assert store.get(record.key) is not None
        store.put(late, ["b"])
        store.close()
        again = FolderStore(tmp_path / "kv")
        assert sorted(again.references()) == [("a", record.key), ("b", late.key)]
        assert again.verify().clean
        again.close()
