"""Answers in the making, token by token; several share each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvlink_rag.runners.base import Job, Prefilled
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.model_lock import ModelLock, let_go
from kvlink_rag.runners.transformers.sampling import Sampler
from kvlink_rag.runners.transformers.state import PromptState
from kvlink_rag.runners.transformers.together import Tokens, run_together


class TransformersGeneration:
    """A :class:`kvlink_rag.runners.base.Generation` over a model in this process.

    Args:
        jobs, prefilled: what was asked for, and what came of it (``logits`` and ``state`` set).
        lock: of the model.
    """

    def __init__(
        self, jobs: Sequence[Job], prefilled: list[Prefilled], link_s: float, lock: ModelLock
    ) -> None:
        self.prefilled = prefilled
        self.link_s = link_s
        self._lock = lock
        self._states: list[PromptState] = [each.state for each in prefilled]
        device = self._states[0].model.device
        self._samplers = [
            Sampler(job.settings, device) if job.settings is not None else None for job in jobs
        ]
        self._last: list[Any] = [None] * len(jobs)  # tokens
        self._chosen_from: list[torch.Tensor | None] = [each.logits for each in prefilled]

    def next_tokens(self, rows: Sequence[int]) -> list[int]:
        """As :meth:`kvlink_rag.runners.base.Generation.next_tokens`."""
        if self._last[rows[0]] is None:
            found = [self._choose(row, self._first(row)) for row in rows]
            let_go()  # large vocabularies take a team of threads to choose from
            return found
        with self._lock:
            return [self._choose(r, its) for r, its in zip(rows, self._behind(rows), strict=True)]

    def logits(self, row: int) -> torch.Tensor | None:
        """As :meth:`kvlink_rag.runners.base.Generation.logits`."""
        return self._chosen_from[row]

    def look_ahead(self, row: int, token_ids: Sequence[int]) -> torch.Tensor:
        """As :meth:`kvlink_rag.runners.base.Generation.look_ahead`."""
        with self._lock:
            return self._states[row].look_ahead(token_ids)

    def _first(self, row: int) -> torch.Tensor:
        logits = self.prefilled[row].logits
        assert logits is not None
        return logits

    def _choose(self, row: int, logits: torch.Tensor) -> int:
        sampler = self._samplers[row]
        assert sampler is not None, "a job without settings generates nothing"
        token = sampler.choose(logits)
        self._chosen_from[row] = logits
        self._last[row] = token
        return token

    def _behind(self, rows: Sequence[int]) -> Sequence[torch.Tensor]:
        """``[vocab]`` float32 a row, behind its last token."""
        last = [self._last[row] for row in rows]
        contexts = [self._states[row].context for row in rows]
        linked = [context for context in contexts if isinstance(context, LinkedContext)]
        if len(rows) > 1 and len(linked) == len(rows):
            parts = [Tokens(c, [token], [c.stop]) for c, token in zip(linked, last, strict=True)]
            return list(run_together(self._states[rows[0]].model, parts))
        return [self._states[row].run([token]) for row, token in zip(rows, last, strict=True)]
