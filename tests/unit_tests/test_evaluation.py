from __future__ import annotations

import gzip
import json
import random

import pytest

from kvlink_rag import InputError
from kvlink_rag.evaluation.data import data_folder, read_examples
from kvlink_rag.evaluation.metrics import best_subspan_em, normalise, token_f1


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


def test_examples_and_their_chunks(tmp_path):
    docs = [{"title": f"T{i}", "text": f"text {i}", "gold": i == 7} for i in range(10)]
    row = {"id": "q", "question": "?", "answers": ["a"], "docs": docs}
    path = tmp_path / "set.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.write(f"{json.dumps(row)}\n" * 3)
    assert len(read_examples(path)) == 3
    (example,) = read_examples(path, limit=1)
    chunks = example.with_chunks(4, random.Random(0))
    assert len(chunks) == 4
    assert example.chunks[7] in chunks
    places = [example.chunks.index(chunk) for chunk in chunks]
    assert places == sorted(places)
    assert chunks == example.with_chunks(4, random.Random(0))


def test_an_absent_data_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="KVLINK_DATA"):
        data_folder()
