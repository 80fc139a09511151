"""The runner: all rows of a few questions side by side, sharing what they have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from kvlink_rag.bench.series import machine
from kvlink_rag.chunk import RAW
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.evaluation import ability
from kvlink_rag.evaluation.data import read_set
from kvlink_rag.evaluation.decode import decode
from kvlink_rag.evaluation.items import Item, digest_of, make_items
from kvlink_rag.evaluation.journal import Journal, Line
from kvlink_rag.evaluation.metrics import best_subspan_em, rouge_l, token_f1
from kvlink_rag.evaluation.plan import Plan, Row
from kvlink_rag.evaluation.rows import context_key, row_digest, row_engines
from kvlink_rag.runners.transformers.forward import run_behind
from kvlink_rag.store import MemoryStore

GROUP_QUESTIONS = 16
GROUP_TOKENS = 24_000
"""Questions answered together: at most so many, with chunks of so many tokens."""

RUN = "run.json"
"""What was to be measured, and what identifies the answers to it."""


@dataclass(frozen=True, eq=False)
class RowAnswer:
    """A row's answer to a question; ``token_ids`` with the end token, if there is one."""

    row: Row
    item: Item
    text: str
    token_ids: list[int]


class Runner:
    """Answers the questions of one plan.

    Args:
        base: engine of the model without adapter; its own store is not touched.
    """

    def __init__(self, plan: Plan, base: KVLinkEngine) -> None:
        self.plan = plan
        self.store = MemoryStore()
        self.base = base.with_store(self.store)
        self.engines = row_engines(self.base, plan.rows)
        self.digests = {row: row_digest(row, e, self.base) for row, e in self.engines.items()}

    def digest(self, row: Row, item: Item) -> str:
        """Of a row's answer to a question."""
        return digest_of([self.digests[row], item.digest])

    def answers(self, items: Sequence[Item], skip: Iterable[str] = ()) -> Iterator[list[RowAnswer]]:
        """Answers to a group of questions, row by row; ``skip`` are digests of those not needed.

        Rows with the same context read it once: the first row's prefill is cut back to the end of
        the context for each of the others.
        """
        known = set(skip)
        sharing: dict[str, list[Row]] = {}
        for row, engine in self.engines.items():
            sharing.setdefault(context_key(row, engine), []).append(row)
        for rows in sharing.values():
            todo = {r: [i for i in items if self.digest(r, i) not in known] for r in rows}
            rows = [row for row in rows if todo[row]]
            wanted = [item for item in items if any(item in todo[row] for row in rows)]
            prefills = {item: self._prefill(rows[0], item) for item in wanted}
            for row in rows:
                yield self._decode(row, todo[row], prefills, fresh=row is rows[0])
        self.store.close()

    def _prefill(self, row: Row, item: Item) -> Prefill:
        """The prompt of a row with room for the answer."""
        engine = self.engines[row]
        chunks = () if row.strategy == "none" else item.chunks
        strategy = "full" if row.strategy == "none" else row.strategy
        prefill = partial(
            engine.prefill,
            item.question,
            chunks,
            strategy=strategy,
            recompute=row.recompute,
            recompute_by=row.recompute_by,
            max_new_tokens=item.max_new_tokens,
        )
        made = prefill()
        cached = sum(s.stop - s.start for s in made.segments if s.kind in ("prefix", "chunk"))
        if row.codec != RAW and made.report.reused_tokens < cached:
            return prefill()  # what was computed is read as its codec has it
        return made

    def _decode(
        self, row: Row, items: Sequence[Item], prefills: dict[Item, Prefill], fresh: bool
    ) -> list[RowAnswer]:
        """One row's answers; ``fresh`` when the prefills are its own and not yet decoded from."""
        engine, first = self.engines[row], []
        for item in items:
            prefill = prefills[item]
            logits = prefill.logits
            if not fresh:
                start = prefill.segments[-1].start
                prefill.cache.set_length(start)
                logits = run_behind(engine.reader, prefill.cache, prefill.token_ids[start:])
            first.append(int(logits.argmax()))
        token_ids = decode(
            engine.reader,
            engine.architecture,
            [prefills[item].cache for item in items],
            first,
            engine.stop_ids,
            max(item.max_new_tokens for item in items),
        )
        return [
            RowAnswer(row, item, self._text(ids), ids)
            for item, ids in zip(items, token_ids, strict=True)
        ]

    def _text(self, token_ids: list[int]) -> str:
        return str(
            self.base.tokenizer.decode(
                token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def evaluate(
    plan: Plan,
    base: KVLinkEngine,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Answer what a folder does not hold yet.

    Args:
        base: engine of the plan's model, without adapter.
        out: answers are added to its ``answers.jsonl`` as they are made; what was to be measured is
            in ``run.json``.
        shard: ``(i, n)`` takes every n-th question; all shards write to the same folder.

    Raises:
        InputError: a set is missing or damaged, or a question fits no prompt.
        AdapterError, AdapterRequiredError: an adapter is missing or does not fit.
    """
    runner = Runner(plan, base)
    files = ability.read_files(plan)
    sets = [read_set(name, plan.questions) for name in plan.sets]
    if any(each.kind == "summary" for each in sets):
        rouge_l("", [""])  # if its package is missing, say so before the work
    items = make_items(plan, sets, runner.engines, progress)
    _write_run(plan, runner, items, files, out)
    journal = Journal(out, "answers", shard)
    known = set(journal.read())
    mine = [
        item
        for item in items[shard[0] :: shard[1]]
        if any(runner.digest(row, item) not in known for row in plan.rows)
    ]
    with bar("Answering", len(mine), enabled=progress) as show:
        done = 0
        for group in groups(mine):
            for answers in runner.answers(group, known):
                journal.append(line(runner, answer) for answer in answers)
            done += len(group)
            show(done)
    ability.measure(plan, runner.base, files, out, shard, progress)


def line(runner: Runner, answer: RowAnswer) -> Line:
    """An answer as it is kept."""
    item = answer.item
    return {
        "set": item.set,
        "id": item.id,
        "row": answer.row.name,
        "digest": runner.digest(answer.row, item),
        "question": item.question,
        "gold": list(item.answers),
        "answer": answer.text,
        "scores": scores(item, answer.text),
        "tokens": len(answer.token_ids),
    }


def scores(item: Item, text: str) -> dict[str, float]:
    """An answer's scores, 0 to 1, by metric."""
    if item.kind == "summary":
        return {"rouge_l": rouge_l(text, item.answers)}
    return {"em": best_subspan_em(text, item.answers), "f1": token_f1(text, item.answers)}


def groups(items: Sequence[Item]) -> list[list[Item]]:
    """Questions to be answered together, of one set each; sets take turns.

    So that what an interrupted run leaves is balanced.
    """
    by_set: dict[str, list[list[Item]]] = {}
    for item in items:
        made = by_set.setdefault(item.set, [[]])
        full = sum(each.tokens for each in made[-1]) + item.tokens > GROUP_TOKENS
        if made[-1] and (full or len(made[-1]) == GROUP_QUESTIONS):
            made.append([])
        made[-1].append(item)
    turns = chain.from_iterable(zip_longest(*by_set.values()))
    return [group for group in turns if group]


def _write_run(
    plan: Plan, runner: Runner, items: Sequence[Item], files: Sequence[ability.File], out: Path
) -> None:
    """Everything that the table needs besides the lines, which may be of other runs, too."""
    sets: dict[str, dict[str, Any]] = {}
    for item in items:
        each = sets.setdefault(item.set, {"kind": item.kind, "dropped": {}, "items": {}})
        each["items"][item.id] = item.digest
        if item.dropped:
            each["dropped"][item.id] = item.dropped
    run = {
        "plan": plan.as_dict(),
        "machine": machine(runner.base),
        "rows": {row.name: runner.digests[row] for row in plan.rows},
        "sets": sets,
        "ability": ability.describe(plan, runner.base, files),
    }
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f"{RUN}.tmp"
    temporary.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / RUN)
