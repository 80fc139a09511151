"""An index as one file: everything arrives, nothing foreign does."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny

from kvlink_rag import Chunk, InputError, KVIndex
from kvlink_rag.engine.choice import Choice
from kvlink_rag.index.archive import read_archive, write_archive
from kvlink_rag.index.check import verify_index
from kvlink_rag.store import FolderStore

CHUNKS = [Chunk(f"Fact {i} is {i * i}.", id=f"é-{i}", metadata={"n": i}) for i in range(12)]
QUESTION = "What is fact 3?"
SIZE = b"%011o\0" % 300_000_000
"""That a sparse member says it has."""


def embeddings(texts):
    return np.stack([np.random.default_rng(sum(text.encode())).random(8) for text in texts])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "index"
    with KVIndex.open(folder, tiny.engine(), embeddings=embeddings) as index:
        index.add(CHUNKS, progress=False)
        index.store.pin(["é-1"])
    return folder


@pytest.fixture(scope="module")
def archive(made: Path) -> Path:
    path = made.parent / "index.tar"
    write_archive(made, path)
    return path


def test_an_index_arrives_whole(made: Path, archive: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    check = read_archive(archive, tmp_path / "there", lambda *step: seen.append(step))
    assert check.checked == len(CHUNKS)
    assert seen[-1] == (12, 12)
    assert verify_index(tmp_path / "there").clean
    with (
        KVIndex.open(made, tiny.engine(), embeddings=embeddings) as here,
        KVIndex.open(tmp_path / "there", tiny.engine(), embeddings=embeddings) as there,
    ):
        assert there.get(c.document_id for c in CHUNKS) == CHUNKS
        assert there.store.pinned() == ["é-1"]
        answer = there.ask(QUESTION, max_new_tokens=4)
        assert answer.report.misses == 0
        assert answer.token_ids == here.ask(QUESTION, max_new_tokens=4).token_ids
        assert there.delete([CHUNKS[0].document_id]) == 1
        assert there.store.stat().entries == here.store.stat().entries - 1


def test_a_bare_store_arrives_whole(made: Path, tmp_path: Path) -> None:
    write_archive(made / "kv", tmp_path / "kv.tar")
    read_archive(tmp_path / "kv.tar", tmp_path / "there")
    here, there = FolderStore(made / "kv"), FolderStore(tmp_path / "there")
    assert there.references() == here.references()
    assert there.stat() == here.stat()
    here.close()
    there.close()


def test_a_codec_goes_with_it(tmp_path: Path) -> None:
    engine = tiny.engine(store=tmp_path / "kv", codec="int8")
    engine.index(CHUNKS, progress=False)
    write_archive(tmp_path / "kv", tmp_path / "kv.tar")
    read_archive(tmp_path / "kv.tar", tmp_path / "there")
    assert tiny.engine(store=tmp_path / "there").index(CHUNKS, progress=False).misses == 0


@pytest.mark.parametrize("bare", [True, False])
def test_what_was_tuned_goes_with_it(made: Path, tmp_path: Path, bare: bool) -> None:
    shutil.copytree(made, tmp_path / "here")
    chosen = Choice("recompute", "it was measured", 0.4)
    with KVIndex.open(tmp_path / "here", tiny.engine(), embeddings=embeddings) as index:
        index.engine.choices.keep(chosen)
    within = tmp_path / "here" / "kv" if bare else tmp_path / "here"
    write_archive(within, tmp_path / "one.tar")
    read_archive(tmp_path / "one.tar", tmp_path / "there")
    store = FolderStore(tmp_path / "there" if bare else tmp_path / "there" / "kv")
    engine = tiny.engine(store=store, strategy="auto")
    report = engine.answer(QUESTION, CHUNKS[:2], max_new_tokens=1).report
    assert (report.strategy, report.recompute, report.misses) == ("recompute", 0.4, 0)
    store.close()


def test_nobody_else_may_read_it(archive: Path, tmp_path: Path) -> None:
    assert archive.stat().st_mode & 0o777 == 0o600
    read_archive(archive, tmp_path / "there")
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "there").rglob("*")}
    assert modes == {True: 0o700, False: 0o600}


def test_what_is_removed_while_it_is_written_is_not_missed(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    write_archive(made, tmp_path / "a.tar")
    read_archive(tmp_path / "a.tar", copy)
    before = FolderStore(copy / "kv")
    key, entries = before.references("é-2")[0][1], before.stat().entries
    before.close()

    def remove(done: int, total: int) -> None:
        if done == 1:
            FolderStore(copy / "kv").release(["é-2"])

    write_archive(copy, tmp_path / "b.tar", remove)
    read_archive(tmp_path / "b.tar", tmp_path / "there")
    there = FolderStore(tmp_path / "there" / "kv")
    assert not there.has(key)
    assert there.stat().entries == entries - 1
    there.close()


def test_an_index_is_written_to_while_it_is_exported(archive: Path, tmp_path: Path) -> None:
    read_archive(archive, tmp_path / "copy")
    index = KVIndex.open(tmp_path / "copy", tiny.engine(), embeddings=embeddings)
    other = ThreadPoolExecutor(1)

    def change(done: int, total: int) -> None:
        if done == 1:
            other.submit(index.delete, ["é-2"]).result(30)
            other.submit(index.add, ["A new fact."], progress=False).result(30)

    write_archive(tmp_path / "copy", tmp_path / "b.tar", change)
    other.shutdown()
    index.close()
    read_archive(tmp_path / "b.tar", tmp_path / "there")
    with KVIndex.open(tmp_path / "there", tiny.engine(), embeddings=embeddings) as there:
        assert there.ids() == [chunk.id for chunk in CHUNKS]  # as they were


def rewritten(archive: Path, path: Path, **changes: bytes | None) -> Path:
    """A copy with files changed, left out (None) or added."""
    with tarfile.open(archive) as old, tarfile.open(path, "w") as new:
        for member in old:
            data = changes.pop(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
        for name, data in changes.items():
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            new.addfile(member, io.BytesIO(data or b""))
    return path


def members(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def refused(archive: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_archive(archive, tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} <= {archive.name}  # nothing left behind


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/etc/x",
        "kv/../../out",
        "kv/chunks/00/x.safetensors",
        "kv/catalog.sqlite-wal",
        "x",
    ],
)
def test_foreign_names_are_refused(archive: Path, tmp_path: Path, name: str) -> None:
    refused(rewritten(archive, tmp_path / "a.tar", **{name: b"x"}), tmp_path, "is no archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_only_files_are_taken(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("index.sqlite")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    refused(tmp_path / "a.tar", tmp_path, "is no archive")


def header(name: str, kind: bytes, size: int, tail: bytes = b"") -> bytes:
    """One of tar, with numbers that the module tarfile would not write."""
    member = tarfile.TarInfo(name)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    block[156:157] = kind
    block[386 : 386 + len(tail)] = tail
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_small_archive_cannot_fill_the_disk(tmp_path: Path) -> None:
    places = b"%011o\0%011o\0" % (0, 512)  # one piece of 512 bytes, the rest is a hole
    sparse = header("store.json", tarfile.GNUTYPE_SPARSE, 512, places.ljust(97, b"\0") + SIZE)
    (tmp_path / "bad.tar").write_bytes(sparse + b"{}".ljust(512) + bytes(1024))
    with pytest.raises(InputError, match=r"no archive of kvlink: it has 'store\.json'"):
        read_archive(tmp_path / "bad.tar", tmp_path / "there")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_impossible_numbers_are_damage(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(header("store.json", kind, -512) + bytes(2048))
    with pytest.raises(InputError, match="no whole archive"):
        read_archive(tmp_path / "bad.tar", tmp_path / "there")


@pytest.mark.parametrize("name", ["chunks/ab/ab" + "0" * 62 + ".safetensors", "catalog.sqlite"])
def test_nothing_lies_beside_an_index(archive: Path, tmp_path: Path, name: str) -> None:
    refused(rewritten(archive, tmp_path / "bad.tar", **{name: b"?"}), tmp_path, "both")


def test_nothing_lies_beside_a_store(made: Path, tmp_path: Path) -> None:
    write_archive(made / "kv", tmp_path / "kv.tar")
    bad = rewritten(tmp_path / "kv.tar", tmp_path / "bad.tar", **{"index.sqlite": b"?"})
    (tmp_path / "kv.tar").unlink()
    refused(bad, tmp_path, "both")


def test_damage_is_found(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    cache = next(name for name in members(archive) if name.endswith(".safetensors"))
    with tarfile.open(archive) as tar:
        place = tar.getmember(cache).offset_data + tar.getmember(cache).size - 1
    flipped = bytearray(data)
    flipped[place] ^= 1
    for bad, match in (
        (bytes(flipped), "is damaged"),
        (data[: place + 1], "no whole archive|is damaged"),
        (b"", "no whole archive"),
        (b"words" * 1000, "no whole archive"),
    ):
        (tmp_path / "a.tar").write_bytes(bad)
        refused(tmp_path / "a.tar", tmp_path, match)
    without = rewritten(archive, tmp_path / "a.tar", **{cache: None})
    refused(without, tmp_path, "is damaged")
    refused(
        rewritten(archive, tmp_path / "a.tar", **{"index.sqlite": b"no database"}),
        tmp_path,
        "cannot be used|is damaged",
    )
    refused(rewritten(archive, tmp_path / "a.tar", **{cache: b"{}"}), tmp_path, "is damaged")


def test_what_is_there_stays(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        read_archive(archive, tmp_path / "there")
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    with pytest.raises(InputError, match="neither an index nor a store"):
        write_archive(tmp_path / "there", tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_a_killed_export_leaves_the_old_one(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    target.write_bytes(b"old")
    script = (
        "import os, signal, sys\nfrom kvlink_rag.index.archive import write_archive\n"
        "def die(done, total):\n    if done == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_archive(sys.argv[1], sys.argv[2], die)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(made), str(target)], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    write_archive(made, target)
    assert read_archive(target, tmp_path / "there").clean
