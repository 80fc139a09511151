"""What a person is told before, while and after ``kvlink index`` works; dtype; ``kvlink ask``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_adapters
import torch
from tiny_cli import Shell, WordVectors, paragraphs
from typer.testing import CliRunner

from kvlink_rag import KVIndex, KVLinkEngine, PromptTemplate
from kvlink_rag.adapters.adapter import AdapterKind
from kvlink_rag.cli import app, index
from kvlink_rag.cli.options import Behind
from kvlink_rag.index import ingest
from kvlink_rag.prompt.layout import EncodeBehind
from kvlink_rag.store import FolderStore


@pytest.fixture
def shell(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, short_preamble: None
) -> Shell:
    monkeypatch.setattr("kvlink_rag.index.index.SentenceEmbeddings", WordVectors)
    return Shell(tmp_path, model_folder)


def size(text: str) -> float:
    """Bytes of the first size behind "take"."""
    number, unit = re.search(r"take ([\d.]+) (\w+)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_bytes_are_told_before_and_after(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple", 20))
    before, after = shell.index("--codec", "int8").stdout.split("added", 1)
    store = FolderStore(shell.out / "kv")
    stat = store.stat()
    store.close()
    assert f"{stat.tokens:,} tokens in {stat.entries} chunks;" in before
    assert "(codec int8)" in before
    assert "are free" in before
    assert size(after) == pytest.approx(stat.nbytes, rel=0.05)
    assert size(before) == pytest.approx(stat.nbytes, rel=0.35)  # files of tiny chunks have headers
    same = shell.index().stdout
    assert "to encode" not in same
    assert size(same) == pytest.approx(stat.nbytes, rel=0.05)


def test_only_what_is_missing_is_told(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    shell.write("b.txt", paragraphs("pear", 1))
    told = shell.index().stdout
    assert "tokens in 1 chunk;" in told
    shell.run("store", "budget", shell.out, "1")
    shell.write("c.txt", paragraphs("plum", 1))
    monkeypatch.setattr(KVIndex, "add", lambda *_, **__: [])  # which it has no room for
    assert "of which the budget keeps 1 B" in shell.index().stdout


def test_a_person_is_asked_before_much_is_stored(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("a.txt", paragraphs("apple"))
    monkeypatch.setattr(index, "ASK_ABOVE", 1000)
    monkeypatch.setattr(index, "_on_terminal", lambda: True)
    command = ["index", str(shell.docs), "--out", str(shell.out), "--model", shell.model]
    for answer in ("n\n", "\n"):
        result = CliRunner().invoke(app, command, input=answer)
        assert result.exit_code == 1
        assert "Go on? [y/N]" in result.stderr
        assert result.stderr.strip().endswith("nothing was indexed")
        assert not shell.out.exists()  # another codec can be chosen now
    result = CliRunner().invoke(app, [*command, "--codec", "int8"], input="y\n")
    assert (result.exit_code, "1 added" in result.stdout) == (0, True)
    shell.write("b.txt", paragraphs("pear"))
    assert "Go on?" not in shell.index("-y").output
    monkeypatch.setattr(index, "ASK_ABOVE", 10**9)
    shell.write("c.txt", paragraphs("plum"))
    assert "Go on?" not in shell.index().output
    monkeypatch.setattr(index, "_free_bytes", lambda folder: 1000)
    shell.write("d.txt", paragraphs("fig"))
    assert "Go on?" in CliRunner().invoke(app, command, input="n\n").stderr


def test_without_a_terminal_nobody_is_asked(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ASK_ABOVE", 1000)
    shell.write("a.txt", paragraphs("apple"))
    assert "no terminal to ask on: going on" in shell.index().stderr
    shell.write("b.txt", paragraphs("pear"))
    assert "no terminal" not in shell.index("--yes").stderr


def test_caches_that_come_later_are_not_announced(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    told = shell.index("--cache-after", "2").stdout
    assert "to encode" not in told
    assert "each is stored at retrieval 2 of its chunk" in told


def test_files_left_out_are_counted_and_the_first_named(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple"))
    shell.write(".git/config", "x")
    for number in range(7):
        shell.write(f"{number}.png", "x")
    result = shell.index()
    assert "0 skipped, 8 left out" in result.stdout
    assert f"left out {shell.docs}/.git: hidden folder" in result.stderr
    assert f"left out {shell.docs}/3.png: not named as text" in result.stderr
    assert "4.png" not in result.stderr
    assert "left out ... and 3 more" in result.stderr
    assert "0 skipped, 8 left out" in shell.index().stdout  # with nothing to do, too


@pytest.mark.timeout(120)
def test_what_goes_wrong_with_one_file_does_not_stop_the_others(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("good.txt", paragraphs("apple"))
    shell.write("bad.txt", paragraphs("pear"))
    shell.write("long.md", "# " + "a" * 9000 + "\n\n" + paragraphs("plum"))  # its title
    os.mkfifo(shell.docs / "pipe.txt")
    Path(os.fsdecode(os.fsencode(shell.docs) + b"/caf\xe9.txt")).write_text("x")
    chunks_of = ingest.chunks_of

    def fails(document: Any, *rest: Any) -> Any:
        if document.path.name == "bad.txt":
            raise RuntimeError("the splitter\nfailed")
        return chunks_of(document, *rest)

    monkeypatch.setattr(ingest, "chunks_of", fails)
    result = shell.index()
    assert "1 added, 0 changed, 0 unchanged, 0 removed, 4 skipped" in result.stdout
    for reason in (
        "bad.txt: cannot be split: the splitter failed",
        "long.md: cannot be split: ",
        "has a context of 4096",
        "pipe.txt: no regular file",
        "caf\\udce9.txt: its name is not UTF-8",
    ):
        assert reason in result.stderr
    monkeypatch.undo()
    (shell.docs / "good.txt").unlink()
    monkeypatch.setattr("kvlink_rag.index.index.SentenceEmbeddings", WordVectors)
    assert "1 added, 0 changed, 0 unchanged, 1 removed, 3 skipped" in shell.index().stdout


def test_if_no_file_can_be_split_there_is_no_index(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.write("bad.txt", paragraphs("pear"))
    monkeypatch.setattr(ingest, "chunks_of", lambda *_: [][0])
    result = shell.index(code=1)
    assert "bad.txt: cannot be split" in result.stderr
    assert "nothing to index" in result.stderr
    assert not shell.out.exists()


def test_the_bar_moves_with_each_batch_of_the_model(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlink_rag.runners.transformers.runner.BATCH_TOKENS", {"cpu": 100})
    told: list[int] = []
    totals: list[int] = []

    class Bar:
        def __init__(self, description: str, total: int, progress: object) -> None:
            totals.append(total)

        def __enter__(self) -> Any:
            return told.append

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(ingest, "token_progress", Bar)
    for name in "abc":  # 70 chunks each: more than are added at once
        shell.write(f"{name}.txt", paragraphs(name, 70))
    shell.index("--chunk-tokens", "60")
    assert told == sorted(set(told))
    assert len(told) > 40
    assert totals == [told[-1]]


def test_the_dtype_of_an_index_is_kept(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[torch.dtype] = []
    load = KVLinkEngine.from_pretrained

    def noted(*arguments: Any, **options: Any) -> KVLinkEngine:
        engine = load(*arguments, **options)
        loaded.append(engine.architecture.dtype)
        return engine

    monkeypatch.setattr(KVLinkEngine, "from_pretrained", noted)
    shell.write("a.txt", paragraphs("apple"))
    shell.index("--dtype", "bfloat16")
    question = ("ask", shell.out, "apple?", "-k", "1", "--max-new-tokens", "2")
    assert "1 hits, 0 misses" in shell.run(*question).output
    assert "0 hits, 1 misses" in shell.run(*question, "--dtype", "float32").output
    assert loaded == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert "1 unchanged" in shell.index().stdout
    shell.write("b.txt", paragraphs("pear"))
    shell.index()
    assert loaded[-1] == torch.bfloat16
    result = shell.index("--dtype", "auto")  # other caches: every file is done again
    assert "2 changed" in result.stdout
    assert loaded[-1] == torch.float32
    assert "1 hits, 0 misses" in shell.run(*question).output
    shell.index("--dtype", "int8", code=2)


def recorded_behind(shell: Shell) -> str | None:
    with shell.catalog() as catalog:
        return catalog.meta("encode_behind")


def test_what_chunks_are_encoded_behind_is_kept(shell: Shell) -> None:
    assert get_args(Behind) == get_args(EncodeBehind)
    shell.write("a.txt", paragraphs("apple"))
    question = ("ask", shell.out, "apple?", "-k", "1", "--max-new-tokens", "2")
    shell.index()
    assert recorded_behind(shell) == "documents"
    answered = shell.run(*question).output
    assert "1 hits, 0 misses" in answered
    assert "recompute 4 %: TTFT" in answered
    result = shell.index("--encode-behind", "system")  # other caches: the file is done again
    assert "1 changed" in result.stdout
    answered = shell.run(*question).output
    assert "1 hits, 0 misses" in answered
    assert "recompute 15 %: TTFT" in answered
    assert "1 unchanged" in shell.index().stdout
    shell.write("b.txt", paragraphs("pear"))
    shell.index()
    assert "2 hits, 0 misses" in shell.run(*question[:3], "-k", "2").output
    result = shell.index("--encode-behind", "documents")
    assert "2 changed" in result.stdout
    assert "1 hits, 0 misses" in shell.run(*question).output
    shell.index("--encode-behind", "nothing", code=2)


def test_an_index_of_before_is_behind_the_prefix(shell: Shell) -> None:
    """As indexes were made when nothing else was recorded."""
    shell.write("a.txt", paragraphs("apple"))
    shell.index("--encode-behind", "system")
    with shell.catalog() as catalog, catalog.writing() as tx:
        tx.execute("DELETE FROM meta WHERE name = 'encode_behind'")
    assert "1 unchanged" in shell.index().stdout
    question = ("ask", shell.out, "apple?", "-k", "1", "--max-new-tokens", "2")
    assert "1 hits, 0 misses" in shell.run(*question).output
    shell.write("b.txt", paragraphs("pear"))
    shell.index()
    assert recorded_behind(shell) == "system"
    assert "2 hits, 0 misses" in shell.run(*question[:3], "-k", "2").output


def test_an_adapter_reads_the_caches_that_an_index_has(shell: Shell, tmp_path: Path) -> None:
    words = PromptTemplate()
    adapters = {kind: tmp_path / kind for kind in get_args(AdapterKind)}
    for kind, folder in adapters.items():
        behind = "system" if kind == "cache-preserving" else "alone"
        tiny_adapters.adapter(kind=kind, encode_behind=behind, prompt=words).save(folder)
    shell.write("a.txt", paragraphs("apple"))
    shell.index()
    question = ("ask", shell.out, "apple?", "-k", "1", "--max-new-tokens", "2", "--adapter")
    assert "1 hits, 0 misses" in shell.run(*question, adapters["cache-preserving"]).output
    tiny_adapters.adapter(encode_behind="alone", prompt=words).save(tmp_path / "apart")
    apart = shell.run(*question, tmp_path / "apart").output
    assert "0 hits, 1 misses" in apart, "it was trained for others"
    own = ("--adapter", str(adapters["whole-model"]))
    refused = shell.index(*own, "--encode-behind", "documents", code=1)
    assert "was trained for chunks encoded behind 'alone'" in refused.stderr
    assert "1 changed" in shell.index(*own).stdout
    assert "1 hits, 0 misses" in shell.run(*question[:-1]).output
    assert recorded_behind(shell) == "documents", "of the caches that others can read"
    assert "1 changed" in shell.index("--adapter", "").stdout
    assert "1 hits, 0 misses" in shell.run(*question[:-1]).output


def test_ask_tells_its_time_and_what_it_computes_anew(shell: Shell) -> None:
    shell.write("a.txt", paragraphs("apple", 12))
    shell.index("--encode-behind", "system")  # where a first chunk has seen all before it
    question = ("ask", shell.out, "apple things?", "-k", "2", "--max-new-tokens", "4")
    said = shell.run(*question).stdout
    assert re.search(r"TTFT \d+ ms, total \d+\.\d\d s, \d tokens at [\d.]+ tokens/s, 2 hits", said)
    assert re.search(r"total \d+\.\d\d s, 1 token, ", shell.run(*question[:-1], "1").stdout)

    def computed(*options: str) -> int:
        said = shell.run(*question, *options).stdout
        assert re.search(r"\nrecompute( [\d.]+ %)?: TTFT", said)
        return int(re.search(r"(\d+) computed", said)[1])  # type: ignore[index]

    none = computed("--recompute", "0")
    tokens = computed("--recompute-by", "first", "--recompute", "1") - none  # of both chunks
    second = computed("--recompute", "1") - none  # the first one has seen all before it
    assert 0.3 * tokens < second < 0.7 * tokens
    first = computed("--recompute-by", "first", "--recompute", "0.3")
    assert abs(first - none - 0.3 * tokens) <= 1  # rounded for each chunk
    assert computed("--recompute", "0.3") == 2 * none + round(0.3 * tokens)  # the question twice
    assert shell.run(*question, "--recompute", "16", code=2)
    auto = shell.run(*question, "--strategy", "auto", "--recompute", "0.3").stdout
    assert "recompute 30 %: TTFT" in auto
    assert "auto: " in auto
    refused = shell.run(*question, "--strategy", "full", "--recompute-by", "first", code=1)
    assert "--strategy full computes no tokens of chunks anew" in refused.stderr


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"kvlink (\d+\.\d+\.\d+\S*|unknown: not installed)\n", result.stdout)


@pytest.mark.parametrize("command", ["demo", "index", "ask", "bench", "train", "eval"])
def test_commands_that_load_a_model_take_a_dtype(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--dtype", "no"])
    assert result.exit_code == 2
    assert "float32" in result.stderr or "Missing" in result.stderr
