"""What is to be measured: rows of the table, question sets, settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from kvlink_rag.chunk import RAW
from kvlink_rag.errors import AdapterRequiredError, InputError
from kvlink_rag.evaluation.data import SetKind
from kvlink_rag.prompt.layout import EncodeBehind
from kvlink_rag.prompt.segments import DEFAULT_RECOMPUTE, RecomputeBy
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
from kvlink_rag.store.codec import check_codec

RowStrategy = Literal["none", "full", "reuse", "recompute", "link"]
"""The engine's strategies, and `none`: the question without documents."""

MAX_NEW_TOKENS: Mapping[SetKind, int] = {"qa": 32, "summary": 128}


@dataclass(frozen=True)
class Row:
    """One line of the table: a way to answer.

    Args:
        name: in the table.
        adapter: folder, or name of one that comes with the package; None is the bare model.
        encode_behind: what chunks are encoded behind; None takes the adapter's, else the default.
        recompute, recompute_by: of `recompute`, as the engine's.
        codec: what caches are kept as (:mod:`kvlink_rag.store.codec`).

    Raises:
        InputError: a setting has no meaning.
        AdapterRequiredError: `link` without an adapter.
    """

    name: str
    strategy: RowStrategy
    adapter: str | None = None
    encode_behind: EncodeBehind | None = None
    recompute: float = DEFAULT_RECOMPUTE
    recompute_by: RecomputeBy = "question"
    codec: str = RAW

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"a row's name is {self.name!r}: it is to be a text")
        if self.strategy not in get_args(RowStrategy):
            raise InputError(
                f"row {self.name!r}: strategy {self.strategy!r} is none of "
                f"{', '.join(get_args(RowStrategy))}"
            )
        if self.encode_behind not in (None, *get_args(EncodeBehind)):
            raise InputError(
                f"row {self.name!r}: encode_behind {self.encode_behind!r} is none of "
                f"{', '.join(get_args(EncodeBehind))}"
            )
        if self.recompute_by not in get_args(RecomputeBy):
            raise InputError(
                f"row {self.name!r}: recompute_by {self.recompute_by!r} is none of "
                f"{', '.join(get_args(RecomputeBy))}"
            )
        if not isinstance(self.recompute, (int, float)) or not 0 <= self.recompute <= 1:
            raise InputError(
                f"row {self.name!r}: recompute is {self.recompute!r}, and not a share from 0 to 1"
            )
        check_codec(self.codec)
        if self.strategy == "link" and self.adapter is None:
            raise AdapterRequiredError(
                f"row {self.name!r}: strategy 'link' needs an adapter with trained link tokens: "
                "name one (--adapter), or leave 'link' out"
            )

    @property
    def anew(self) -> tuple[float, RecomputeBy] | None:
        """What is computed anew, if anything."""
        return (self.recompute, self.recompute_by) if self.strategy == "recompute" else None


@dataclass(frozen=True)
class Plan:
    """One evaluation.

    Args:
        model: hub id, folder or GGUF file.
        sets: question sets, by path or name.
        questions: the first so many of each set (and texts of each file); None is all.
        chunks: documents of each question of a QA set, the gold ones first; None is all.
        max_new_tokens: of an answer; None is 32, and 128 for summaries.
        seed: which distractors are taken.
        reference: name of the row that others are compared with; None is `full` without adapter.
        text, instructions: files to measure perplexity on, each adapter on against off.

    Raises:
        InputError: a setting has no meaning, or two rows have one name.
    """

    rows: tuple[Row, ...]
    sets: tuple[str, ...] = ()
    model: str = DEFAULT_MODEL
    questions: int | None = None
    chunks: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    reference: str | None = None
    text: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("questions", "chunks", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}, and not a number from 1 on")
        _each_once("rows are named", [row.name for row in self.rows])
        if not self.rows:
            raise InputError("there are no rows: name strategies (--strategies full,reuse)")
        if self.reference is not None and self.reference not in [row.name for row in self.rows]:
            raise InputError(
                f"the reference {self.reference!r} is no row: it is to be one of "
                f"{', '.join(row.name for row in self.rows)}"
            )

    @property
    def reference_row(self) -> str | None:
        """Name of the row that others are compared with."""
        plain = [row.name for row in self.rows if row.strategy == "full" and row.adapter is None]
        return self.reference or next(iter(plain), None)

    @property
    def adapters(self) -> list[str]:
        """The rows' adapters, each once."""
        return list(dict.fromkeys(row.adapter for row in self.rows if row.adapter))

    def new_tokens(self, kind: SetKind) -> int:
        """The longest answer for a kind of set."""
        return self.max_new_tokens or MAX_NEW_TOKENS[kind]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :func:`plan_of` is the way back."""
        return asdict(self)


def _each_once(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"two {what} {twice[0]!r}: give each a name of its own (--config)")


def make_rows(strategies: Sequence[str], adapters: Sequence[str]) -> tuple[Row, ...]:
    """Each strategy with the bare model (but `link`), then with each adapter.

    Raises:
        InputError: a strategy is unknown.
        AdapterRequiredError: `link` without an adapter.
    """
    bare = [s for s in strategies if s != "link" or not adapters]
    rows = [Row(name=s, strategy=s) for s in bare]  # type: ignore[arg-type]
    for adapter in adapters:
        rows += [
            Row(name=f"{s} {Path(adapter).name}", strategy=s, adapter=adapter)  # type: ignore[arg-type]
            for s in strategies
            if s != "none"
        ]
    return tuple(rows)


def read_plan(path: Path) -> dict[str, Any]:
    """The settings of a configuration file, as :func:`plan_of` takes them.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the configuration {path} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"the configuration {path} is not a JSON object")
    return settings


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """A plan from settings; the rows are objects with the fields of :class:`Row`.

    Raises:
        InputError, AdapterRequiredError: as :class:`Plan` and :class:`Row`.
    """
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    rows = given.get("rows", ())
    if not isinstance(rows, tuple) or not all(isinstance(row, (Row, dict)) for row in rows):
        raise InputError(f"rows is {rows!r}, and not a list of objects")
    given["rows"] = tuple(row if isinstance(row, Row) else _made(Row, "a row", row) for row in rows)
    plan: Plan = _made(Plan, "the configuration", given)
    return plan


def _made(kind: Any, what: str, given: Mapping[str, Any]) -> Any:
    known = [each.name for each in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{what} has {unknown[0]!r}, and knows only {', '.join(known)}")
    missing = [name for name in ("name", "strategy") if kind is Row and name not in given]
    if missing:
        raise InputError(f"{what} has no {missing[0]!r}: {dict(given)}")
    return kind(**given)
