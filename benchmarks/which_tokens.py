"""Which tokens to compute anew: ways to choose them, by how near they come to full prefill.

    KVLINK_DATA=data python benchmarks/which_tokens.py --questions 10 --out which_tokens.json

For each question full prefill answers with up to ten tokens. Then those tokens are read once more
behind the same chunks from caches, of which a share was computed anew, and the distributions of all
of them are compared: mean divergence (KL, nats), and whether each most likely token is the same, so
that greedy answers are. Questions are those for training, none that accuracy is measured on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.bench.series import machine
from kvlink_rag.common.progress import bar
from kvlink_rag.evaluation.data import Example, read_set
from kvlink_rag.prompt.segments import tokens_of
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
from kvlink_rag.runners.transformers.relevance import Measured, measured
from kvlink_rag.runners.transformers.together import Tokens, run_together
from kvlink_rag.runners.transformers.visibility import Span

SETS = ("hotpotqa_train", "2wikimultihopqa_train", "musique_train")
SHARES = (0.02, 0.04, 0.08, 0.16)
ANSWER = 10


class Trial:
    """One question over its chunks."""

    def __init__(self, engine: KVLinkEngine, question: str, chunks: Sequence[Chunk]) -> None:
        self.engine = engine
        full = engine.answer(question, chunks, strategy="full", max_new_tokens=ANSWER)
        self.answer = full.token_ids
        reuse = engine.prefill(question, chunks, strategy="reuse", max_new_tokens=ANSWER)
        assert isinstance(reuse.context, LinkedContext)
        self.spans: list[Span] = reuse.context.spans
        self.ids = [*reuse.token_ids, *self.answer[:-1]]
        self.start = reuse.segments[-1].start
        self.chunks = [s for s in reuse.segments if s.kind == "chunk"]
        self.full = self._read([], range(len(reuse.token_ids) + len(self.answer) - 1), [])
        self.paid = self._paid(len(reuse.token_ids))

    def _read(
        self, anew: Sequence[int], rest: Sequence[int], spans: Sequence[Span]
    ) -> torch.Tensor:
        """Log probabilities of each token of the answer."""
        found = []
        places = [*anew, *rest]
        context = self._context(spans, len(places))
        context.replace(anew)
        # the answer one token after the other: a forward pass gives the last one's logits
        first = len(places) - len(self.answer) + 1
        for part in ([places[:first]] if first else []) + [[p] for p in places[first:]]:
            tokens = Tokens(context, [self.ids[p] for p in part], part)
            found.append(run_together(self.engine.reader, [tokens])[0].log_softmax(-1))
        return torch.stack(found)

    def _context(self, spans: Sequence[Span], room: int) -> LinkedContext:
        runner: Any = self.engine.runner
        own = runner.encoder.new_cache(room)
        return LinkedContext(self.engine.architecture, spans, own, runner._scratch)

    def _paid(self, stop: int) -> torch.Tensor:
        """Attention of the question by layer, ``[layers, positions]``."""
        context = self._context(self.spans, stop - self.start)
        context.paid = torch.zeros(self.engine.architecture.layers, self.start)
        question = Tokens(context, self.ids[self.start : stop], range(self.start, stop))
        with suppress(Measured):
            run_together(self.engine.reader, [question])
        return context.paid

    def choices(self) -> Iterator[tuple[str, list[int]]]:
        """Ways to choose, and the positions chosen."""
        layers = len(self.paid)
        some, part = measured(layers), self.paid.sum(0)
        yield "none", []
        for share in SHARES:
            yield f"all layers, {share:.0%}", self._top(part, share)
            middle = self.paid[some.start : some.stop].sum(0)
            yield f"layers {some.start} to {some.stop - 1}, {share:.0%}", self._top(middle, share)
        early = round(0.4 * layers)
        yield f"layers 0 to {early - 1}, 8%", self._top(self.paid[:early].sum(0), 0.08)
        for layer in (layers // 6, layers // 2, layers - 1):
            yield f"layer {layer}, 8%", self._top(self.paid[layer], 0.08)
        most = sorted(self.chunks, key=lambda s: -float(part[s.start : s.stop].mean()))
        for count in (1, 2):
            whole = [p for s in most[:count] for p in range(s.start, s.stop)]
            yield f"{count} whole chunks", sorted(whole)

    def _top(self, paid: torch.Tensor, share: float) -> list[int]:
        places = torch.tensor([p for s in self.chunks for p in range(s.start, s.stop)])
        count = tokens_of(share, len(places))
        return sorted(places[paid[places].topk(count).indices].tolist())

    def distance(self, anew: Sequence[int]) -> dict[str, float]:
        """How far it is from full prefill."""
        found = self._read(anew, range(self.start, len(self.ids)), self.spans)
        kl = (self.full.exp() * (self.full - found)).sum(-1)
        same = bool((found.argmax(-1) == self.full.argmax(-1)).all())
        return {"kl": float(kl.mean()), "same": float(same), "tokens": float(len(anew))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10, help="of each of three sets")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = Path(os.environ.get("KVLINK_DATA", "../shared/data")) / "train"
    engine = KVLinkEngine.from_pretrained(DEFAULT_MODEL, dtype="float32")
    examples: list[Example] = [
        example
        for name in SETS
        for example in read_set(str(folder / f"{name}.jsonl.gz"), given.questions).examples
    ]
    found: dict[str, list[dict[str, float]]] = {}
    with bar("Questions", len(examples)) as show, engine.runner.lock:
        for number, example in enumerate(examples, 1):
            trial = Trial(engine, example.question, example.chunks)
            for name, anew in trial.choices():
                found.setdefault(name, []).append(trial.distance(anew))
            show(number)
            result = {
                name: {key: mean(each[key] for each in rows) for key in rows[0]}
                for name, rows in found.items()
            }
            text = {"machine": machine(engine), "questions": number, "found": result}
            given.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    for name, row in result.items():
        print(f"{name:24} KL {row['kl']:.4f}, same {row['same']:.0%}, {row['tokens']:.0f} tokens")


if __name__ == "__main__":
    main()
