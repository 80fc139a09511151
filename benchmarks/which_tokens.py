"""Which tokens to compute anew, and what else might do: by how near it comes to full prefill.

    KVLINK_DATA=data python benchmarks/which_tokens.py --questions 10 --out which_tokens.json

For each question full prefill answers with up to ten tokens. Then those tokens are read once more
behind the same chunks from caches, of which a share was computed anew, and the distributions of all
of them are compared: mean divergence (KL, nats), and how many of the most likely tokens are the
same. Questions are those for training, none that accuracy is measured on.

Beside choices of tokens: APE (arXiv 2502.05431), whose attention over chunks has a temperature and
a scale of its own and computes nothing anew; chunks that were encoded behind the one that is most
like them, as FusionRAG (arXiv 2601.12904) does while indexing; and behind documents that were made
up (``encode_behind="documents"``).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.3)
ANSWER = 10


class Tempered(LinkedContext):
    """A context over whose chunks attention has a temperature and a scale of its own (APE).

    Attributes:
        chunks: positions of their tokens; set it, ``temperature`` and ``scale`` first.
    """

    chunks: torch.Tensor
    temperature: float
    scale: float

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        own = [each[0] for each in self.own.update(key, value, layer)]
        keys, values = self._moved(layer, *own)
        group = query.shape[1] // len(keys)
        scores = scale * query[0].float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2)
        at = torch.tensor(self.positions[-query.shape[2] :])
        scores.masked_fill_(torch.arange(keys.shape[1]) > at[:, None], float("-inf"))
        theirs = scores[..., self.chunks] / self.temperature
        theirs += (self.scale - 1) * theirs.logsumexp(-1, keepdim=True)
        scores[..., self.chunks] = theirs
        mixed = scores.softmax(-1) @ values.float().repeat_interleave(group, 0)
        return mixed.transpose(0, 1).to(query.dtype)


@dataclass(frozen=True, eq=False)
class Way:
    """How a question is read.

    Attributes:
        anew: positions that are computed anew.
        spans: the caches; None takes those of the trial.
        tempered: APE's temperature and scale.
    """

    anew: Sequence[int] = ()
    spans: Sequence[Span] | None = None
    tempered: tuple[float, float] | None = None


class Trial:
    """One question over its chunks."""

    def __init__(self, engine: KVLinkEngine, question: str, chunks: Sequence[Chunk]) -> None:
        self.engine, self.texts = engine, [chunk.text for chunk in chunks]
        full = engine.answer(question, chunks, strategy="full", max_new_tokens=ANSWER)
        self.answer = full.token_ids
        reuse = engine.prefill(question, chunks, strategy="reuse", max_new_tokens=ANSWER)
        assert isinstance(reuse.context, LinkedContext)
        self.spans: list[Span] = reuse.context.spans
        self.ids = [*reuse.token_ids, *self.answer[:-1]]
        self.start = reuse.segments[-1].start
        self.chunks = [s for s in reuse.segments if s.kind == "chunk"]
        self.places = torch.tensor([p for s in self.chunks for p in range(s.start, s.stop)])
        self.full = self._read(Way(range(self.start), ()))
        self.asked = range(self.start, len(reuse.token_ids))
        self.made_up = engine.with_encode_behind("documents").behind
        self.paid = self._paid(self.spans)

    def _read(self, way: Way) -> torch.Tensor:
        """Log probabilities of each token of the answer."""
        places = [*way.anew, *range(self.start, len(self.ids))]
        context = self._context(self.spans if way.spans is None else way.spans, len(places), way)
        context.replace(way.anew)
        tokens = Tokens(context, [self.ids[place] for place in places], places)
        logits = run_together(self.engine.reader, [tokens], every=True)
        return logits[-len(self.answer) :].log_softmax(-1)

    def _context(self, spans: Sequence[Span], room: int, way: Way) -> LinkedContext:
        runner: Any = self.engine.runner
        own, scratch = runner.encoder.new_cache(room), runner._scratch
        if way.tempered is None:
            return LinkedContext(self.engine.architecture, spans, own, scratch)
        made = Tempered(self.engine.architecture, spans, own, scratch)
        made.chunks, (made.temperature, made.scale) = self.places, way.tempered
        return made

    def _paid(self, spans: Sequence[Span]) -> torch.Tensor:
        """Attention of the question by layer, ``[layers, positions]``."""
        context = self._context(spans, len(self.asked), Way())
        context.paid = torch.zeros(self.engine.architecture.layers, self.start)
        question = Tokens(context, [self.ids[place] for place in self.asked], self.asked)
        with suppress(Measured):
            run_together(self.engine.reader, [question])
        return context.paid

    def ways(self) -> Iterator[tuple[str, Way]]:
        """What is compared with full prefill, by name."""
        layers = len(self.paid)
        some, part = measured(layers), self.paid.sum(0)
        middle = self.paid[some.start : some.stop].sum(0)
        yield "none", Way()
        for share in SHARES:
            yield f"all layers, {share:.0%}", self._top(part, share)
            yield f"layers {some.start} to {some.stop - 1}, {share:.0%}", self._top(middle, share)
            yield f"first of each chunk, {share:.0%}", self._first(share)
        early = round(0.4 * layers)
        yield f"layers 0 to {early - 1}, 8%", self._top(self.paid[:early].sum(0), 0.08)
        for layer in (layers // 6, layers // 2, layers - 1):
            yield f"layer {layer}, 8%", self._top(self.paid[layer], 0.08)
        weighted = (self.paid * self._sizes())[some.start : some.stop].sum(0)
        for share in (0.08, 0.16):
            yield f"attention by the values' norms, {share:.0%}", self._top(weighted, share)
        most = sorted(self.chunks, key=lambda s: -float(part[s.start : s.stop].mean()))
        for count in (1, 2):
            whole = [p for s in most[:count] for p in range(s.start, s.stop)]
            yield f"{count} whole chunks", Way(sorted(whole))
        for temperature, scale in ((0.9, 0.9), (0.8, 0.8), (0.9, 1.0), (1.0, 0.9)):
            name = f"APE, temperature {temperature}, scale {scale}"
            yield name, Way(tempered=(temperature, scale))
        for name, spans in (
            ("behind the most similar chunk", self._encoded(self._most_similar())),
            ("behind made-up documents", self._encoded([self.made_up] * len(self.chunks))),
        ):
            yield name, Way(spans=spans)
            yield f"{name}, APE, scale 0.9", Way(spans=spans, tempered=(1.0, 0.9))
            paid = self._paid(spans)[some.start : some.stop].sum(0)
            for share in (0.04, 0.08, 0.16):
                yield f"{name}, {share:.0%}", Way(self._top(paid, share).anew, spans)

    def _top(self, paid: torch.Tensor, share: float) -> Way:
        count = tokens_of(share, len(self.places))
        return Way(sorted(self.places[paid[self.places].topk(count).indices].tolist()))

    def _first(self, share: float) -> Way:
        return Way(
            [
                place
                for s in self.chunks
                for place in range(s.start, s.start + tokens_of(share, s.stop - s.start))
            ]
        )

    def _sizes(self) -> torch.Tensor:
        """Norms of the values of all heads by layer, ``[layers, positions]``."""
        sizes = torch.zeros_like(self.paid)
        for span in self.spans:
            values = span.record.values.float()
            sizes[:, span.start : span.stop] = values.square().sum((1, 3)).sqrt()
        return sizes

    def _most_similar(self) -> list[list[int]]:
        """For each chunk token ids of what it is encoded behind: the one most like it in words."""
        words = [set(text.lower().split()) for text in self.texts]
        found = []
        for number, chunk in enumerate(self.chunks):
            others = [i for i in range(len(words)) if i != number]
            near = self.chunks[
                max(others, key=lambda i: len(words[i] & words[number]) / len(words[i]))
            ]
            found.append([*chunk.behind, *self.ids[near.start : near.stop]])
        return found

    def _encoded(self, behind: Sequence[Sequence[int]]) -> list[Span]:
        """Caches of the chunks, each encoded behind something else."""
        spans = self.spans[: -len(self.chunks)]
        for chunk, its in zip(self.chunks, behind, strict=True):
            (encoded,) = self.engine.runner.encode([self.ids[chunk.start : chunk.stop]], its)
            spans.append(Span(encoded.records[0][1], chunk.start))
        return spans

    def distance(self, way: Way) -> dict[str, float]:
        """How far it is from full prefill."""
        found = self._read(way)
        kl = (self.full.exp() * (self.full - found)).sum(-1)
        same = (found.argmax(-1) == self.full.argmax(-1)).float()
        return {"kl": float(kl.mean()), "same": float(same.mean()), "tokens": float(len(way.anew))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10, help="of each of three sets")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = Path(os.environ.get("KVLINK_DATA", "../shared/data")) / "train"
    engine = KVLinkEngine.from_pretrained(DEFAULT_MODEL, dtype="bfloat16", encode_behind="system")
    examples: list[Example] = [
        example
        for name in SETS
        for example in read_set(str(folder / f"{name}.jsonl.gz"), given.questions).examples
    ]
    found: dict[str, list[dict[str, float]]] = {}
    with bar("Questions", len(examples)) as show, engine.runner.lock:
        for number, example in enumerate(examples, 1):
            trial = Trial(engine, example.question, example.chunks)
            for name, way in trial.ways():
                found.setdefault(name, []).append(trial.distance(way))
            show(number)
            result = {
                name: {key: mean(each[key] for each in rows) for key in rows[0]}
                for name, rows in found.items()
            }
            text = {"machine": machine(engine), "questions": number, "found": result}
            given.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    for name, row in result.items():
        print(f"{name:36} KL {row['kl']:.4f}, same {row['same']:.0%}, {row['tokens']:.0f} tokens")


if __name__ == "__main__":
    main()
