"""Vectors from whatever a user's embeddings return."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvlink_rag.errors import InputError
from kvlink_rag.index import embeddings as module
from kvlink_rag.index.embeddings import SentenceEmbeddings, embed, embedding_name, normalise


@pytest.mark.parametrize(
    "vectors",
    [
        [[3, 4], [0, -2]],
        np.array([[3, 4], [0, -2]], dtype=np.float16),
        torch.tensor([[3.0, 4.0], [0.0, -2.0]], requires_grad=True),
        torch.tensor([[3.0, 4.0], [0.0, -2.0]]).tolist(),
        [[3e38, 4e38], [0, -2e-40]],
    ],
    ids=["lists", "float16", "tensor", "floats", "extreme"],
)
def test_any_array_becomes_vectors_of_length_1(vectors: Any) -> None:
    found = normalise(vectors)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, np.array([[0.6, 0.8], [0.0, -1.0]]), atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, float("nan")]], "NaN"),
        ([[1.0, float("inf")]], "infinite"),
        ([[1.0, 0.0], [0.0, 0.0]], "vector 1 is zero"),
        ([1.0, 2.0], r"shape \(2,\)"),
        ([[]], "shape"),
        ([], "shape"),
        ([[1.0], [1.0, 2.0]], "no array"),
        ([["a", "b"]], "no array"),
        (None, "shape|no array"),
    ],
)
def test_bad_vectors_are_named(vectors: Any, message: str) -> None:
    def theirs(texts: Sequence[str]) -> Any:
        return vectors

    with pytest.raises(InputError, match=f"theirs.*({message})"):
        embed(theirs, ["text"] * 2)


def test_one_vector_a_text() -> None:
    class Theirs:
        name = "their model"

        def __call__(self, texts: Sequence[str]) -> Any:
            return np.ones((1, 3))

    assert embedding_name(Theirs()) == "their model"
    with pytest.raises(InputError, match="their model: 1 vectors for 2 texts"):
        embed(Theirs(), ["a", "b"])


def test_a_plain_function_has_no_name() -> None:
    assert embedding_name(lambda texts: texts) == ""


def test_a_folder_is_known_by_its_last_part(tmp_path: Path) -> None:
    assert SentenceEmbeddings(str(tmp_path)).name == tmp_path.name
    assert SentenceEmbeddings().name == "sentence-transformers/all-MiniLM-L6-v2"


def test_sentence_transformers_is_imported_late() -> None:
    code = (
        "import sys; from kvlink_rag.index.embeddings import SentenceEmbeddings\n"
        "SentenceEmbeddings()\n"
        "assert 'sentence_transformers' not in sys.modules"
    )
    root = Path(module.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.model
def test_the_default_model(default_embeddings_folder: str) -> None:
    vectors = SentenceEmbeddings()(["a cat sleeps", "the kitten naps", "stock prices fell"])
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
