"""Where lessons come from: files of questions, plain text, instructions and summaries.

Gzipped or plain JSON lines, told apart by their fields:

- ``question``, ``answers``, ``docs`` (``title``, ``text``, ``gold``): a question over documents;
- ``paragraphs`` (``text``, ``qas``), ``article``: an article with questions to its paragraphs;
  with ``distill`` their answers are the base model's own;
- ``docs``, ``summary``: documents and their summary;
- ``messages``: an instruction and its response, without documents;
- ``text``, ``title``: plain text.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvlink_rag.chunk import Chunk
from kvlink_rag.errors import InputError
from kvlink_rag.evaluation.data import data_folder
from kvlink_rag.training.lesson import Lesson, Turn
from kvlink_rag.training.settings import TrainSettings

HELD_OUT = {"text": 10, "instruction": 10, "question": 50, "article": 50, "summary": 50}
"""One of so many rows of a file is kept for evaluation."""

SUMMARIZE = "Summarize the documents above."
CONTINUE = "Continue the text of the documents above."
PIECE_WORDS = (60, 120)
"""Words in a chunk of plain text."""

Row = Mapping[str, Any]


def held_out(source: str, index: int) -> bool:
    """Whether the row of that place in its file is not for training."""
    return index % HELD_OUT[source] == 0


class Lessons(Sequence[Lesson]):
    """The lessons of a run, each made when asked for and always the same.

    Args:
        settings: shares, chunk counts, seed.
        count: how many.
        held_out: of the rows that are kept for evaluation.
    """

    def __init__(self, settings: TrainSettings, count: int, held_out: bool = False) -> None:
        self._settings = settings
        rng = random.Random(settings.seed)
        sources = [_read(Path(path), held_out) for path in settings.data]
        weights = list(settings.data.values())
        picks = rng.choices(range(len(sources)), weights, k=count)
        turns = [_endless(len(rows), random.Random(f"{settings.seed}-{i}"))
                 for i, (rows, _) in enumerate(sources)]  # fmt: skip
        self._plan = [(sources[pick], next(turns[pick]), rng.random()) for pick in picks]

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: Any) -> Any:
        (rows, make), index, seed = self._plan[place]
        rng = random.Random(f"{seed}")
        lesson = make(rows, index, rng, self._settings)
        if not lesson.chunks:
            return lesson
        views = self._settings.views
        return replace(lesson, view=rng.choices(list(views), list(views.values()))[0])


Maker = Callable[[Sequence[Row], int, random.Random, TrainSettings], Lesson]


def _endless(count: int, rng: random.Random) -> Iterator[int]:
    """All places in random order, again and again."""
    while True:
        yield from rng.sample(range(count), count)


def _read(path: Path, evaluation: bool) -> tuple[list[Row], Maker]:
    """The rows of a file for training or evaluation, and what makes a lesson of one of them."""
    if not path.exists():
        path = data_folder() / "train" / f"{path}.jsonl.gz"
    rows: list[Row] = []
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        kind, maker = _maker(rows[0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"training data {path} cannot be read: {error}") from error
    if len(rows) > 1:
        rows = [row for at, row in enumerate(rows) if held_out(kind, at) == evaluation]
    return rows, maker


def _maker(row: Row) -> tuple[str, Maker]:
    makers: dict[tuple[str, ...], tuple[str, Maker]] = {
        ("paragraphs",): ("article", _article),
        ("question", "answers", "docs"): ("question", _question),
        ("docs", "summary"): ("summary", _summary),
        ("messages",): ("instruction", _instruction),
        ("text",): ("text", _text),
    }
    for fields, found in makers.items():
        if all(name in row for name in fields):
            return found
    raise ValueError(f"its first line has the fields {sorted(row)}, which are none of the known")


def _article(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    """Paragraphs of an article, a few of others among them, and questions to some of them."""
    row = rows[index]
    count = rng.randint(settings.min_chunks, settings.max_chunks)
    own = rng.sample(row["paragraphs"], min(count, len(row["paragraphs"])))
    chunks = [(Chunk(p["text"], title=_title(row)), p["qas"]) for p in own]
    for place in range(1, len(chunks)):
        if rng.random() < 0.2:
            other = rng.choice(rows)
            paragraph = rng.choice(other["paragraphs"])
            chunks[place] = (Chunk(paragraph["text"], title=_title(other)), paragraph["qas"])
    asked = [qa for _, qas in chunks for qa in qas]
    asked = rng.sample(asked, min(settings.turns, len(asked)))
    rng.shuffle(chunks)
    turns = tuple(Turn(qa["question"], _answer(qa, rng)) for qa in asked)
    if not turns:  # none of these paragraphs has questions
        turns = (Turn(CONTINUE, rng.choice(row["paragraphs"])["text"]),)
    return Lesson(
        tuple(chunk for chunk, _ in chunks),
        turns,
        source="article",
        distill=row.get("distill", False),
    )


def _question(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    """The gold documents and distractors, the question's own and those of other questions."""
    row = rows[index]
    count = rng.randint(settings.min_chunks, settings.max_chunks)
    docs = [doc for doc in row["docs"] if doc.get("gold", True)]
    pool = _distractors(row)
    docs += rng.sample(pool, min(max(count - len(docs), 0), len(pool)))
    while len(docs) < count and len(rows) > 1:
        other = rng.choice(rows)
        golden = [doc for doc in other["docs"] if doc.get("gold", True)]
        docs.append(rng.choice([*golden, *_distractors(other)]))
    rng.shuffle(docs)
    turn = Turn(row["question"], _answer(row, rng))
    return Lesson(tuple(_chunk(doc) for doc in docs), (turn,), source="question")


def _distractors(row: Row) -> list[Any]:
    """At most six of a question's own, always the same: each cache is computed once."""
    pool = [doc for doc in row["docs"] if not doc.get("gold", True)]
    random.Random(row.get("id")).shuffle(pool)
    return pool[:6]


def _summary(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    row = rows[index]
    pieces = [
        Chunk(piece, title=doc.get("title") or None)
        for doc in row["docs"]
        for piece in _pieces(doc["text"])
    ]
    return Lesson(
        tuple(pieces[: settings.max_chunks]), (Turn(SUMMARIZE, row["summary"]),), source="summary"
    )


def _instruction(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    """An instruction without documents: the base model's own distribution is kept."""
    said = [message["content"] for message in rows[index]["messages"]]
    return Lesson((), (Turn(said[-2], said[-1]),), source="instruction", distill=True)


def _text(rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings) -> Lesson:
    """Text by itself, or pieces of it as chunks and the piece after them to be predicted."""
    row = rows[index]
    pieces = _pieces(row["text"])
    first = rng.randrange(len(pieces))
    if len(pieces) < 2 or rng.random() < 0.5:
        return Lesson((), (Turn("", pieces[first]),), source="text", distill=True)
    count = rng.randint(1, min(settings.max_chunks, len(pieces) - 1))
    first = rng.randrange(len(pieces) - count)
    title = row.get("title") or None
    chunks = tuple(Chunk(piece, title=title) for piece in pieces[first : first + count])
    turn = Turn(CONTINUE, pieces[first + count])
    return Lesson(chunks, (turn,), source="text", distill=True)


def _pieces(text: str) -> list[str]:
    """A text in pieces of some words, cut at random but always the same places."""
    words, rng = text.split(" "), random.Random(text[:200])
    pieces, start = [], 0
    while start < len(words):
        stop = start + rng.randint(*PIECE_WORDS)
        pieces.append(" ".join(words[start:stop]))
        start = stop
    return [piece for piece in pieces if piece.strip()]


def _chunk(doc: Mapping[str, Any]) -> Chunk:
    return Chunk(doc["text"], title=doc.get("title") or None)


def _title(row: Row) -> str | None:
    return str(row.get("article", "")).replace("_", " ") or None


def _answer(row: Row, rng: random.Random) -> str:
    """One of the answers; the first is the usual form."""
    answers = row["answers"]
    return str(answers[0] if rng.random() < 0.7 else rng.choice(answers))
