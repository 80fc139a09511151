"""What tests of the command line share: a shell over documents and an index, and embeddings."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from kvlink_rag.cli import app
from kvlink_rag.index.catalog import IndexCatalog
from kvlink_rag.index.check import verify_index


class WordVectors:
    """Embeddings that need no model: words counted by a hash."""

    name = "words"

    def __call__(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        vectors = np.full((len(texts), 64), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row, zlib.crc32(word.strip(".,?").encode()) % 64] += 1
        return vectors


class Shell:
    """Runs ``kvlink`` over a folder of documents and an index beside it."""

    def __init__(self, folder: Path, model: str) -> None:
        self.docs = folder / "docs"
        self.docs.mkdir()
        self.out = folder / "index"
        self.model = model

    def run(self, *arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    def index(self, *options: str, code: int = 0) -> Result:
        arguments = ["--model", self.model, "--chunk-tokens", "120", "--overlap", "0", *options]
        return self.run("index", self.docs, "--out", self.out, *arguments, code=code)

    def write(self, name: str, text: str) -> Path:
        path = self.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    @contextmanager
    def catalog(self) -> Iterator[IndexCatalog]:
        catalog = IndexCatalog(self.out)
        yield catalog
        catalog.close()

    def state(self) -> tuple[Any, ...]:
        """All that an index says: texts, files, and stored caches."""
        with self.catalog() as catalog:
            ids = sorted(catalog.ids())
            texts = [(c.id, c.text, c.title) for c in catalog.get(ids)]
            sources = catalog.sources()
        check = verify_index(self.out)
        assert check.clean
        caches = sorted(p.name for p in (self.out / "kv").rglob("*.safetensors"))
        return texts, sources, caches


def paragraphs(word: str, count: int = 6) -> str:
    return "\n\n".join(f"{word} paragraph {n} tells of {word} things." for n in range(count))
