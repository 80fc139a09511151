"""What an answer or an indexing run cost, and where the time went."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from kvlink_rag.engine.fidelity import Fidelity
from kvlink_rag.errors import KVLinkWarning

PARTS = (
    "tokenize_s",
    "load_s",
    "encode_s",
    "link_s",
    "forward_s",
    "fidelity_s",
    "sample_s",
)
"""Of the time to the first token."""


def way_in_words(strategy: str, share: float) -> str:
    """A strategy, and with `recompute` the share, such as `recompute 15 %`."""
    return strategy + (f" {100 * share:.3g} %" if strategy == "recompute" and share else "")


@dataclass
class Report:
    """Time, hits and tokens of one answer. Times are wall seconds.

    Attributes:
        strategy: `full`, `reuse`, `recompute` or `link`; `full` for an answer that fell back to it.
        asked: the strategy that was asked for; with `auto`, ``why`` says why it came to another.
        recompute: with `recompute`, the share of the chunks' tokens that was to be computed anew.
        ttft_s: from the call with question and chunk texts in hand to the first answer token in
            hand; the sum of the seven parts that follow.
        tokenize_s: rendering and tokenising chunks and question, and computing keys.
        load_s: reading chunk caches from the store and verifying their checksums.
        encode_s: computing the caches that were missing.
        link_s: re-positioning the caches and copying them into one context.
        forward_s: the forward pass over question (and recomputed) tokens, and the one that finds
            out which to recompute; all tokens with `full`.
        fidelity_s: with a fidelity limit, the full prefill that a checked answer is compared with.
        sample_s: choosing the first token.
        hits: chunks whose cache was in the store.
        misses: chunks whose cache was not.
        context_tokens: length of the whole prompt.
        reused_tokens: of these, how many came from a cache in the store; 0 after a fallback.
        computed_tokens: tokens that went through the model before the first answer token.
        bytes_read: keys and values read from the store.
        new_tokens: answer tokens.
        total_s: from the call to the last token.
        after_s: after the last token, and in no other figure: without a fidelity limit, the full
            prefill that a checked answer is compared with. The stream ends that much later.
        fidelity: of the strategy to full prefill, when the answer was checked.
        fell_back: whether it was above the fidelity limit, and the answer is that of full prefill.
        started: Unix time of the call.
    """

    strategy: str
    ttft_s: float = 0.0
    tokenize_s: float = 0.0
    load_s: float = 0.0
    encode_s: float = 0.0
    link_s: float = 0.0
    forward_s: float = 0.0
    fidelity_s: float = 0.0
    sample_s: float = 0.0
    hits: int = 0
    misses: int = 0
    context_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    bytes_read: int = 0
    new_tokens: int = 0
    total_s: float = 0.0
    after_s: float = 0.0
    fidelity: Fidelity | None = None
    fell_back: bool = False
    started: float = 0.0
    asked: str = ""
    recompute: float = 0.0
    why: str = ""

    def add_times(self, other: Report) -> None:
        """Take over start and time to the first token, in parts, from an answer made together."""
        for name in (*PARTS, "ttft_s", "started"):
            setattr(self, name, getattr(other, name))

    @property
    def way(self) -> str:
        """Strategy and share in words, such as `recompute 15 %`."""
        return way_in_words(self.strategy, self.recompute)

    @property
    def decode_s_per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.total_s - self.ttft_s) / max(self.new_tokens - 1, 1)


@dataclass
class IndexReport:
    """What :meth:`KVLinkEngine.index` did.

    Attributes:
        chunks: chunks given.
        hits: of these, already in the store.
        misses: encoded now (chunks with the same text count once).
        deferred: left to the answers that retrieve them (with ``cache_after``).
        tokens: tokens encoded now.
        nbytes: bytes of keys and values written now.
        total_s: wall seconds.
        started: Unix time of the call.
    """

    chunks: int = 0
    hits: int = 0
    misses: int = 0
    deferred: int = 0
    tokens: int = 0
    nbytes: int = 0
    total_s: float = 0.0
    started: float = 0.0


Observer = Callable[[Report | IndexReport], None]
"""Called with the report of each answer, prefill and indexing run, once it is complete."""


class Observers(list[Observer]):
    """Who is told of finished work. One that raises costs no answer: a warning says so once."""

    def __init__(self) -> None:
        super().__init__()
        self._failed: list[Observer] = []

    def tell(self, report: Report | IndexReport) -> None:
        """Call each with a report, in this thread."""
        for observer in tuple(self):
            try:
                observer(report)
            # whatever it raises: the answer is there, and whoever asked for it is to get it
            except Exception as error:
                self._complain(observer, error)

    def _complain(self, observer: Observer, error: Exception) -> None:
        if observer not in self._failed:
            self._failed.append(observer)
            warnings.warn(
                f"the observer {observer!r} failed, which is said once: "
                f"{type(error).__name__}: {error}; mend it or remove it from engine.observers",
                KVLinkWarning,
                stacklevel=4,
            )


class Stopwatch:
    """Splits wall time into parts that add up: each lap ends where the next begins."""

    def __init__(self) -> None:
        self.started = time.time()
        self.start = self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or the start)."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def laps(self) -> float:
        """Seconds from the start to the last lap: the sum of all laps."""
        return self._last - self.start

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start
