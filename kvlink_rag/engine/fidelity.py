"""Fidelity: how far the distributions that an answer is chosen from are from full prefill's."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from numbers import Real

import torch

from kvlink_rag.common.numbers import real
from kvlink_rag.errors import InputError

SEED = 0
"""Of the choice of answers that are checked: the same calls in the same order check the same."""


@dataclass(frozen=True)
class Fidelity:
    """The distance of a strategy's distributions ``q`` from full prefill's ``p``.

    Of the first token, or of several: then both have read the same tokens of the answer before it.

    Attributes:
        kl_nats: Kullback-Leibler divergence ``KL(p || q) = sum_t p(t) (ln p(t) - ln q(t))`` over
            the vocabulary, both at temperature 1; 0 or more, infinite where ``q`` rules out what
            ``p`` allows. The mean over the tokens compared.
        total_variation: ``sum_t |p(t) - q(t)| / 2``, in 0 ... 1; the mean.
        same_token: whether the most likely token is the same, at each place compared.
        tokens: how many were compared.
        other_tokens: at how many the most likely token is another.
    """

    kl_nats: float
    total_variation: float
    same_token: bool
    tokens: int = 1
    other_tokens: int = 0

    def is_beyond(self, limit: float) -> bool:
        """Whether an answer is to fall back to full prefill."""
        return not self.kl_nats <= limit


def compare(full: torch.Tensor, other: torch.Tensor) -> Fidelity:
    """The fidelity of logits ``other`` to ``full``, both ``[vocab]`` or ``[tokens, vocab]``."""
    kl = total = 0.0
    rows = list(zip(full.view(-1, full.shape[-1]), other.view(-1, full.shape[-1]), strict=True))
    for one, its in rows:
        ln_p, ln_q = (logits.double().log_softmax(-1) for logits in (one, its))
        p, q = ln_p.exp(), ln_q.exp()
        # float64 rounding may leave equal distributions a hair below 0
        kl += max(float(torch.where(p > 0, p * (ln_p - ln_q), 0.0).sum()), 0.0)
        total += float((p - q).abs().sum() / 2)
    others = sum(bool(one.argmax() != its.argmax()) for one, its in rows)
    count = len(rows)
    return Fidelity(kl / count, total / count, not others, count, others)


@dataclass(frozen=True)
class FidelityStats:
    """What an engine's checks have found so far.

    Attributes:
        checked: answers compared with full prefill.
        fallbacks: of these, how many were above the limit and answered from full prefill.
        mean_kl_nats, max_kl_nats: over the checked answers; 0 without any.
        other_token_share: share of the checked answers where a most likely token differs.
    """

    checked: int = 0
    fallbacks: int = 0
    mean_kl_nats: float = 0.0
    max_kl_nats: float = 0.0
    other_token_share: float = 0.0


def check_rate(rate: float) -> float:
    """A share of answers.

    Raises:
        InputError: it is out of range.
    """
    share = real("fidelity_rate", rate)
    if not 0 <= share <= 1:
        raise InputError(f"fidelity_rate must be in 0 ... 1, not {rate}")
    return share


def check_tokens(tokens: int) -> int:
    """How many tokens of an answer are compared.

    Raises:
        InputError: it is no int >= 1.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InputError(f"fidelity_tokens is {tokens!r}: pass how many, an int >= 1")
    return tokens


def check_limit(limit: float | None) -> float | None:
    """A divergence above which an answer falls back to full prefill; None: never.

    Raises:
        InputError: it is out of range.
    """
    number = isinstance(limit, Real) and not isinstance(limit, bool)
    if limit is not None and not (number and limit >= 0):  # infinity, too
        raise InputError(
            f"fidelity_limit must be 0 or more (nats), or None for no limit, not {limit!r}"
        )
    return limit


class FidelityMonitor:
    """Says which answers to check, and counts what the checks find. Safe to use from threads."""

    def __init__(self) -> None:
        self._random = random.Random(SEED)
        self._lock = threading.Lock()
        self._checked = self._fallbacks = self._other_tokens = 0
        self._kl_sum = self._kl_max = 0.0

    def choose(self, rate: float) -> bool:
        """Whether to check the next answer, one of such a share."""
        with self._lock:
            return self._random.random() < rate

    def count(self, found: Fidelity, *, fell_back: bool) -> None:
        """One more answer was checked."""
        with self._lock:
            self._checked += 1
            self._fallbacks += fell_back
            self._other_tokens += not found.same_token
            self._kl_sum += found.kl_nats
            self._kl_max = max(self._kl_max, found.kl_nats)

    @property
    def stats(self) -> FidelityStats:
        """The counters at this moment."""
        with self._lock:
            checked = max(self._checked, 1)
            return FidelityStats(
                self._checked,
                self._fallbacks,
                self._kl_sum / checked,
                self._kl_max,
                self._other_tokens / checked,
            )
