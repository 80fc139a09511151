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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kvlink_rag.chunk import Chunk
from kvlink_rag.errors import InputError
from kvlink_rag.evaluation.data import data_folder
from kvlink_rag.evaluation.data import held_out as is_kept
from kvlink_rag.index.documents import SUFFIXES
from kvlink_rag.training.lesson import Lesson, Turn
from kvlink_rag.training.settings import TrainSettings

HELD_OUT = {"question": 50, "article": 50, "summary": 50}
"""One of so many rows of a file is kept for evaluation; of texts and instructions those that
:func:`kvlink_rag.evaluation.data.held_out` says, which perplexity is measured on."""

SUMMARIZE = "Summarize the documents above."
CONTINUE = "Continue the text of the documents above."
PIECE_WORDS = (60, 120)
"""Words in a chunk of plain text."""
TRIES = 8
"""Draws for each chunk of others."""

Row = Mapping[str, Any]


class _Many(NamedTuple):
    """A list of so many or more."""

    each: Any
    least: int = 1


_ANSWERS = _Many((str, int, float))
SHAPES: dict[str, dict[str, Any]] = {
    "article": {
        "paragraphs": _Many(
            {"text": str, "qas": _Many({"question": str, "answers": _ANSWERS}, least=0)}
        )
    },
    "question": {"question": str, "answers": _ANSWERS, "docs": _Many({"text": str})},
    "summary": {"docs": _Many({"text": str}), "summary": str},
    "instruction": {"messages": _Many({"content": str}, least=2)},
    "text": {"text": str},
}
"""The fields that a row of each kind has; others may be beside them."""


def held_out(source: str, index: int) -> bool:
    """Whether the row of that place in its file is not for training."""
    return index % HELD_OUT[source] == 0 if source in HELD_OUT else is_kept(index)


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
        paths, weights = zip(*sorted(settings.data.items()), strict=True)
        sources = [_read(Path(path), held_out) for path in paths]
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
        views, weights = zip(*sorted(self._settings.views.items()), strict=True)
        return replace(lesson, view=rng.choices(views, weights)[0])


Maker = Callable[[Sequence[Row], int, random.Random, TrainSettings], Lesson]


def _endless(count: int, rng: random.Random) -> Iterator[int]:
    """All places in random order, again and again."""
    while True:
        yield from rng.sample(range(count), count)


def _read(path: Path, evaluation: bool) -> tuple[list[Row], Maker]:
    """The rows of a file for training or evaluation, and what makes a lesson of one of them."""
    path = _find(path)
    rows = _parse(path)
    kind = next((k for k, shape in SHAPES.items() if set(shape) <= _fields(rows[0])), None)
    if kind is None:
        known = "; ".join(f"{', '.join(shape)} ({kind})" for kind, shape in SHAPES.items())
        raise InputError(
            f"training data {path}: the first line has the fields {sorted(_fields(rows[0]))}, and "
            f"needs those of one of these: {known}"
        )
    for number, row in enumerate(rows, 1):
        if wrong := _wrong(row, SHAPES[kind], kind):
            raise InputError(f"training data {path}, row {number}: {wrong}")
    if len(rows) > 1:
        rows = [row for at, row in enumerate(rows) if held_out(kind, at) == evaluation]
    return rows, MAKERS[kind]


def _find(path: Path) -> Path:
    """The file itself, or that of a set's name in the folder of data sets."""
    given = path.expanduser()
    if given.exists():
        return given
    try:
        named = data_folder() / "train" / f"{path}.jsonl.gz"
    except InputError as error:
        raise InputError(f"no training data at {path} ({error})") from error
    if not named.exists():
        raise InputError(f"no training data at {path}, and no set of that name at {named}")
    return named


def _parse(path: Path) -> list[Row]:
    rows: list[Row] = []
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"training data {path} cannot be read as JSON lines: {error}; documents without "
            f"questions may be {', '.join(SUFFIXES)}"
        ) from error
    if not rows:
        raise InputError(f"training data {path} is empty")
    return rows


def _fields(row: Any) -> set[str]:
    return set(row) if isinstance(row, Mapping) else set()


def _wrong(value: Any, shape: Any, name: str) -> str | None:
    """What keeps a value from having a shape, or None."""
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{name} is {value!r:.40}, not an object"
        found = (_wrong(value.get(key), part, f"{name}.{key}") for key, part in shape.items())
        return next(filter(None, found), None)
    if isinstance(shape, _Many):
        if not isinstance(value, list) or len(value) < shape.least:
            return f"{name} is {value!r:.40}, not a list of {shape.least} or more"
        found = (_wrong(v, shape.each, f"{name}[{at}]") for at, v in enumerate(value))
        return next(filter(None, found), None)
    if not isinstance(value, shape) or not str(value).strip():
        return f"{name} is {value!r:.40}, not a text"
    return None


def _article(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    """Paragraphs of an article, a few of others among them, and questions to some of them."""
    row = rows[index]
    count = rng.randint(settings.min_chunks, settings.max_chunks)
    own = rng.sample(row["paragraphs"], min(count, len(row["paragraphs"])))
    chunks = [(Chunk(p["text"], title=_name(row)), p["qas"]) for p in own]
    for place in range(1, len(chunks)):
        if rng.random() < 0.2:
            chunks[place] = _paragraph(rows, rng)
    if len(rows) > 1:
        _fill(chunks, count, lambda: _paragraph(rows, rng))
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


def _paragraph(rows: Sequence[Row], rng: random.Random) -> tuple[Chunk, Any]:
    """One of any article, and its questions."""
    row = rng.choice(rows)
    paragraph = rng.choice(row["paragraphs"])
    return Chunk(paragraph["text"], title=_name(row)), paragraph["qas"]


def _document(rows: Sequence[Row], rng: random.Random) -> Any:
    """One of any question."""
    row = rng.choice(rows)
    golden = [doc for doc in row["docs"] if doc.get("gold", True)]
    return rng.choice([*golden, *_distractors(row)])


def _fill(items: list[Any], count: int, draw: Callable[[], Any]) -> None:
    """Draw until there are so many, none of them twice, as far as there are so many at all."""
    for _ in range(TRIES * count):
        if len(items) >= count:
            return
        item = draw()
        if item not in items:
            items.append(item)


def _question(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    """The gold documents and distractors, the question's own and those of other questions."""
    row = rows[index]
    count = rng.randint(settings.min_chunks, settings.max_chunks)
    docs = [doc for doc in row["docs"] if doc.get("gold", True)]
    pool = _distractors(row)
    docs += rng.sample(pool, min(max(count - len(docs), 0), len(pool)))
    if len(rows) > 1:
        _fill(docs, count, lambda: _document(rows, rng))
    rng.shuffle(docs)
    docs = docs[: settings.max_chunks]  # more gold documents than that
    turn = Turn(row["question"], _answer(row, rng))
    return Lesson(tuple(_chunk(doc) for doc in docs), (turn,), source="question")


def _distractors(row: Row) -> list[Any]:
    """At most six of a question's own, always the same: each cache is computed once."""
    pool = [doc for doc in row["docs"] if not doc.get("gold", True)]
    random.Random(str(row.get("id", row["question"]))).shuffle(pool)
    return pool[:6]


def _summary(
    rows: Sequence[Row], index: int, rng: random.Random, settings: TrainSettings
) -> Lesson:
    row = rows[index]
    pieces = [
        Chunk(piece, title=_title(doc)) for doc in row["docs"] for piece in _pieces(doc["text"])
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
    title = _title(row)
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
    return Chunk(doc["text"], title=_title(doc))


def _title(row: Row) -> str | None:
    return str(row.get("title") or "") or None


def _name(row: Row) -> str | None:
    """The title of an article."""
    return str(row.get("article") or "").replace("_", " ") or None


def _answer(row: Row, rng: random.Random) -> str:
    """One of the answers; the first is the usual form."""
    answers = row["answers"]
    return str(answers[0] if rng.random() < 0.7 else rng.choice(answers))


MAKERS: dict[str, Maker] = {
    "article": _article,
    "question": _question,
    "summary": _summary,
    "instruction": _instruction,
    "text": _text,
}
