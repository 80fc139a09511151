from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from kvlink_rag import InputError, KVLinkEngine
from kvlink_rag.engine.questions import ASK
from kvlink_rag.training.data import Lessons
from kvlink_rag.training.own_documents import is_documents, write_questions
from kvlink_rag.training.settings import TrainSettings


class Scripted:
    """Stands for the model: numbers its questions, and counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.engine: KVLinkEngine = tiny.engine(prompt=None)
        self.asked: list[str] = []
        self.fail_at = fail_at
        self.answers: dict[str, str] = {}
        monkeypatch.setattr(self.engine, "answer", self._answer)

    def _answer(self, question: Any, chunks: Any, **settings: Any) -> SimpleNamespace:
        assert settings["strategy"] == "full"
        [chunk] = chunks
        if question == [ASK]:
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            self.asked.append(chunk.text)
            given = self.answers.get(chunk.text, f"What about {len(self.asked)}?")
            return SimpleNamespace(text=f" {given}\n")
        return SimpleNamespace(text=f" About {chunk.text[:10]}\n")


def write(folder: Path, name: str, word: str, count: int = 70) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(" ".join(f"{word}{at}." for at in range(count)), encoding="utf-8")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Two documents of three chunks each."""
    write(tmp_path / "docs", "bees.txt", "bee")
    write(tmp_path / "docs", "ants.txt", "ant")
    return tmp_path / "docs"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_documents_get_questions_and_answers_of_the_model_itself(tmp_path, docs, monkeypatch):
    model = Scripted(monkeypatch)
    out = write_questions(model.engine, [docs], tmp_path / "questions.jsonl", progress=False)
    made = rows(out)
    assert [row["article"] for row in made] == ["ants", "bees"]
    assert all(row["distill"] for row in made)
    for row, word in zip(made, ("ant", "bee"), strict=True):
        texts = [paragraph["text"] for paragraph in row["paragraphs"]]
        assert " ".join(texts) == (docs / f"{word}s.txt").read_text()
        for paragraph in row["paragraphs"]:
            assert len(paragraph["qas"]) == 2
            for qa in paragraph["qas"]:
                assert qa["question"].startswith("What about ")
                assert qa["answers"] == [f"About {paragraph['text'][:10]}"]
    assert not out.with_suffix(".part").exists()


def test_its_lessons_are_for_the_base_models_distribution(tmp_path, docs, monkeypatch):
    model = Scripted(monkeypatch)
    out = write_questions(model.engine, [docs], tmp_path / "questions.jsonl", progress=False)
    settings = TrainSettings(data={str(out): 1.0}, max_chunks=3)
    lessons = list(Lessons(settings, 20))
    assert all(lesson.distill for lesson in lessons)
    assert all(2 <= len(lesson.chunks) <= 3 for lesson in lessons)


def test_a_tiny_models_noise_is_written_and_read(tmp_path, docs):
    engine = tiny.engine(prompt=None)
    out = write_questions(engine, [docs], tmp_path / "questions.jsonl", progress=False)
    assert any(p["qas"] for row in rows(out) for p in row["paragraphs"])
    settings = TrainSettings(data={str(out): 1.0}, max_chunks=3)
    assert all(lesson.turns for lesson in Lessons(settings, 20))


def test_questions_that_repeat_or_are_empty_are_left_out(tmp_path, monkeypatch):
    write(tmp_path / "docs", "a.txt", "a", count=10)
    write(tmp_path / "docs", "b.txt", "b", count=10)
    model = Scripted(monkeypatch)
    model.answers = {(tmp_path / "docs" / "a.txt").read_text(): "Same?",
                     (tmp_path / "docs" / "b.txt").read_text(): " "}  # fmt: skip
    out = write_questions(
        model.engine, [tmp_path / "docs"], tmp_path / "questions.jsonl", progress=False
    )
    [[once], [none]] = [row["paragraphs"] for row in rows(out)]
    assert [qa["question"] for qa in once["qas"]] == ["Same?"]
    assert none["qas"] == []
    settings = TrainSettings(data={str(out): 1.0})
    assert all(lesson.turns for lesson in Lessons(settings, 5))  # still to be learnt from


def test_an_interrupted_run_goes_on(tmp_path, docs, monkeypatch):
    out = tmp_path / "questions.jsonl"
    expected = rows(write_questions(Scripted(monkeypatch).engine, [docs], out, progress=False))
    out.unlink()
    first = Scripted(monkeypatch, fail_at=7)  # in the middle of the fourth of six chunks
    with pytest.raises(KeyboardInterrupt):
        write_questions(first.engine, [docs], out, progress=False)
    assert not out.exists()
    assert len(rows(out.with_suffix(".part"))) == 3
    second = Scripted(monkeypatch)
    second.asked = first.asked[:6]
    write_questions(second.engine, [docs], out, progress=False)
    assert len(second.asked) == 12
    assert rows(out) == expected
    assert not out.with_suffix(".part").exists()


def test_a_kill_in_the_middle_of_a_line_costs_that_line(tmp_path, docs, monkeypatch):
    out = tmp_path / "questions.jsonl"
    first = Scripted(monkeypatch, fail_at=8)
    with pytest.raises(KeyboardInterrupt):
        write_questions(first.engine, [docs], out, progress=False)
    part = out.with_suffix(".part")
    part.write_bytes(part.read_bytes()[:-20])
    second = Scripted(monkeypatch, fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        write_questions(second.engine, [docs], out, progress=False)
    assert len(rows(part)) == 5  # three whole ones, and two more
    third = Scripted(monkeypatch)
    write_questions(third.engine, [docs], out, progress=False)
    assert len(third.asked) == 2
    assert [len(row["paragraphs"]) for row in rows(out)] == [3, 3]


def test_a_kill_while_the_file_is_written_leaves_none_that_looks_finished(
    tmp_path, docs, monkeypatch
):
    out = tmp_path / "questions.jsonl"
    model = Scripted(monkeypatch)
    synced = os.fsync

    def killed(file: int) -> None:
        if any(
            os.path.samestat(os.fstat(file), path.stat()) for path in tmp_path.glob(f"{out.name}*")
        ):
            os.truncate(file, os.fstat(file).st_size // 2)
            raise KeyboardInterrupt
        synced(file)

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_questions(model.engine, [docs], out, progress=False)
    assert not out.exists()
    monkeypatch.setattr(os, "fsync", synced)
    again = Scripted(monkeypatch)
    write_questions(again.engine, [docs], out, progress=False)
    assert again.asked == []  # all of them were kept
    assert len(rows(out)) == 2


def test_line_ends_of_unicode_in_documents_do_not_end_a_line(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("a", "b"):
        text = f"{name} one\u2028two\x85three\u2029four"
        (tmp_path / "docs" / f"{name}.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "questions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_questions(
            Scripted(monkeypatch, fail_at=2).engine, [tmp_path / "docs"], out, progress=False
        )
    model = Scripted(monkeypatch)
    write_questions(model.engine, [tmp_path / "docs"], out, progress=False)
    assert len(model.asked) == 2  # those of the second document alone
    assert Lessons(TrainSettings(data={str(out): 1.0}), 1)[0].chunks


def test_a_finished_file_is_asked_about_what_is_new(tmp_path, docs, monkeypatch):
    out = tmp_path / "questions.jsonl"
    write_questions(Scripted(monkeypatch).engine, [docs], out, progress=False)
    write(docs, "wasps.txt", "wasp", count=10)
    (docs / "ants.txt").unlink()
    model = Scripted(monkeypatch)
    write_questions(model.engine, [docs], out, progress=False)
    assert len(model.asked) == 2
    assert [row["article"] for row in rows(out)] == ["bees", "wasps"]


def test_another_models_questions_are_not_kept(tmp_path, docs, monkeypatch):
    out = tmp_path / "questions.jsonl"
    write_questions(Scripted(monkeypatch).engine, [docs], out, progress=False)
    other = Scripted(monkeypatch)
    other.engine = tiny.engine("qwen2", prompt=None)
    monkeypatch.setattr(other.engine, "answer", other._answer)
    write_questions(other.engine, [docs], out, progress=False)
    assert len(other.asked) == 12


@pytest.mark.parametrize("content", [None, b"", b"\x00\x01\x02"], ids=["none", "empty", "binary"])
def test_documents_without_text_are_named(tmp_path, content):
    folder = tmp_path / "docs"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"no text, Markdown or PDF in .*docs"):
        write_questions(tiny.engine(), [folder], tmp_path / "questions.jsonl", progress=False)
    assert list(tmp_path.iterdir()) == [folder]


def test_missing_documents_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no such file or folder: .*none\.txt"):
        write_questions(tiny.engine(), [tmp_path / "none.txt"], tmp_path / "q.jsonl")


def test_what_is_a_document(tmp_path):
    assert is_documents(tmp_path)
    assert is_documents(Path("a.MD"))
    assert is_documents(Path("a.pdf"))
    assert not is_documents(Path("a.jsonl"))
    assert not is_documents(Path("a.jsonl.gz"))
    assert not is_documents(Path("squad_train"))
