"""Answer metrics: open-domain question answering, and summaries."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from kvlink_rag.errors import InputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (as SQuAD's evaluation does)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def best_subspan_em(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when any answer occurs in the prediction, both normalised (Liu et al., 2307.03172)."""
    found = normalise(prediction)
    return float(any(normalise(answer) in found for answer in answers if normalise(answer)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of shared words over the answers (Rajpurkar et al., 1606.05250)."""
    return max((_f1(prediction, answer) for answer in answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    said, wanted = normalise(prediction).split(), normalise(answer).split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of the longest common subsequence of stemmed words (Lin, 2004).

    Raises:
        InputError: the package rouge-score is not installed.
    """
    scores: dict[str, Any] = _rouge().score_multi(list(references), prediction)
    return float(scores["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            "summaries are scored with rouge-score: pip install 'kvlink-rag[eval]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
