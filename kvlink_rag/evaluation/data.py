"""Question sets: gzipped JSON lines, a question with its answers and its documents on each."""

from __future__ import annotations

import gzip
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from kvlink_rag.chunk import Chunk
from kvlink_rag.errors import InputError


@dataclass(frozen=True)
class Example:
    """A question with its documents; ``gold`` tells which of them hold the answer."""

    id: str
    question: str
    answers: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    gold: tuple[bool, ...]

    def with_chunks(self, count: int, rng: random.Random) -> list[Chunk]:
        """``count`` documents in their order: the gold ones first, distractors drawn at random."""
        places = list(range(len(self.chunks)))
        rng.shuffle(places)
        places.sort(key=lambda place: not self.gold[place])
        return [self.chunks[place] for place in sorted(places[:count])]


def data_folder() -> Path:
    """The folder of question sets: ``$KVLINK_DATA``, else ``../shared/data``.

    Raises:
        InputError: neither exists.
    """
    folder = Path(os.environ.get("KVLINK_DATA", "../shared/data"))
    if not folder.is_dir():
        raise InputError(f"no question sets at {folder}: set KVLINK_DATA to their folder")
    return folder


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples of a set."""
    examples = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for place, line in enumerate(lines):
            if limit is not None and place >= limit:
                break
            row = json.loads(line)
            docs = row["docs"]
            examples.append(
                Example(
                    id=row["id"],
                    question=row["question"],
                    answers=tuple(row["answers"]),
                    chunks=tuple(Chunk(doc["text"], title=doc.get("title")) for doc in docs),
                    gold=tuple(bool(doc.get("gold")) for doc in docs),
                )
            )
    return examples
