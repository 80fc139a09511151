"""Question sets: JSON lines, each a question (or a summary to be made) with its documents."""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvlink_rag.chunk import Chunk
from kvlink_rag.errors import InputError

SetKind = Literal["qa", "summary"]

QA_SETS = ("nq_multidoc10", "hotpotqa", "2wikimultihopqa", "musique", "squad_multidoc")
SUMMARY_SETS = ("multi_news", "dialogsum")
SUMMARY_QUESTION = "Summarize the documents above."

SUFFIXES = (".jsonl", ".jsonl.gz")
_JSON_NAMES = {str: "a text", list: "a list", dict: "an object"}
_T = TypeVar("_T", str, list, dict)  # type: ignore[type-arg]


@dataclass(frozen=True)
class Example:
    """A question with its documents.

    Attributes:
        answers: right answers; of a summary set, the reference summaries.
        chunks: the documents, one chunk each.
        gold: which of them hold the answer; all False where that is not known.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    gold: tuple[bool, ...]
    kind: SetKind = "qa"

    def with_chunks(self, count: int, rng: random.Random) -> list[Chunk]:
        """``count`` documents in their order: the gold ones first, distractors drawn at random."""
        places = list(range(len(self.chunks)))
        rng.shuffle(places)
        places.sort(key=lambda place: not self.gold[place])
        return [self.chunks[place] for place in sorted(places[:count])]


@dataclass(frozen=True)
class QuestionSet:
    """Examples of one kind."""

    name: str
    kind: SetKind
    examples: tuple[Example, ...]


def held_out(index: int) -> bool:
    """Whether line ``index`` (from 0) of a file of texts or instructions is kept from training."""
    return index % 10 == 0


def data_folder() -> Path:
    """The folder of question sets: ``$KVLINK_DATA``, else ``../shared/data``.

    Raises:
        InputError: neither exists.
    """
    folder = Path(os.environ.get("KVLINK_DATA", "../shared/data"))
    if not folder.is_dir():
        raise InputError(f"no question sets at {folder}: set KVLINK_DATA to their folder")
    return folder


def find_set(source: str | Path) -> Path:
    """The file of a set, given by its path or by the name of one in ``$KVLINK_DATA/dev``.

    Raises:
        InputError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.name.endswith(SUFFIXES) or path.name != str(source):
        raise InputError(f"no such question set: {source}")
    folder = data_folder() / "dev"
    for suffix in SUFFIXES:
        if (folder / f"{source}{suffix}").is_file():
            return folder / f"{source}{suffix}"
    known = sorted(set_name(each) for each in folder.glob("*.jsonl*"))
    raise InputError(
        f"no question set {str(source)!r}: give a .jsonl file, or the name of one in {folder} "
        f"({', '.join(known) or 'which is empty'})"
    )


def set_name(path: Path) -> str:
    """What a set is called: its file's name without endings."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def read_set(source: str | Path, limit: int | None = None) -> QuestionSet:
    """The first ``limit`` examples of a set, given by path or name.

    Lines of a QA set are ``{"id", "question", "answers", "docs": [{"text"[, "title", "gold"]}]}``,
    those of a summary set ``{"id", "docs", "summary"[, "references"]}``.

    Raises:
        InputError: there is no such set, or it is damaged, naming file, line and field.
    """
    path = find_set(source)
    examples = read_examples(path, limit)
    if not examples:
        raise InputError(f"{path} holds no question: a set has one on each line")
    kind, ids = examples[0].kind, set()
    for example in examples:
        if example.kind != kind:
            raise InputError(
                f"{path}: {example.id!r} is a {example.kind} example, those before are {kind}: "
                "make two sets of them"
            )
        if example.id in ids:
            raise InputError(f"{path}: the id {example.id!r} occurs twice: ids are to differ")
        ids.add(example.id)
    return QuestionSet(set_name(path), kind, tuple(examples))


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples of a file.

    Raises:
        InputError: the file is damaged, naming file, line and field.
    """
    examples: list[Example] = []
    for where, row in read_rows(path):
        if limit is not None and len(examples) >= limit:
            break
        examples.append(_example(row, where))
    return examples


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.gz file, each with where it stands, for messages.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _parse(line, where)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON lines in UTF-8: {error}") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}): repair it or take it out") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object but {str(row)[:60]!r}")
    return row


def field(row: dict[str, Any], name: str, kind: type[_T], where: str) -> _T:
    """A field of a line, which has to be there and not empty.

    Raises:
        InputError: naming file, line and field.
    """
    if name not in row:
        raise InputError(f"{where} has no field {name!r}: it has {', '.join(row) or 'none'}")
    value = row[name]
    if not isinstance(value, kind) or not (value.strip() if isinstance(value, str) else value):
        raise InputError(
            f"{where}: the field {name!r} is {str(value)[:60]!r}, and not {_JSON_NAMES[kind]} with "
            "something in it"
        )
    return value


def _example(row: dict[str, Any], where: str) -> Example:
    if isinstance(row.get("id"), int):
        row["id"] = str(row["id"])
    docs = [_document(doc, where) for doc in field(row, "docs", list, where)]
    kind: SetKind = "summary" if "summary" in row and "question" not in row else "qa"
    if kind == "summary":
        question = SUMMARY_QUESTION
        answers = [field(row, "summary", str, where), *row.get("references", [])]
    else:
        question = field(row, "question", str, where)
        answers = field(row, "answers", list, where)
    if not all(isinstance(answer, str) for answer in answers):
        name = "references" if kind == "summary" else "answers"
        raise InputError(f"{where}: the field {name!r} holds something that is not a text")
    return Example(
        id=field(row, "id", str, where),
        question=question,
        answers=tuple(dict.fromkeys(answers)),
        chunks=tuple(chunk for chunk, _ in docs),
        gold=tuple(gold for _, gold in docs),
        kind=kind,
    )


def _document(doc: Any, where: str) -> tuple[Chunk, bool]:
    if not isinstance(doc, dict):
        raise InputError(f"{where}: a document is {str(doc)[:60]!r}, and not an object with 'text'")
    title = doc.get("title")
    if title is not None and not isinstance(title, str):
        raise InputError(f"{where}: a document's 'title' is {title!r}, and not a text")
    text = field(doc, "text", str, f"{where}, a document")
    return Chunk(text, title=title), bool(doc.get("gold"))
