from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import times
from pypdf import PdfWriter
from tiny_cli import Shell, WordVectors, paragraphs
from typer.testing import CliRunner

from kvlink_rag import Adapter, KVIndex, KVLinkEngine, PromptTemplate, demo
from kvlink_rag.adapters.adapter import AdapterKind
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.cli import app
from kvlink_rag.cli.shared import parse_size
from kvlink_rag.errors import InputError
from kvlink_rag.index import ingest
from kvlink_rag.index.catalog import IndexCatalog
from kvlink_rag.index.check import verify_index
from kvlink_rag.index.ingest import Splitting, make_plan
from kvlink_rag.store import FolderStore


@pytest.fixture(autouse=True)
def _small_embeddings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "model" not in request.keywords:
        monkeypatch.setattr("kvlink_rag.index.index.SentenceEmbeddings", WordVectors)


@pytest.fixture
def shell(tmp_path: Path, model_folder: str) -> Shell:
    return Shell(tmp_path, model_folder)


def test_index_ask_and_store_from_end_to_end(shell: Shell) -> None:
    shell.write("apples.md", "# Apples\n\n" + paragraphs("apple"))
    shell.write("deep/pears.txt", paragraphs("pear"))
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(shell.docs / "scan.pdf")
    result = shell.index()
    assert "2 added, 0 changed, 0 unchanged, 0 removed, 1 skipped" in result.stdout
    assert "scan.pdf: PDF without text" in result.stderr

    answer = shell.run("ask", shell.out, "pear things?", "-k", "2", "--max-new-tokens", "5")
    assert "[1]" in answer.stdout
    assert "pears.txt part" in answer.stdout
    assert "[3]" not in answer.stdout
    assert "recompute 4 %: TTFT" in answer.stdout
    assert "auto: plain reuse answers worse than full prefill" in answer.stdout
    assert "2 hits, 0 misses" in answer.stdout
    asked = shell.run("ask", shell.out, "pear things?", "--strategy", "reuse")
    assert "reuse: TTFT" in asked.stdout
    assert "auto" not in asked.stdout

    assert "chunks" in shell.run("store", "stat", shell.out).stdout
    assert "clean" in shell.run("store", "verify", shell.out).stdout
    assert "checked" in shell.run("store", "prune", shell.out).stdout


def test_streaming_and_not_streaming_print_the_same_answer(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index("--codec", "raw")  # the first answer computes the prefix, the second reads it
    arguments = ("ask", shell.out, "apple?", "-k", "1", "--max-new-tokens", "8")
    answers = [
        shell.run(*arguments, way).stdout.rpartition("[1]")[0]
        for way in ("--stream", "--no-stream")
    ]
    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_a_second_run_does_nothing_and_loads_no_model(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.write("b.bin.txt", "x\0y")
    shell.index()
    before = shell.state()
    monkeypatch.setattr(KVLinkEngine, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    result = shell.index()
    assert "0 added, 0 changed, 1 unchanged, 0 removed, 1 skipped" in result.stdout
    assert shell.state() == before


def test_only_the_changed_part_is_computed_and_what_vanished_is_removed(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shell.write("changed.txt", paragraphs("apple", 12))
    shell.write("same.txt", paragraphs("pear"))
    vanished = shell.write("vanished.txt", paragraphs("plum"))
    shell.index()
    changed.write_text(changed.read_text().replace("paragraph 11", "paragraph eleven"))
    vanished.unlink()
    shell.write("new.txt", paragraphs("fig", 1))

    computed: list[int] = []
    index = KVLinkEngine.index

    def counted(engine: KVLinkEngine, *arguments: Any, **options: Any) -> Any:
        report = index(engine, *arguments, **options)
        computed.append(report.misses)
        return report

    monkeypatch.setattr(KVLinkEngine, "index", counted)
    result = shell.index()
    assert "1 added, 1 changed, 1 unchanged, 1 removed, 0 skipped" in result.stdout
    assert sum(computed) == 2
    with shell.catalog() as catalog:
        texts = [chunk.text for chunk in catalog.get(catalog.ids())]
        assert set(catalog.sources()) == {str(p) for p in shell.docs.glob("*.txt")}
    assert any("paragraph eleven" in text for text in texts)
    assert not any("paragraph 11" in text or "plum" in text for text in texts)


def test_a_moved_file_costs_no_encoding(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shell.write("one/notes.txt", paragraphs("apple"))
    shell.index()
    before = shell.state()
    (shell.docs / "two").mkdir()
    path.rename(shell.docs / "two" / "notes.txt")
    monkeypatch.setattr(
        "kvlink_rag.runners.transformers.encode.Encoder.encode",
        lambda self, texts, *a, **k: iter([]) if not texts else pytest.fail("encoded again"),
    )
    assert "1 added, 0 changed, 0 unchanged, 1 removed" in shell.index().stdout
    assert shell.state()[2] == before[2]


def test_files_outside_of_the_given_paths_stay(shell: Shell, tmp_path: Path) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    other = tmp_path / "other.txt"
    other.write_text(paragraphs("pear"))
    result = shell.run("index", other, "--out", shell.out)
    assert "1 added, 0 changed, 0 unchanged, 0 removed" in result.stdout
    other.unlink()
    assert "1 removed" in shell.run("index", other, "--out", shell.out).stdout
    with shell.catalog() as catalog:
        assert list(catalog.sources()) == [str(shell.docs / "a.txt")]


def test_a_file_that_becomes_binary_is_removed_and_one_that_cannot_be_read_stays(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("binary.txt", paragraphs("apple"))
    locked = shell.write("locked.txt", paragraphs("pear"))
    shell.index()
    shell.write("binary.txt", "x\0y")
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    result = shell.index()
    assert "1 removed, 2 skipped" in result.stdout
    assert "locked.txt: cannot be read: Permission denied" in result.stderr
    with shell.catalog() as catalog:
        assert list(catalog.sources()) == [str(locked)]


def test_other_encodings_are_indexed_with_a_note(shell: Shell) -> None:
    (shell.docs / "latin.txt").write_bytes("Le café était fermé à Noël.".encode("cp1252"))
    result = shell.index()
    assert "latin.txt: read as cp1252, it is not UTF-8" in result.stdout
    with shell.catalog() as catalog:
        assert [c.text for c in catalog.get(catalog.ids())] == ["Le café était fermé à Noël."]


def test_settings_of_the_first_run_are_kept_and_other_ones_redo_the_files(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple", 20))
    shell.index()
    assert "1 unchanged" in shell.run("index", shell.docs, "--out", shell.out).stdout
    result = shell.run("index", shell.docs, "--out", shell.out, "--chunk-tokens", "60")
    assert "1 changed" in result.stdout
    with shell.catalog() as catalog:
        assert max(len(c.text) for c in catalog.get(catalog.ids())) <= 60


def test_a_run_cut_off_after_any_commit_is_repaired_by_the_next(
    shell: Shell, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops after commit 1, 2, 3, ... of an update, then runs undisturbed."""
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Shell(tmp_path / "undisturbed", model_folder)
    undisturbed.docs = shell.docs
    expected = None
    for stop in range(1, 30):
        shell.out = tmp_path / f"index-{stop}"
        for path in shell.docs.glob("*"):
            path.unlink()
        shell.write("a.txt", paragraphs("apple", 8))
        shell.write("b.txt", paragraphs("pear", 4))
        shell.write("c.txt", paragraphs("plum", 4))
        shell.index()
        shell.write("a.txt", paragraphs("apple", 4) + "\n\nSomething new at the end.")
        (shell.docs / "b.txt").unlink()
        shell.write("d.txt", paragraphs("fig", 2))
        if expected is None:
            undisturbed.index()
            expected = undisturbed.state()
        finished = _index_until(shell, stop, monkeypatch)
        shell.index()
        assert shell.state() == expected, f"cut off after commit {stop}"
        if finished:
            break
    else:
        pytest.fail("the update never finished")
    assert stop > 4


def _index_until(shell: Shell, stop: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Index, but fail on every write after the first ``stop`` commits; whether it got through."""
    writing, commits = IndexCatalog.writing, [0]

    @contextmanager
    def limited(catalog: IndexCatalog) -> Iterator[Any]:
        if commits[0] >= stop:
            raise KeyboardInterrupt
        with writing(catalog) as tx:
            yield tx
        commits[0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(IndexCatalog, "writing", limited)
        arguments = ["index", str(shell.docs), "--out", str(shell.out)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 130)
    return result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["index", "{empty}", "--out", "{out}"], 1, "nothing to index: no text, Markdown or PDF"),
        (["index", "{empty}/x", "--out", "{out}"], 1, "no such file or folder"),
        (["index", "{empty}", "--out", "{out}", "--overlap", "300"], 1, "overlap of 300"),
        (["index", "{text}", "--out", "{out}", "--model", "/no/model"], 1, "no model at"),
        (["index", "{text}", "--out", "{out}", "--codec", "zip"], 1, "codec 'zip' is unknown"),
        (["index", "{text}", "--out", "{text}", "--model", "{model}"], 1, "cannot open the index"),
        (["ask", "{empty}", "why?"], 1, "is no index"),
        (["store", "stat", "{empty}"], 1, "neither an index nor a store"),
        (["store", "verify", "{empty}/x"], 1, "neither an index nor a store"),
        (["store", "prune", "{empty}"], 1, "neither an index nor a store"),
        (["index", "{empty}"], 2, "--out"),
        (["ask", "{empty}", "why?", "--strategy", "magic"], 2, "magic"),
        (["nothing"], 2, "nothing"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, model_folder: str, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    places = {
        "empty": tmp_path / "empty",
        "text": tmp_path / "text.txt",
        "out": tmp_path / "out",
        "model": model_folder,
    }
    result = CliRunner().invoke(app, [a.format(**places) for a in arguments])
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
        assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_questions_that_cannot_be_answered_are_one_line(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    for options, message in (
        (["why?", "-k", "0"], "k is 0"),
        ([" "], "question"),
        (["why?", "--strategy", "link"], "adapter"),
        (["why?", "--max-new-tokens", "0"], "max_new_tokens"),
        (["why?", "--temperature", "-1"], "temperature"),
    ):
        result = shell.run("ask", shell.out, *options, code=1)
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_another_model_is_refused(shell: Shell, tmp_path: Path) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    result = shell.run("index", shell.docs, "--out", shell.out, "--model", tmp_path, code=1)
    assert "was made with the model" in result.stderr


def test_ctrl_c_ends_with_130(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.write("a.txt", paragraphs("apple"))

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(KVIndex, "add", interrupted)
    assert shell.index(code=130).stderr.strip().endswith("interrupted")


def test_verify_finds_a_flipped_byte_and_prune_removes_it(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    damaged = next((shell.out / "kv").rglob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-10] ^= 1
    damaged.write_bytes(data)
    for folder in (shell.out, shell.out / "kv"):
        result = shell.run("store", "verify", folder, code=1)
        assert "corrupt" in result.stdout
        verdict = result.stderr.splitlines()[-1]
        assert verdict.startswith("not clean, ")
        assert f"1 corrupt, which kvlink store prune {folder} removes" in verdict
    assert "removed" in shell.run("store", "prune", shell.out / "kv").stdout
    shell.run("store", "verify", shell.out)


def test_the_last_line_of_verify_says_what_the_exit_code_says(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    caches = sorted((shell.out / "kv").rglob("*.safetensors"))
    count = len(caches)
    for folder in (shell.out, shell.out / "kv"):
        last = shell.run("store", "verify", folder).stdout.splitlines()[-1]
        assert last == f"clean: {count} checked"

    (shell.out / "kv" / "chunks" / "left.txt").write_text("x")
    caches[0].unlink()
    for folder in (shell.out, shell.out / "kv"):
        last = shell.run("store", "verify", folder, code=1).stderr.splitlines()[-1]
        assert last.startswith(f"not clean, {count} checked: 1 orphaned, 1 missing, which ")
        assert f"kvlink store prune {folder} removes" in last
    shell.run("store", "prune", shell.out)
    assert shell.run("store", "verify", shell.out).stdout == f"clean: {count - 1} checked\n"

    store = FolderStore(shell.out / "kv")
    tensor = torch.zeros(1, 1, 2, 4)
    store.put(ChunkKV((1, 2), (), "another model", tensor, tensor))
    store.close()
    for folder in (shell.out, shell.out / "kv"):
        last = shell.run("store", "verify", folder).stdout.splitlines()[-1]
        unused = f"kvlink store prune {folder} removes the 1 that no document refers to"
        assert last == f"clean: {count} checked; {unused}"

    with closing(sqlite3.connect(shell.out / "index.sqlite")) as database, database:
        database.execute("UPDATE chunks SET embedding = x'00' WHERE number = 1")
    last = shell.run("store", "verify", shell.out, code=1).stderr.splitlines()[-1]
    damaged = "1 damaged in index.sqlite, which prune leaves: restore it from a backup, or "
    assert last.startswith(f"not clean, {count} checked: {damaged}delete those chunks")


def test_caches_that_wait_for_their_first_retrieval(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index("--cache-after", "1")
    assert "caches       0 (0 tokens" in shell.run("store", "stat", shell.out).stdout
    for misses in (1, 0):
        answer = shell.run("ask", shell.out, "apples?", "-k", "1", "--max-new-tokens", "2")
        assert f"{1 - misses} hits, {misses} misses" in answer.stdout
    assert "50.0% hits" in shell.run("store", "stat", shell.out).stdout
    shell.index("--cache-after", "0")  # nothing else to do: from the next change on
    shell.write("b.txt", paragraphs("banana"))
    shell.index()
    answer = shell.run("ask", shell.out, "banana things?", "-k", "1", "--max-new-tokens", "2")
    assert "1 hits, 0 misses" in answer.stdout
    shell.index("--cache-after", "-1", code=2)


def test_budget_and_pins(shell: Shell) -> None:
    kept = shell.write("a.txt", paragraphs("apple"))
    shell.write("b.txt", paragraphs("banana"))
    shell.index()
    assert "no limit" in shell.run("store", "budget", shell.out).stdout
    store = FolderStore(shell.out / "kv")
    nbytes = store.stat().nbytes
    assert "pinned" in shell.run("store", "pin", shell.out, kept).stdout
    result = shell.run("store", "budget", shell.out, str(nbytes // 2), "--namespace", "x/=1MiB")
    assert "x/: 1.0 MB" in result.stdout
    assert store.stat().nbytes <= nbytes // 2
    with shell.catalog() as catalog:
        ids = catalog.ids(str(kept))
    assert store.pinned() == [str(kept)]
    assert all(store.has(key) for id in ids for _, key in store.references(id))
    stat = shell.run("store", "stat", shell.out).stdout
    assert "budget" in stat
    assert f"{len(ids)} caches are pinned" in stat
    assert (
        "no limit"
        in shell.run("store", "budget", shell.out, "none", "--namespace", "x/=none").stdout
    )
    kept.write_text(paragraphs("cherry"))
    shell.index()
    assert store.usage().pinned == store.stat().entries > 0  # what the file holds now
    kept.unlink()
    shell.index()
    assert "0 documents are pinned" in shell.run("store", "unpin", shell.out, kept).stdout
    assert "NAME=SIZE" in shell.run("store", "budget", shell.out, "--namespace", "x", code=1).stderr
    assert "has no file and no chunk" in shell.run("store", "pin", shell.out, "z", code=1).stderr
    assert "is no size" in shell.run("store", "budget", shell.out, "much", code=1).stderr
    store.close()


def test_an_estimate_before_anything_is_indexed(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    options = ["--model", shell.model, "--chunk-tokens", "60", "--overlap", "0"]
    result = shell.run("store", "estimate", shell.docs, *options)
    assert "1 documents" in result.stdout
    for word in ("raw", "int4", "retrieval", "indexing"):
        assert word in result.stdout
    assert not shell.out.exists()
    (shell.docs / "a.txt").unlink()
    assert "nothing to index" in shell.run("store", "estimate", shell.docs, code=1).stderr


def test_a_store_is_migrated(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    assert " -> " in shell.run("store", "migrate", shell.out, "--codec", "int8").stdout
    assert "codec int8" in shell.run("store", "stat", shell.out).stdout
    answer = shell.run("ask", shell.out, "apples?", "-k", "1", "--max-new-tokens", "2")
    assert "1 hits, 0 misses" in answer.stdout
    assert "clean" in shell.run("store", "verify", shell.out).stdout
    result = shell.run("store", "migrate", shell.out, "--codec", "int4", code=1)
    assert "index again" in result.stderr


def test_an_index_with_encrypted_caches(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.write("a.txt", paragraphs("apple"))
    assert "KVLINK_STORE_KEY" in shell.index("--encrypt", code=1).stderr
    monkeypatch.setenv("KVLINK_STORE_KEY", "5e" * 32)
    shell.index("--encrypt")
    answer = shell.run("ask", shell.out, "apples?", "-k", "1", "--max-new-tokens", "2")
    assert "1 hits, 0 misses" in answer.stdout
    assert "clean" in shell.run("store", "verify", shell.out).stdout
    files = [path for path in (shell.out / "kv" / "chunks").rglob("*") if path.is_file()]
    assert files
    assert all(path.suffix == ".sealed" for path in files)
    archive = shell.out.parent / "index.tar"
    shell.run("store", "export", shell.out, archive)
    shell.run("store", "import", archive, shell.out.parent / "there")
    monkeypatch.setenv("KVLINK_STORE_KEY", "00" * 32)
    assert "key" in shell.run("store", "verify", shell.out, code=1).stderr


def test_machines_that_share_a_remote(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("bees.md", paragraphs("bee"))
    url = f"file://{tmp_path}/shared"
    shell.index("--remote", url)
    objects = list((tmp_path / "shared").rglob("*.safetensors"))
    assert objects
    said = shell.run("store", "stat", shell.out).output
    assert "remote       0 uploads and deletions wait" in said

    # the other machine: it has the documents, and computes nothing
    shell.out = tmp_path / "other"
    monkeypatch.setenv("KVLINK_REMOTE", url)
    shell.index()
    assert not list(shell.out.rglob("*.safetensors"))
    assert ", 0 misses, " in shell.run("ask", shell.out, "bee paragraph 1?").output
    assert list(shell.out.rglob("*.safetensors"))

    (shell.docs / "bees.md").unlink()
    shell.index()
    assert not any(path.exists() for path in objects)


@pytest.mark.filterwarnings("always::kvlink_rag.errors.KVLinkWarning")
def test_uploads_wait_for_a_remote_that_is_down(shell: Shell, tmp_path: Path) -> None:
    shell.write("bees.md", paragraphs("bee"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"redis://127.0.0.1:{closed.getsockname()[1]}"
        output = shell.index("--remote", url).output
    assert output.count("warning: ") == 1
    assert "uploads wait: the same command goes on with them" in output
    assert ", 0 misses, " in shell.run("ask", shell.out, "bee paragraph 1?").output
    # another remote, as good as the same one that has come back
    output = shell.index("--remote", f"file://{tmp_path}/shared").output
    assert "1 unchanged" in output
    assert "uploads wait" not in output
    assert list((tmp_path / "shared").rglob("*.safetensors"))


def test_encryption_asked_for_is_never_left_out(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    monkeypatch.setenv("KVLINK_STORE_KEY", "5e" * 32)
    # nothing has changed, and yet this is no success
    assert "made without encryption" in shell.index("--encrypt", code=1).stderr


def test_an_archive_is_imported(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    archive = shell.out.parent / "index.tar"
    there = shell.out.parent / "there"
    assert "files" in shell.run("store", "export", shell.out, archive).stdout
    assert "all verified" in shell.run("store", "import", archive, there).stdout
    answer = shell.run("ask", there, "apples?", "-k", "1", "--max-new-tokens", "2")
    assert "1 hits, 0 misses" in answer.stdout
    assert "is there already" in shell.run("store", "import", archive, there, code=1).stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500MB", 500 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("2kb", 2000),
        (" 3 TB ", 3 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "0", "1.2.3", "5 apples", "0.1", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_an_index_keeps_the_codec_it_was_made_with(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index("--codec", "int8")
    answer = shell.run("ask", shell.out, "apples?", "-k", "2", "--max-new-tokens", "2")
    assert "2 hits, 0 misses" in answer.stdout
    store = FolderStore(shell.out / "kv")
    assert store.codec == "int8"
    store.close()
    shell.write("b.txt", paragraphs("banana"))
    shell.index()  # goes on with it
    assert verify_index(shell.out).clean
    for name in ("a.txt", "c.txt"):  # nothing to do, and something
        shell.write(name, paragraphs("apple"))
        message = shell.index("--codec", "int4", code=1).stderr
        assert "made with codec 'int8', not 'int4'" in message
    assert "1 added" in shell.index("--codec", "int8").stdout


@pytest.mark.slow
def test_bench_writes_its_results(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlink_rag.bench.indexing.TOKENS", 1000)
    text = shell.write("a.txt", paragraphs("apple", 40))
    options = ["--out", tmp_path / "bench", "--length", "300", "--repeats", "1"]
    result = shell.run("bench", "--model", shell.model, "--text", text, *options)
    assert "reuse" in result.stdout
    assert (tmp_path / "bench" / "bench.json").stat().st_size > 0


def test_paths_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recorded = {str(tmp_path / "ab" / "x.txt"): "1", str(tmp_path / "a" / "x.txt"): "2"}
    plan = make_plan([tmp_path / "a"], recorded, Splitting())
    assert plan.vanished == [str(tmp_path / "a" / "x.txt")]


@pytest.mark.parametrize(
    "change",
    [
        ("PromptTemplate", lambda: PromptTemplate(before="Read this:\n\n")),
        ("FORMAT_VERSION", 0),
        ("render_chunk", lambda chunk, template: chunk.text),
    ],
)
def test_files_are_done_again_when_their_caches_would_not_be_found(
    change: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Splitting().digest(b"text")
    assert Splitting().digest(b"text") == before
    assert Splitting(encode_behind="alone").digest(b"text") != before
    monkeypatch.setattr(ingest, change[0], change[1])
    assert Splitting().digest(b"text") != before


def test_only_adapters_that_change_caches_have_files_done_again(tmp_path: Path) -> None:
    plain = Splitting().digest(b"text")
    adapters = {
        "same caches": tiny_adapter("cache-preserving"),
        "own model": tiny_adapter("whole-model"),
        "other words": replace(
            tiny_adapter("cache-preserving"), prompt=PromptTemplate(before="Read this:\n\n")
        ),
    }
    digests = {}
    for name, adapter in adapters.items():
        adapter.save(tmp_path / name)
        digests[name] = Splitting(adapter=str(tmp_path / name)).digest(b"text")
    assert digests["same caches"] == plain
    assert len({plain, digests["own model"], digests["other words"]}) == 3


def test_an_adapter_of_the_index_answers_linked_from_the_same_caches(
    shell: Shell, tmp_path: Path
) -> None:
    tiny_adapter("cache-preserving").save(tmp_path / "adapter")
    shell.write("apples.txt", paragraphs("apple"))
    shell.index()
    before = shell.state()[2]
    question = ("ask", shell.out, "apple?", "-k", "1", "--max-new-tokens", "4")
    link = ("--strategy", "link")
    linked = shell.run(*question, *link, "--adapter", tmp_path / "adapter").output
    assert "link: TTFT" in linked
    assert "1 hits, 0 misses" in linked
    assert "reuse: TTFT" in shell.run(*question, "--strategy", "reuse").output
    assert "needs an adapter" in shell.run(*question, *link, code=1).stderr
    shell.index("--adapter", str(tmp_path / "adapter"))
    shell.write("pears.txt", paragraphs("pear"))
    shell.index()  # goes on with the adapter it has
    assert "link: TTFT" in shell.run(*question, *link).output
    assert "needs an adapter" in shell.run(*question, *link, "--adapter", "", code=1).stderr
    assert set(before) < set(shell.state()[2])
    assert "no adapter at" in shell.run(*question, "--adapter", "missing", code=1).stderr


def tiny_adapter(kind: AdapterKind) -> Adapter:
    return Adapter(kind, LinkTokens("shared", 2, 320, embeddings=torch.ones(2, 64)))


def test_help_and_module(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kvlink_rag", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(demo.__file__).parents[1])},
        check=True,
    )
    for command in ("demo", "index", "ask", "store", "bench"):
        assert command in result.stdout


def test_the_corpus_is_large_enough_and_named() -> None:
    files = demo.corpus_files()
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    assert len([p for p in text.split("\n\n") if not p.startswith("#")]) >= 150
    attribution = (files[0].parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(file.name in attribution for file in files)
    assert "CC BY-SA 4.0" in attribution


@pytest.mark.model
def test_demo(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    default_model_folder: str,
    default_embeddings_folder: str,
) -> None:
    """The demo's own steps over its smallest article, and again where it is indexed."""
    smallest = min(demo.corpus_files(), key=lambda file: file.stat().st_size)
    article = tmp_path / smallest.name
    text = smallest.read_text(encoding="utf-8")[: times(full=10**9, quick=1800)]
    article.write_text(text, encoding="utf-8")
    monkeypatch.setattr(demo, "corpus_files", lambda: [article])
    monkeypatch.setattr(demo, "QUESTIONS", ("When did the 1973 oil crisis begin?",))
    chunks = times(full=3, quick=2)
    monkeypatch.setattr(demo, "CHUNKS_PER_QUESTION", chunks)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 16)
    for _ in range(times(full=2, quick=1)):
        result = CliRunner().invoke(app, ["demo", "--folder", str(tmp_path / "index")])
        assert result.exit_code == 0, result.output
        assert "1973" in result.stdout
        assert f"{chunks} hits, 0 misses" in result.stdout
        assert "x sooner" in result.stdout
