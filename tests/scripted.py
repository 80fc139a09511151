"""A runner without a model, and changes to what a runner says: for tests of everything above it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tiny
import torch
from transformers import PreTrainedTokenizerBase

from kvlink_rag import KVLinkEngine
from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.runners.base import Abilities, Encoded, Generation, Job, Prefilled
from kvlink_rag.store import open_store

VOCABULARY = 320
Script = Callable[[Job], Sequence[int]]
"""The tokens that a job is answered with, over and over; where to end is the engine's business."""


class ScriptedRunner:
    """Keys and values are made of the token ids alone; answers are what a script says.

    Logits are those of the script's first token. :attr:`encoded` and :attr:`jobs` tell what was
    asked for.
    """

    def __init__(self, script: Script | None = None, **abilities: Any) -> None:
        self.name = "scripted"
        self.tokenizer: PreTrainedTokenizerBase = tiny.tokenizer()
        self.adapter: Adapter | None = None
        self.fingerprint = "scripted"
        self.dtype = torch.float32
        self.max_tokens = 4096
        self.stop_ids = frozenset([int(self.tokenizer.eos_token_id)])  # type: ignore[arg-type]
        self.abilities = Abilities(
            **{
                "strategies": frozenset({"full", "reuse", "recompute"}),
                "together": frozenset({"reuse"}),
                **abilities,
            }
        )
        self.script: Script = script or (lambda job: self.tokenizer("Yes.<|end|>")["input_ids"])
        self.encoded: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.jobs: list[Job] = []

    def check_unchanged(self) -> None:
        """It never is."""

    def encode(
        self, texts: Sequence[Sequence[int]], behind: Sequence[int] = ()
    ) -> Iterator[Encoded]:
        for rank, text in enumerate(texts):
            self.encoded.append((tuple(text), tuple(behind)))
            ids = torch.tensor(text, dtype=torch.float32)[None, None, :, None]
            kv = ids.expand(2, 1, len(text), 4).contiguous()  # [layers, kv_heads, tokens, dim]
            record = ChunkKV(tuple(text), tuple(behind), self.fingerprint, kv, kv + 0.5)
            yield Encoded([(rank, record)], 0, 0.001)

    def start(self, jobs: Sequence[Job]) -> Generation:
        self.jobs += jobs
        return _Scripted(self, jobs)

    def with_adapter(self, adapter: Adapter | None, *, merge: bool | None = None) -> ScriptedRunner:
        assert adapter is None
        return ScriptedRunner(self.script)


class _Scripted:
    def __init__(self, runner: ScriptedRunner, jobs: Sequence[Job]) -> None:
        start = time.perf_counter()
        self._said = [list(runner.script(job)) for job in jobs]
        self._places = [0] * len(jobs)
        linked = any(job.records for job in jobs)
        self.link_s = time.perf_counter() - start if linked else 0.0
        self.prefilled = []
        for job, said in zip(jobs, self._said, strict=True):
            logits = torch.nn.functional.one_hot(torch.tensor(said[0]), VOCABULARY).float()
            if job.strategy != "full":  # as with real models, not quite the same
                logits[0] += 0.5
            computed = len(job.prompt.token_ids if job.strategy == "full" else job.prompt.computed)
            shown = logits if runner.abilities.logits else None
            self.prefilled.append(Prefilled(job.prompt.segments, computed, shown))

    def logits(self, row: int) -> torch.Tensor | None:
        place = self._places[row] - 1
        return self.look_ahead(row, range(place))[-1] if place > 0 else self.prefilled[row].logits

    def look_ahead(self, row: int, token_ids: Sequence[int]) -> torch.Tensor:
        said = self._said[row]
        next_ones = [said[(place + 1) % len(said)] for place in range(len(token_ids))]
        return torch.nn.functional.one_hot(torch.tensor(next_ones), VOCABULARY).float()

    def next_tokens(self, rows: Sequence[int]) -> list[int]:
        found = [self._said[row][self._places[row] % len(self._said[row])] for row in rows]
        for row in rows:
            self._places[row] += 1
        return found


def engine(runner: ScriptedRunner | None = None, **options: Any) -> KVLinkEngine:
    """An engine over a scripted runner: store in memory, `reuse`, unless told otherwise."""
    store = open_store(tiny.its_store(options))
    return KVLinkEngine(
        runner or ScriptedRunner(),
        store,
        **{"strategy": "reuse", "encode_behind": "system", **options},
    )


def rewrite(
    engine: KVLinkEngine, change: Callable[[Job, Iterator[int]], Iterator[int]]
) -> Callable[[], None]:
    """From now on an engine's answers are what ``change`` makes of a job and of its own tokens.

    Returns:
        takes it back.
    """
    runner: Any = engine.runner
    start = runner.start

    def started(jobs: Sequence[Job]) -> Generation:
        return _Rewritten(start(jobs), jobs, change)

    def restore() -> None:
        runner.start = start

    runner.start = started
    return restore


class _Rewritten:
    def __init__(self, own: Generation, jobs: Sequence[Job], change: Any) -> None:
        self.prefilled, self.link_s, self._own = own.prefilled, own.link_s, own

        def tokens(row: int) -> Iterator[int]:
            while True:
                yield own.next_tokens([row])[0]

        self._tokens = [change(job, tokens(row)) for row, job in enumerate(jobs)]

    def next_tokens(self, rows: Sequence[int]) -> list[int]:
        return [next(self._tokens[row]) for row in rows]

    def logits(self, row: int) -> torch.Tensor | None:
        return self._own.logits(row)

    def look_ahead(self, row: int, token_ids: Sequence[int]) -> torch.Tensor:
        return self._own.look_ahead(row, token_ids)


def note_prompts(engine: KVLinkEngine) -> list[list[int]]:
    """A list that the token ids of each prompt from now on are added to."""
    prompts: Any = engine.pipeline.prompts
    lay_out, noted = prompts.of, []

    def note(*args: Any) -> Any:
        found = lay_out(*args)
        noted.append(found.token_ids)
        return found

    prompts.of = note
    return noted
