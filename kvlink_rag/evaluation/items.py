"""What each row answers: questions with the chunks they are asked over, fitted to the model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError
from kvlink_rag.evaluation.data import Example, QuestionSet, SetKind
from kvlink_rag.evaluation.plan import Plan, Row
from kvlink_rag.index.documents import split

PART_TOKENS = 300
"""Longer documents of a summary set are cut into chunks of at most so many tokens."""
_SPARE = 16
"""Tokens that are kept free for what an adapter puts around the chunks."""


@dataclass(frozen=True, eq=False)
class Item:
    """A question of a set.

    Attributes:
        answers: right answers, or reference summaries.
        chunks: what the model is given, the same for every row.
        max_new_tokens: of the answer.
        tokens: of all chunks.
        dropped: last chunks left out because the prompt would not have fitted.
    """

    set: str
    kind: SetKind
    id: str
    question: str
    answers: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    max_new_tokens: int
    tokens: int = 0
    dropped: int = 0

    @property
    def digest(self) -> str:
        """Over everything that an answer and its scores depend on."""
        chunks = [[chunk.title, chunk.text] for chunk in self.chunks]
        about = [self.set, self.kind, self.id, self.question, self.answers]
        return digest_of([*about, chunks, self.max_new_tokens])


def digest_of(value: Any) -> str:
    """32 hex digits over something that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def make_items(
    plan: Plan,
    sets: Sequence[QuestionSet],
    engines: Mapping[Row, KVLinkEngine],
    progress: bool = False,
) -> list[Item]:
    """All questions of all sets.

    Args:
        engines: of each row; the chunks fit the prompt of each of them.

    Raises:
        InputError: not even one chunk fits, or an adapter has too few slots.
    """
    items: list[Item] = []
    total = sum(len(each.examples) for each in sets)
    with bar("Tokenising", total, enabled=progress) as show:
        for each in sets:
            for example in each.examples:
                items.append(_item(plan, each.name, example, engines))
                show(len(items))
    return items


def _item(plan: Plan, name: str, example: Example, engines: Mapping[Row, KVLinkEngine]) -> Item:
    engine = next(iter(engines.values()))
    if example.kind == "summary":
        chunks = [part for chunk in example.chunks for part in _parts(chunk, engine)]
    else:
        rng = random.Random(f"{plan.seed} {example.id}")
        chunks = example.with_chunks(plan.chunks or len(example.chunks), rng)
    item = Item(
        set=name,
        kind=example.kind,
        id=example.id,
        question=example.question,
        answers=example.answers,
        chunks=tuple(chunks),
        max_new_tokens=plan.new_tokens(example.kind),
    )
    return _fit(item, engines)


def _parts(chunk: Chunk, engine: KVLinkEngine) -> list[Chunk]:
    texts = split(chunk.text, engine.tokenizer, PART_TOKENS, overlap=0)
    return [replace(chunk, text=text) for text in texts]


def _fit(item: Item, engines: Mapping[Row, KVLinkEngine]) -> Item:
    """The item without the last chunks that do not fit the model's context in every row."""
    layouts = {str(vars(e.layout.template)): e.layout for e in engines.values()}.values()
    lengths = [max(len(layout.chunk(chunk)) for layout in layouts) for chunk in item.chunks]
    parts = [layout.lay_out(item.question) for layout in layouts]
    around = max(len(each.prefix) + len(each.question) for each in parts) + _SPARE
    limit = min(engine.architecture.max_tokens for engine in engines.values())
    limit -= around + item.max_new_tokens
    for count in range(len(item.chunks), 0, -1):
        tokens = sum(lengths[:count])
        if tokens + _most_links(item, engines, count) <= limit:
            dropped = len(item.chunks) - count
            return replace(item, chunks=item.chunks[:count], tokens=tokens, dropped=dropped)
    raise InputError(
        f"{item.set}, {item.id!r}: not even its first chunk ({lengths[0]} tokens) fits the model's "
        "context with the question and the answer"
    )


def _most_links(item: Item, engines: Mapping[Row, KVLinkEngine], count: int) -> int:
    """The most link tokens that a row has in a prompt of ``count`` chunks."""
    most = 0
    for row, engine in engines.items():
        if row.strategy == "link" and engine.adapter and engine.adapter.links:
            try:
                ids = [engine.adapter.links.ids(slot, count) for slot in range(count)]
            except InputError as error:
                raise InputError(
                    f"row {row.name!r} cannot answer {item.set}: {error} (or use --chunks)"
                ) from error
            most = max(most, sum(map(len, ids)))
    return most
