"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Before torch is imported: the tests' tiny models run slower on many threads than on few.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from kvlink_rag.runners.transformers import models


@pytest.fixture(scope="session")
def default_model_folder() -> str:
    """The default model's folder, fetched and converted on first use."""
    return models.resolve(models.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def default_embeddings_folder() -> str:
    """The default embedding model's folder, fetched on first use."""
    return models.resolve(models.DEFAULT_EMBEDDINGS)
