"""What `auto` comes to: the cheapest way whose answers are meant to be those of full prefill.

What a trial on a user's own documents has chosen (:mod:`kvlink_rag.engine.tune`) is kept beside the
store's caches, and goes before what holds for any model.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.common.whole import write_whole
from kvlink_rag.engine.report import way_in_words
from kvlink_rag.errors import KVLinkWarning, StoreError
from kvlink_rag.prompt.layout import EncodeBehind
from kvlink_rag.prompt.segments import DEFAULT_RECOMPUTE, Strategy
from kvlink_rag.runners.base import ModelRunner
from kvlink_rag.store import FolderStore, KVStore
from kvlink_rag.store.folder.behind import FolderBehind

StrategyOption = Literal["auto", "full", "reuse", "link", "recompute"]
"""What can be asked for: a strategy, or the choice of one."""

BEHIND_DOCUMENTS = 0.04
"""Share of the chunks' tokens."""

FILE = "tuned.json"
"""In a store's folder: choices, by who reads its caches."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and how it came to be.

    Attributes:
        why: a sentence for people.
        recompute: with `recompute`, the share.
    """

    strategy: Strategy
    why: str
    recompute: float = DEFAULT_RECOMPUTE

    @property
    def way(self) -> str:
        """Strategy and share in words."""
        return way_in_words(self.strategy, self.recompute)


def choose(runner: ModelRunner, encode_behind: EncodeBehind, tuned: Choice | None = None) -> Choice:
    """The strategy of `auto` for a model, and chunks that were encoded behind something.

    Plain `reuse` answers worse than full prefill unless the model itself was trained for it, and a
    cache-preserving adapter restores a part only; `recompute` by question comes nearer for both
    (docs/accuracy.md has how near, as far as it was measured).

    Args:
        tuned: what a trial has chosen; it counts wherever the model can be run so.
    """
    adapter, strategies = runner.adapter, runner.abilities.strategies
    if tuned is not None and tuned.strategy in strategies:
        return tuned
    if adapter is not None and adapter.kind == "whole-model" and "reuse" in strategies:
        return Choice("reuse", f"the weights of {adapter.name} were trained for chunks read apart")
    if "recompute" in strategies:
        why = "plain reuse answers worse than full prefill"
        return Choice("recompute", why, _share(encode_behind, adapter))
    return Choice(
        "full",
        f"{runner.name} can compute no part of a chunk anew here, and plain reuse answers worse",
    )


def _share(encode_behind: EncodeBehind, adapter: Adapter | None) -> float:
    """What `auto` computes anew, before anything was tuned.

    Chunks that were encoded behind documents are nearer to what they are in a prompt: 4 % anew do
    for an untuned model what 15 % do behind the prefix, and for an adapter they were too little
    (docs/accuracy.md).
    """
    return BEHIND_DOCUMENTS if encode_behind == "documents" and not adapter else DEFAULT_RECOMPUTE


class Choices:
    """The choices kept in the folder of a store, for one who reads its caches.

    A store without a folder (memory, others' stores) keeps none.

    Args:
        behind: token ids that the chunks are encoded behind.
    """

    def __init__(self, store: KVStore, runner: ModelRunner, behind: Sequence[int]) -> None:
        adapter = runner.adapter.fingerprint if runner.adapter else ""
        who = json.dumps([runner.fingerprint, adapter, list(behind)])
        self._reader = hashlib.sha256(who.encode()).hexdigest()[:32]
        self.path: Path | None = None
        if isinstance(store, FolderBehind):
            store = store.folder_behind()
        if isinstance(store, FolderStore):
            self.path = store.path / FILE

    def find(self) -> Choice | None:
        """What was chosen; None where nothing was, or (warned) it cannot be read."""
        if self.path is None:
            return None
        try:
            told = self._read(self.path).get(self._reader)
            return None if told is None else _choice(told)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"cannot read what was tuned, {self.path} ({error}): strategy auto does without; "
                "run kvlink tune again, or remove the file",
                KVLinkWarning,
                stacklevel=4,
            )
            return None

    def ready(self) -> None:
        """Say now, and not after all the measuring, that nothing can be written there.

        Raises:
            StoreError: it cannot.
        """
        if self.path is not None:
            with self._writing(self.path):
                pass

    def keep(self, choice: Choice) -> None:
        """Write down what was chosen, wholly or not at all; other readers' choices stay.

        Raises:
            StoreError: it cannot be written.
        """
        if self.path is None:
            return
        with self._writing(self.path):
            try:
                known = self._read(self.path)
            except ValueError:  # warned of when it was looked for; it is made anew
                known = {}
            known[self._reader] = asdict(choice)
            write_whole(self.path, json.dumps(known, indent=1, ensure_ascii=False))

    @staticmethod
    @contextmanager
    def _writing(path: Path) -> Iterator[None]:
        """One process at a time."""
        try:
            with FileLock(path.with_name(f"{FILE}.lock")):
                yield
        except OSError as error:
            raise StoreError(
                f"cannot write what was tuned to {path}: {error}; make the folder writable, or "
                "copy the store to one that is"
            ) from error

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            told = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        if not isinstance(told, dict):
            raise ValueError("it is no JSON object")
        return told


def _choice(told: dict[str, Any]) -> Choice:
    strategy, share = told["strategy"], float(told["recompute"])
    if strategy not in ("full", "reuse", "link", "recompute") or not 0 <= share <= 1:
        raise ValueError(f"strategy {strategy!r}, share {share}")
    return Choice(strategy, str(told["why"]), share)
