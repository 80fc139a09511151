"""What everyone who runs a model can do for an engine.

An engine decides what is reused, in which order and by which strategy, and keeps the store. A
runner computes: it makes chunk caches of token ids, and answers from a prompt and the caches of its
parts. It knows no store, no text and no question.

The way of an answer: the engine lays the prompt out as token ids, gets the caches that it wants
from its store, lets :meth:`ModelRunner.encode` compute those that are missing, hands all of it to
:meth:`ModelRunner.start`, and asks the :class:`Generation` that comes back for one token after the
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.common.numbers import real, whole
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.segments import Prompt, RecomputeBy, Segment, Strategy


@dataclass(frozen=True)
class Abilities:
    """What a runner can be asked for; an engine refuses all else before anything is computed.

    Attributes:
        strategies: how it can make one context of caches. `full` is always among them.
        logits: whether it shows those of the first answer token. Without, there is no
            ``engine.prefill`` and no check of fidelity.
        together: strategies by which several prompts are answered sooner together than one after
            the other.
        codecs: caches that went through these it is given as :class:`kvlink_rag.chunk.CodedKV`;
            all others with their keys and values decoded.
    """

    strategies: frozenset[Strategy]
    logits: bool = True
    together: frozenset[Strategy] = frozenset()
    codecs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GenerateSettings:
    """How an answer is decoded.

    Args:
        max_new_tokens: the most tokens to produce.
        temperature: 0 is greedy; above it, sampling.
        top_p: sample from the smallest set of tokens with this probability (nucleus sampling).
        stop: the answer ends before the first of these strings.
        seed: makes sampling repeatable; None draws a new one.

    Raises:
        InputError: naming the value that is out of range, or of another type.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        coerced: dict[str, Any] = {
            "max_new_tokens": whole("max_new_tokens", self.max_new_tokens),
            "temperature": real("temperature", self.temperature),
            "top_p": real("top_p", self.top_p),
            "seed": None if self.seed is None else whole("seed", self.seed),
        }
        for name, value in coerced.items():
            object.__setattr__(self, name, value)  # it is frozen
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed must be an integer of 64 bits, not {self.seed}")
        if not isinstance(self.stop, Sequence) or not all(isinstance(s, str) for s in self.stops):
            raise InputError(f"stop must be a string or a list of strings, not {self.stop!r}")
        if "" in self.stops:
            raise InputError("a stop string must not be empty")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class Job:
    """A prompt to answer, with everything that it is made of.

    Attributes:
        prompt: token ids and segments. Ids at or above the vocabulary's size are the adapter's link
            tokens.
        strategy: of :attr:`Abilities.strategies`.
        records: for each of ``prompt.cached`` the cache that stands there, None where the segment
            is empty; nothing for `full`. Keys are at the positions where they were computed: moving
            them is the runner's work, and a record is never changed.
        recompute: with `recompute`, the share of the chunks' tokens that is computed anew.
        recompute_by: with `recompute`, which.
        settings: how to go on after the prompt; None where nothing will be generated.
    """

    prompt: Prompt
    strategy: Strategy
    records: Sequence[ChunkKV | None] = ()
    recompute: float = 0.0
    recompute_by: RecomputeBy = "question"
    settings: GenerateSettings | None = None


@dataclass(frozen=True)
class Encoded:
    """Caches that were made together.

    Attributes:
        records: pairs of a text's rank among those given and its cache.
        behind_tokens: tokens that ran through the model for what the texts stand behind; 0 where
            that had been computed before.
        seconds: that the model was busy with it.
    """

    records: list[tuple[int, ChunkKV]]
    behind_tokens: int
    seconds: float


@dataclass(frozen=True)
class Prefilled:
    """A prompt that was read.

    Attributes:
        segments: the prompt's, with what `recompute` chose in full view.
        computed_tokens: that ran through the model.
        logits: ``[vocab]`` float32, of the first answer token; None where the runner shows none.
        state: what the runner keeps of it, for those who know the runner.
    """

    segments: list[Segment]
    computed_tokens: int
    logits: torch.Tensor | None = None
    state: Any = field(default=None, repr=False)


class Generation(Protocol):
    """Prompts that were read, and their answers in the making. For one thread at a time.

    Attributes:
        prefilled: one for each job, in their order.
        link_s: wall seconds of :meth:`ModelRunner.start` in which caches became contexts, before
            anything was computed.
    """

    prefilled: list[Prefilled]
    link_s: float

    def next_tokens(self, rows: Sequence[int]) -> list[int]:
        """The next token of each of these rows, chosen as their settings say.

        The first call gives first tokens. Rows are ranks of jobs, increasing; a row that is left
        out once has ended and is not asked for again. An end token is a token like any other: the
        engine ends the row.
        """
        ...

    def logits(self, row: int) -> torch.Tensor | None:
        """What the row's last token was chosen from, ``[vocab]`` float32.

        Before the first token, those it will be chosen from; None where the runner shows none.
        """
        ...

    def look_ahead(self, row: int, token_ids: Sequence[int]) -> torch.Tensor:
        """What the model would say behind each of these tokens (one or more), if they came next.

        Stands before the row's first token, and leaves the row as it is. Only asked of runners that
        show logits.

        Returns:
            logits ``[tokens, vocab]`` float32.
        """
        ...


@runtime_checkable
class ModelRunner(Protocol):
    """Runs one model. Safe to use from several threads, which take turns where they have to.

    Attributes:
        name: what the model was named by; for messages.
        tokenizer: of the model.
        adapter: what is active in every strategy, or None.
        fingerprint: identity of what makes the caches: models with the same one compute the same
            keys and values of the same tokens, within rounding. Part of every cache's key.
        dtype: of keys and values.
        max_tokens: the longest prompt with its answer.
        stop_ids: tokens that end an answer.
        abilities: what it can be asked for.
    """

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def adapter(self) -> Adapter | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def abilities(self) -> Abilities: ...

    def check_unchanged(self) -> None:
        """Refuse to go on where the model computes something else than its fingerprint says.

        Raises:
            InputError: saying what changed and what to do.
        """

    def encode(
        self, texts: Sequence[Sequence[int]], behind: Sequence[int] = ()
    ) -> Iterator[Encoded]:
        """Make the caches of texts (token ids, none empty), batch by batch, in any order.

        Each text stands right behind ``behind``, sees that and itself, and nothing else. Its cache
        has keys ``[layers, kv_heads, tokens, head_dim]`` at positions ``len(behind) ...`` and
        values alike, of :attr:`dtype`, without those of ``behind``, and the runner's fingerprint.
        Others may use the model between two batches.
        """
        ...

    def start(self, jobs: Sequence[Job]) -> Generation:
        """Read prompts, up to where the first token of each answer can be chosen.

        What a prompt's tokens see is what its segments say, whatever the runner does to get there;
        several jobs have one strategy, and each is answered as if it were alone.

        Raises:
            UnsupportedModelError: the model's own parts cannot do what the strategy needs.
        """
        ...

    def with_adapter(self, adapter: Adapter | None, *, merge: bool | None = None) -> ModelRunner:
        """A runner of the same model with another adapter, or none.

        Args:
            merge: add its LoRA to a copy of the weights that it changes; None: as this runner did.

        Raises:
            AdapterError: it does not fit the model.
        """
        ...
