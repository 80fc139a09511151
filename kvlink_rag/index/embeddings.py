"""Vector embeddings of texts, for the search: one small interface and its default."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvlink_rag.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Embeddings = Callable[[Sequence[str]], Any]
"""Texts to vectors: an array, tensor or list of lists ``[texts, dim]``.

An attribute ``name`` identifies what it computes: an index made with one name is not opened with
another. Without one only the dimension is compared.
"""

Vectors = npt.NDArray[np.float32]
"""``[n, dim]`` float32, each row of length 1."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class SentenceEmbeddings:
    """Embeddings by a sentence-transformers model, loaded on first use.

    Args:
        model: hub id or local folder.
        batch_size: texts computed at once.
        device: where it runs; None lets sentence-transformers choose.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, batch_size: int = 32, device: str | None = None
    ) -> None:
        self.model = model
        # a folder is known by its last part, so that it can be moved
        self.name = Path(model).name if Path(model).is_dir() else model
        self.batch_size = batch_size
        self.device = device
        self._loaded: SentenceTransformer | None = None
        self._loading = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors ``[texts, dim]`` float32 of length 1.

        Raises:
            ModelNotFoundError: the model is neither on disk nor to be fetched.
        """
        vectors = self._load().encode(
            list(texts),
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return np.asarray(vectors, dtype=np.float32)

    def _load(self) -> SentenceTransformer:
        with self._loading:
            if self._loaded is None:
                # the import alone costs seconds: only when something is embedded
                from sentence_transformers import SentenceTransformer

                from kvlink_rag.runners.transformers.models import resolve

                self._loaded = SentenceTransformer(resolve(self.model), device=self.device)
            return self._loaded


def embedding_name(embeddings: Embeddings) -> str:
    """What identifies the embeddings; empty when they do not say."""
    return str(getattr(embeddings, "name", None) or "")


def embed(embeddings: Embeddings, texts: Sequence[str]) -> Vectors:
    """Vectors ``[texts, dim]`` float32 of length 1.

    Raises:
        InputError: what the callable returned is not one finite, non-zero vector a text.
    """
    who = embedding_name(embeddings) or getattr(
        embeddings, "__qualname__", type(embeddings).__qualname__
    )
    vectors = normalise(embeddings(texts), who)
    if len(vectors) != len(texts):
        raise InputError(f"embeddings {who}: {len(vectors)} vectors for {len(texts)} texts")
    return vectors


def normalise(vectors: Any, who: str = "given") -> Vectors:
    """Scale vectors ``[n, dim]`` to length 1, as float32.

    Args:
        vectors: array, tensor or list of lists.
        who: named in errors.

    Raises:
        InputError: not two dimensions, not numbers, NaN or infinite values, or a zero vector.
    """
    try:
        detached = vectors.detach().cpu() if hasattr(vectors, "detach") else vectors
        # float64: the squares of large float32 values do not fit in float32
        array = np.asarray(detached, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"embeddings {who}: no array of numbers ({error})") from error
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"embeddings {who}: shape {array.shape}, not [texts, dim]")
    if not np.isfinite(array).all():
        raise InputError(f"embeddings {who}: NaN or infinite values")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    if not (lengths > 0).all():
        row = int(np.argmin(lengths))
        raise InputError(f"embeddings {who}: vector {row} is zero, it has no direction")
    return np.ascontiguousarray(array / lengths, dtype=np.float32)
