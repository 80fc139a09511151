"""Prometheus metrics of an engine: what its answers cost and what its store holds.

    from prometheus_client import start_http_server
    from kvlink_rag.engine.observe.metrics import EngineMetrics

    EngineMetrics(engine)
    start_http_server(9000)

Of answers and prefills, by ``engine.observers``: `kvlink_answers_total` by `strategy`,
and `kvlink_auto_total` of those that left the choice to `auto`;
`kvlink_ttft_seconds`, a histogram by `strategy`; `kvlink_ttft_part_seconds_total` by `part` (those
of ``report.PARTS``); `kvlink_chunk_hits_total`, `kvlink_chunk_misses_total`,
`kvlink_reused_tokens_total`, `kvlink_computed_tokens_total`, `kvlink_new_tokens_total`,
`kvlink_read_bytes_total`; `kvlink_fidelity_kl_nats`, a histogram whose count is the answers that
were checked, and `kvlink_fidelity_fallbacks_total`.

Of indexing runs: `kvlink_index_runs_total`, `kvlink_index_seconds_total`,
`kvlink_index_chunks_total`, `kvlink_index_encoded_chunks_total`,
`kvlink_index_encoded_tokens_total`, `kvlink_index_written_bytes_total`.

Of the store, asked when the metrics are read: `kvlink_store_up` (0 while it cannot be read; nothing
else of it is told then), `kvlink_store_entries`, `kvlink_store_tokens`, `kvlink_store_bytes`,
`kvlink_store_documents`; of a folder `kvlink_store_budget_bytes` (where there is a limit),
`kvlink_store_evictions_total` and `kvlink_store_pinned_entries`; of a
:class:`~kvlink_rag.store.RemoteTier` `kvlink_remote_up` and `kvlink_remote_waiting`, uploads and
deletions to be done; of a :class:`~kvlink_rag.store.RamTier` `kvlink_ram_hits_total`,
`kvlink_ram_misses_total` and `kvlink_ram_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from kvlink_rag.engine.report import PARTS, IndexReport, Report
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store import FolderStore, KVStore, RamTier, RemoteTier

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector

    from kvlink_rag.engine.engine import KVLinkEngine

TTFT_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Seconds: from a GPU that reuses to a CPU that computes a long prompt."""
KL_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Nats."""


class EngineMetrics:
    """Counts the answers and indexing runs of an engine and its twins, from now on.

    Args:
        engine: whose store is described, too.
        registry: of prometheus_client; None takes its default one. One registry takes the metrics
            of one engine.

    Raises:
        InputError: prometheus_client is not installed, or the registry has an engine's metrics.
    """

    def __init__(self, engine: KVLinkEngine, registry: CollectorRegistry | None = None) -> None:
        prometheus = _prometheus()
        self._engine = engine
        self._registry = prometheus.REGISTRY if registry is None else registry
        self._make(prometheus)
        try:
            self._registry.register(cast("Collector", self))
        except ValueError as error:
            raise InputError(
                f"the registry has metrics of an engine already ({error}): close() those, or pass "
                "another registry"
            ) from error
        engine.observers.append(self._observe)

    def close(self) -> None:
        """Count no more, and leave the registry."""
        self._engine.observers.remove(self._observe)
        self._registry.unregister(cast("Collector", self))

    def describe(self) -> Iterator[Metric]:
        """The metrics by name, without their values; prometheus_client asks."""
        for metric in self._metrics:
            yield from metric.describe()
        yield from self._store_metrics(None)

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now; prometheus_client asks."""
        for metric in self._metrics:
            yield from metric.collect()
        yield from self._store_metrics(self._engine)

    # Below: what the methods above are made of.

    def _make(self, prometheus: Any) -> None:
        self._metrics: list[Counter | Histogram] = []

        def counter(name: str, help_: str, labels: Iterable[str] = ()) -> Counter:
            self._metrics.append(prometheus.Counter(f"kvlink_{name}", help_, labels, registry=None))
            return cast("Counter", self._metrics[-1])

        def histogram(
            name: str, help_: str, buckets: Iterable[float], labels: Iterable[str] = ()
        ) -> Histogram:
            made = prometheus.Histogram(
                f"kvlink_{name}", help_, labels, buckets=buckets, registry=None
            )
            self._metrics.append(made)
            return cast("Histogram", made)

        self._answers = counter("answers", "Answers and prefills.", ["strategy"])
        self._auto = counter("auto", "Of these, by what `auto` came to.", ["strategy"])
        self._ttft = histogram(
            "ttft_seconds", "Time to the first token.", TTFT_BUCKETS, ["strategy"]
        )
        self._parts = counter("ttft_part_seconds", "Parts of the time to first tokens.", ["part"])
        self._kl = histogram("fidelity_kl_nats", "Divergence from full prefill.", KL_BUCKETS)
        self._fallbacks = counter("fidelity_fallbacks", "Checked answers made by full prefill.")
        self._of_answers = {
            "hits": counter("chunk_hits", "Chunks whose cache was in the store."),
            "misses": counter("chunk_misses", "Chunks whose cache was not in the store."),
            "reused_tokens": counter("reused_tokens", "Prompt tokens that came from the store."),
            "computed_tokens": counter("computed_tokens", "Tokens computed before first tokens."),
            "new_tokens": counter("new_tokens", "Tokens of answers."),
            "bytes_read": counter("read_bytes", "Keys and values read from the store."),
        }
        self._runs = counter("index_runs", "Indexing runs.")
        self._of_runs = {
            "total_s": counter("index_seconds", "Time in indexing runs."),
            "chunks": counter("index_chunks", "Chunks given to indexing runs."),
            "misses": counter("index_encoded_chunks", "Chunks encoded by indexing runs."),
            "tokens": counter("index_encoded_tokens", "Tokens encoded by indexing runs."),
            "nbytes": counter("index_written_bytes", "Keys and values written by indexing runs."),
        }

    def _observe(self, report: Report | IndexReport) -> None:
        if isinstance(report, IndexReport):
            self._runs.inc()
            _add(self._of_runs, report)
            return
        self._answers.labels(report.strategy).inc()
        if report.asked == "auto":
            self._auto.labels(report.strategy).inc()
        self._ttft.labels(report.strategy).observe(report.ttft_s)
        for part in PARTS:
            self._parts.labels(part.removesuffix("_s")).inc(getattr(report, part))
        _add(self._of_answers, report)
        if report.fidelity is not None:
            self._kl.observe(report.fidelity.kl_nats)
        self._fallbacks.inc(report.fell_back)

    def _store_metrics(self, engine: KVLinkEngine | None) -> Iterator[Metric]:
        """Of the store of an engine; without one, all that there may be, and no values."""
        families = _store_families()
        if engine is None:
            yield from (metric for group in families.values() for metric in group.values())
            return
        store = engine.store
        if isinstance(store, RamTier):
            yield from _filled(families["ram"], store)
            store = store.below
        try:
            found = _of_files(store, families)
        except StoreError:  # told by the metric, and the others are still to be read
            found = []
        up: Any = families["up"]["up"]
        up.add_metric([], float(bool(found)))
        yield from (up, *found)


def _store_families() -> dict[str, dict[str, Metric]]:
    """Metrics by what they are of, and there by the attribute that they show."""
    from prometheus_client.core import CounterMetricFamily as Counted
    from prometheus_client.core import GaugeMetricFamily as Gauge

    return {
        "up": {"up": Gauge("kvlink_store_up", "Whether the store could be read.")},
        "store": {
            "entries": Gauge("kvlink_store_entries", "Chunk caches stored."),
            "tokens": Gauge("kvlink_store_tokens", "Tokens of the caches stored."),
            "nbytes": Gauge("kvlink_store_bytes", "Bytes of the caches stored."),
            "documents": Gauge("kvlink_store_documents", "Documents referring to any."),
        },
        "folder": {
            "evicted": Counted("kvlink_store_evictions", "Caches removed for the budget."),
            "pinned": Gauge("kvlink_store_pinned_entries", "Caches never to be evicted."),
        },
        "budget": {"max_bytes": Gauge("kvlink_store_budget_bytes", "Most bytes, if limited.")},
        "remote": {
            "answers": Gauge("kvlink_remote_up", "Whether the remote answers."),
            "waiting": Gauge("kvlink_remote_waiting", "Uploads and deletions to be done."),
        },
        "ram": {
            "hits": Counted("kvlink_ram_hits", "Caches found in the RAM tier."),
            "misses": Counted("kvlink_ram_misses", "Caches not in the RAM tier."),
            "nbytes": Gauge("kvlink_ram_bytes", "Keys and values in the RAM tier."),
        },
    }


def _of_files(store: KVStore, families: dict[str, dict[str, Metric]]) -> list[Metric]:
    """What is below memory, filled in.

    Raises:
        StoreError: it cannot be read.
    """
    found = [*_filled(families["store"], store.stat())]
    if isinstance(store, RemoteTier):
        found += _filled(families["remote"], store)
        store = store.folder
    if isinstance(store, FolderStore):
        usage = store.usage()
        found += _filled(families["folder"], usage)
        if usage.budget.max_bytes is not None:
            found += _filled(families["budget"], usage.budget)
    return found


def _filled(metrics: dict[str, Any], source: object) -> Iterator[Metric]:
    """The metrics with the values of the attributes that they are named by."""
    for name, metric in metrics.items():
        metric.add_metric([], getattr(source, name))
        yield metric


def _add(counters: dict[str, Counter], report: Report | IndexReport) -> None:
    for name, each in counters.items():
        each.inc(getattr(report, name))


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise InputError(
            "metrics need prometheus_client: pip install 'kvlink-rag[metrics]'"
        ) from error
    return prometheus_client
