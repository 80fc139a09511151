"""OpenTelemetry spans of an engine's answers and indexing runs.

    from kvlink_rag.engine.observe.tracing import trace

    trace(engine)  # spans go to the application's tracer provider

An answer becomes

    kvlink.answer
    ├── kvlink.prefill
    │   ├── kvlink.tokenize  kvlink.load  kvlink.encode  kvlink.link  kvlink.forward
    │   └── kvlink.fidelity  kvlink.sample
    ├── kvlink.decode
    └── kvlink.check

:meth:`KVLinkEngine.prefill` only the part of `kvlink.prefill`, an indexing run `kvlink.index`. What
did not happen has no span. Spans are made from the finished report, with its times, as children of
the span that is current where the answer is finished, such as a web request's; nothing runs while
the answer is being made. An answer that fails has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvlink_rag.engine.report import PARTS, IndexReport, Observer, Report
from kvlink_rag.errors import InputError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer, TracerProvider

    from kvlink_rag.engine.engine import KVLinkEngine

OF_ANSWERS = (
    "strategy",
    "asked",
    "recompute",
    "hits",
    "misses",
    "context_tokens",
    "reused_tokens",
    "computed_tokens",
    "bytes_read",
)
OF_RUNS = ("chunks", "hits", "misses", "tokens", "nbytes")


def trace(engine: KVLinkEngine, tracer_provider: TracerProvider | None = None) -> Observer:
    """Make spans of what an engine and its twins do, from now on.

    Args:
        tracer_provider: None takes the application's (``opentelemetry.trace``).

    Returns:
        what was appended to ``engine.observers``; remove it there to switch tracing off.

    Raises:
        InputError: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry.trace import get_tracer
    except ImportError as error:
        raise InputError(
            "tracing needs opentelemetry-api: pip install 'kvlink-rag[tracing]'"
        ) from error
    tracer = get_tracer("kvlink_rag", tracer_provider=tracer_provider)

    def observe(report: Report | IndexReport) -> None:
        if isinstance(report, IndexReport):
            _span(tracer, "index", report.started, 0.0, report.total_s, _facts(report, OF_RUNS))
        else:
            _answer(tracer, report)

    engine.observers.append(observe)
    return observe


def _answer(tracer: Tracer, report: Report) -> None:
    facts = _facts(report, OF_ANSWERS)
    if not report.new_tokens:  # a prefill
        _prefill(tracer, report, facts, None)
        return
    end = report.total_s + report.after_s
    facts |= {"kvlink.new_tokens": report.new_tokens, "kvlink.fell_back": report.fell_back}
    if report.fidelity is not None:
        facts["kvlink.fidelity_kl_nats"] = report.fidelity.kl_nats
    parent = _span(tracer, "answer", report.started, 0.0, end, facts)
    _prefill(tracer, report, {}, parent)
    _span(tracer, "decode", report.started, report.ttft_s, report.total_s, {}, parent)
    if report.after_s:
        _span(tracer, "check", report.started, report.total_s, end, {}, parent)


def _prefill(tracer: Tracer, report: Report, facts: dict[str, Any], parent: Any) -> None:
    context = _span(tracer, "prefill", report.started, 0.0, report.ttft_s, facts, parent)
    passed = 0.0
    for part in PARTS:
        start, passed = passed, passed + getattr(report, part)
        if passed > start:
            # rounding may take the sum of the parts a hair beyond their end
            stop = min(passed, report.ttft_s)
            _span(tracer, part.removesuffix("_s"), report.started, start, stop, {}, context)


def _facts(report: Report | IndexReport, names: tuple[str, ...]) -> dict[str, Any]:
    return {f"kvlink.{name}": getattr(report, name) for name in names}


def _span(
    tracer: Tracer,
    name: str,
    started: float,
    start: float,
    stop: float,
    facts: dict[str, Any],
    parent: Any = None,
) -> Any:
    """A finished span, from and to these seconds after a Unix time.

    Returns:
        the context that makes another one its child.
    """
    from opentelemetry.trace import set_span_in_context

    origin = round(started * 1e9)
    begin, end = (origin + round(seconds * 1e9) for seconds in (start, stop))
    span = tracer.start_span(f"kvlink.{name}", parent, attributes=facts, start_time=begin)
    span.end(end)
    return set_span_in_context(span)
