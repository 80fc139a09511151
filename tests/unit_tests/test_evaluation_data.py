"""Question sets and metrics."""

from __future__ import annotations

import gzip
import json
import random
import sys

import pytest

from kvlink_rag import InputError
from kvlink_rag.evaluation import metrics
from kvlink_rag.evaluation.data import (
    SUMMARY_QUESTION,
    data_folder,
    find_set,
    held_out,
    read_examples,
    read_set,
)
from kvlink_rag.evaluation.metrics import best_subspan_em, normalise, rouge_l, token_f1

DOC = {"title": "T", "text": "text", "gold": True}
QA = {"id": "q", "question": "?", "answers": ["a"], "docs": [DOC]}
SUMMARY = {"id": "s", "docs": [{"text": "text"}], "summary": "short"}


def test_normalise():
    assert normalise("The  Eiffel-Tower, (a)  tower!") == "eiffeltower tower"


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("It was built by Gustave Eiffel.", ["Gustave Eiffel"], 1.0, 4 / 8),
        ("gustave eiffel", ["The Gustave Eiffel", "x"], 1.0, 1.0),
        ("nobody knows", ["Gustave Eiffel"], 0.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("anything", ["!"], 0.0, 0.0),
    ],
)
def test_metrics(prediction, answers, em, f1):
    assert best_subspan_em(prediction, answers) == em
    assert token_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("the cat sat on the mat", ["the cat is on the mat"], 5 / 6),
        ("a b c d", ["d c b a"], 1 / 4),  # a subsequence has an order
        ("a b", ["x y", "a b c d"], 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),  # the best one
        ("running dogs", ["run dog"], 1.0),  # stems
        ("", ["a b"], 0.0),
    ],
)
def test_rouge_l(prediction, references, score):
    assert rouge_l(prediction, references) == pytest.approx(score)


def test_rouge_l_names_the_extra_it_needs(monkeypatch):
    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"kvlink-rag\[eval\]"):
        rouge_l("a", ["a"])


def write(path, *rows):
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as out:
        out.writelines(row if isinstance(row, str) else f"{json.dumps(row)}\n" for row in rows)
    return path


def test_examples_and_their_chunks(tmp_path):
    docs = [{"title": f"T{i}", "text": f"text {i}", "gold": i == 7} for i in range(10)]
    path = write(tmp_path / "set.jsonl.gz", *[{**QA, "docs": docs}] * 3)
    assert len(read_examples(path)) == 3
    (example,) = read_examples(path, limit=1)
    chunks = example.with_chunks(4, random.Random(0))
    assert len(chunks) == 4
    assert example.chunks[7] in chunks
    places = [example.chunks.index(chunk) for chunk in chunks]
    assert places == sorted(places)
    assert chunks == example.with_chunks(4, random.Random(0))
    drawn = {tuple(example.with_chunks(4, random.Random(seed))) for seed in range(10)}
    assert len(drawn) > 5
    assert example.with_chunks(10, random.Random(0)) == list(example.chunks)


def test_summaries(tmp_path):
    row = {**SUMMARY, "references": ["short", "brief"]}
    (example,) = read_set(write(tmp_path / "news.jsonl", row)).examples
    assert example.kind == "summary"
    assert example.question == SUMMARY_QUESTION
    assert example.answers == ("short", "brief")


def test_sets_by_name_and_by_path(monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    write(tmp_path / "dev" / "mine.jsonl.gz", QA, {**QA, "id": 2})
    own = write(tmp_path / "own.jsonl", "\n", QA, "\n")
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path))
    found = read_set("mine")
    assert (found.name, found.kind) == ("mine", "qa")
    assert [example.id for example in found.examples] == ["q", "2"]
    assert len(read_set("mine", 1).examples) == 1
    assert read_set(str(own)).name == "own"
    with pytest.raises(InputError, match=r"'yours'.*\(mine\)"):
        find_set("yours")
    with pytest.raises(InputError, match=r"nowhere/set\.jsonl"):
        find_set("nowhere/set.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([QA, '{"id": "q", "quest\n'], r"set.jsonl line 2 is not JSON"),
        ([[1]], r"line 1 is not a JSON object"),
        ([{**QA, "question": " "}], r"line 1: the field 'question'"),
        ([{k: v for k, v in QA.items() if k != "answers"}], r"line 1 has no field 'answers'"),
        ([{k: v for k, v in QA.items() if k != "id"}], r"line 1 has no field 'id'"),
        ([{k: v for k, v in SUMMARY.items() if k != "summary"}], r"no field 'question'"),
        ([QA, {**QA, "id": "r", "answers": "a"}], r"line 2: the field 'answers'.*not a list"),
        ([{**QA, "answers": [1]}], r"'answers' holds something that is not a text"),
        ([{**QA, "docs": []}], r"the field 'docs'"),
        ([{**QA, "docs": [{"title": "T"}]}], r"line 1, a document has no field 'text'"),
        ([{**QA, "docs": ["text"]}], r"a document is 'text'"),
        ([{**QA, "docs": [{"text": "x", "title": 1}]}], r"'title' is 1"),
        ([QA, QA], r"the id 'q' occurs twice"),
        ([QA, SUMMARY], r"'s' is a summary example"),
        ([], r"holds no question"),
    ],
)
def test_damage_is_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_set(write(tmp_path / "set.jsonl", *rows))


def test_a_cut_archive_is_named(tmp_path):
    path = write(tmp_path / "set.jsonl.gz", *[{**QA, "id": str(i)} for i in range(500)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"set\.jsonl\.gz cannot be read"):
        read_set(path)


def test_an_absent_data_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="KVLINK_DATA"):
        data_folder()


def test_one_line_in_ten_is_held_out():
    assert [index for index in range(25) if held_out(index)] == [0, 10, 20]
