"""``kvlink tune``: what it prints and writes, and that the next question goes by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from tiny_cli import Shell, WordVectors, paragraphs

FEW = ("--count", "2", "-k", "2", "--tokens", "4")


@pytest.fixture
def shell(tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setattr("kvlink_rag.index.index.SentenceEmbeddings", WordVectors)
    monkeypatch.chdir(tmp_path)
    made = Shell(tmp_path, model_folder)
    made.write("apples.md", "# Apples\n\n" + paragraphs("apple"))
    return made


def test_an_index(shell: Shell) -> None:
    shell.index()
    before = shell.run("ask", shell.out, "apples?", "--max-new-tokens", "2")
    assert "auto: plain reuse" in before.stdout
    told = shell.run("tune", shell.out, "--count", "3").stdout
    lines = told.splitlines()
    assert "3 questions" in lines[0]
    assert lines[1].split()[:3] == ["way", "same", "tokens"]
    ways = {line.split("%")[0].split("  ")[0].strip() for line in lines[2:9]}
    assert {"full", "reuse", "recompute 15"} <= ways
    assert sum("chosen" in line for line in lines) == 1
    assert f"written: {shell.out / 'kv' / 'tuned.json'}" in told
    # a tiny random model, for which caches are bad
    assert "auto: full: tuned by 3 questions: caches are bad for this model" in told
    assert (shell.out / "tune.png").read_bytes().startswith(b"\x89PNG")
    after = shell.run("ask", shell.out, "apples?", "--max-new-tokens", "2").stdout
    assert "full: TTFT" in after
    assert "auto: tuned by 3 questions" in after
    assert "clean" in shell.run("store", "verify", shell.out).stdout


def test_questions_of_ones_own(shell: Shell) -> None:
    shell.index()
    questions = shell.docs.parent / "questions.txt"
    questions.write_text("Are apples red?\n\n  Wie groß?  \nWhat is a pear?\n", encoding="utf-8")
    plot = shell.docs.parent / "deep" / "picture.png"
    arguments = ("--questions", questions, *FEW, "--plot", plot)
    assert "3 questions" in shell.run("tune", shell.out, *arguments).stdout
    assert plot.is_file()


def test_codecs_too(shell: Shell) -> None:
    shell.index()
    told = shell.run("tune", shell.out, *FEW, "--codecs").stdout
    assert {"raw", "int8", "int4"} <= {line.split(" ")[0] for line in told.splitlines()}


def test_a_model(shell: Shell) -> None:
    told = shell.run("tune", shell.model, *FEW).stdout
    assert "not written: name the store that it is for (--store)" in told
    assert (shell.docs.parent / "tune.png").is_file()
    store = shell.docs.parent / "kv"
    told = shell.run("tune", shell.model, *FEW, "--store", store).stdout
    assert f"written: {store / 'tuned.json'}" in told
    assert tiny.engine(store=store, prompt=None, encode_behind=None).tuned is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--questions", "empty.txt"), "holds no questions"),
        (("--store", "kv"), "leave --store out"),
        (("--questions", "gone.txt"), "gone.txt"),
    ],
)
def test_what_is_refused(shell: Shell, arguments: tuple[str, ...], words: str) -> None:
    shell.index()
    (shell.docs.parent / "empty.txt").write_text("\n \n")
    assert words in shell.run("tune", shell.out, *arguments, code=1).output


def test_questions_need_documents(shell: Shell) -> None:
    (shell.docs.parent / "questions.txt").write_text("Why?\n")
    refused = shell.run("tune", shell.model, "--questions", "questions.txt", code=1)
    assert "name an index" in refused.output
