"""Lessons from documents that nobody asked questions about: the base model asks and answers.

Its questions and answers need not be good: what is learnt from them is not the answers, but to
read linked chunks with the distribution that the same model has under full prefill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.progress import bar
from kvlink_rag.common.whole import write_whole
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.engine.questions import ASK, MAX_TOKENS
from kvlink_rag.errors import InputError
from kvlink_rag.index.documents import SUFFIXES, Document, chunks_of, find_files, read_file

QUESTIONS = 2
"""Questions to a chunk."""
CHUNK_TOKENS = 200


def is_documents(path: Path) -> bool:
    """Whether training data is a folder or a document, rather than JSON lines."""
    return path.is_dir() or path.suffix.lower() in SUFFIXES


def write_questions(
    engine: KVLinkEngine, paths: Iterable[Path], out: Path, *, progress: bool = True
) -> Path:
    """Let the model write questions and answers to documents, chunk by chunk.

    Args:
        engine: of the base model; it reads each chunk by itself, in full.
        paths: text, Markdown and PDF files, or folders.
        out: a file of JSON lines that :mod:`kvlink_rag.training.data` reads. What it holds of the
            same chunks and model is kept, so that an interrupted run goes on.

    Raises:
        InputError: there is no text in the documents.
    """
    documents = [read_file(file) for file in find_files(map(str, paths))]
    articles = [
        (document.title, chunks_of(document, engine.tokenizer, CHUNK_TOKENS, 0))
        for document in documents
        if isinstance(document, Document)
    ]
    total = sum(len(chunks) for _, chunks in articles)
    if not total:
        raise InputError(f"no text, Markdown or PDF in {', '.join(map(str, paths))}")
    known, part = _read(out), out.with_suffix(".part")
    write_whole(part, "".join(map(_line, known.values())))  # without the line that a kill cut
    rows: list[dict[str, Any]] = []
    with (
        bar("Writing questions (chunks)", total, enabled=progress) as done,
        part.open("a", encoding="utf-8") as kept,
    ):
        for title, chunks in articles:
            paragraphs = []
            for chunk in chunks:
                key = _key(engine, chunk)
                if key not in known:
                    known[key] = _ask(engine, chunk, key)
                    kept.write(_line(known[key]))
                    kept.flush()
                paragraphs.append(known[key])
                done(sum(len(row["paragraphs"]) for row in rows) + len(paragraphs))
            rows.append({"article": title, "paragraphs": paragraphs, "distill": True})
    write_whole(out, "".join(map(_line, rows)))
    part.unlink()
    return out


def _ask(engine: KVLinkEngine, chunk: Chunk, key: str) -> dict[str, Any]:
    """A chunk with questions (greedy, then sampled) and the model's answers."""
    qas: list[dict[str, Any]] = []
    for number in range(QUESTIONS):
        asked = engine.answer(
            [ASK], [chunk], strategy="full", max_new_tokens=MAX_TOKENS, stop="\n",
            temperature=0.7 if number else 0.0, seed=int(key[:8], 16),
        ).text.strip()  # fmt: skip
        if not asked or any(asked == qa["question"] for qa in qas):
            continue
        answer = engine.answer(asked, [chunk], strategy="full", max_new_tokens=MAX_TOKENS)
        if answer.text.strip():
            qas.append({"question": asked, "answers": [answer.text.strip()]})
    return {"key": key, "text": chunk.text, "qas": qas}


def _key(engine: KVLinkEngine, chunk: Chunk) -> str:
    text = "\0".join((engine.fingerprint, chunk.title or "", chunk.text))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """Paragraphs by key: of a finished file, and of one that a kill left in the middle."""
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(out):
        found |= {paragraph["key"]: paragraph for paragraph in row["paragraphs"]}
    for paragraph in _rows(out.with_suffix(".part")):
        found[paragraph["key"]] = paragraph
    return found


def _rows(path: Path) -> Iterator[Any]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                yield json.loads(line)
            except ValueError:
                return  # the end, or cut by a kill


def _line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
