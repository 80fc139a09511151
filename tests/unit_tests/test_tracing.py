"""OpenTelemetry spans, as an exporter gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import pairwise

import pytest
import scripted
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvlink_rag.engine.observe.tracing import trace

CHUNKS = ["The tower is 330 m tall.", "Bees dance to tell where flowers are."]
QUESTION = "How tall is it?"
NS = 1e9


class Traced:
    """An engine, and the spans of what it did."""

    def __init__(self, **options):
        self.engine = scripted.engine(**options)
        self.engine.stop_ids = frozenset()
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.observer = trace(self.engine, self.provider)

    def spans(self):
        """By name; and what was exported is forgotten."""
        found = self.exporter.get_finished_spans()
        self.exporter.clear()
        named = {span.name.removeprefix("kvlink."): span for span in found}
        assert len(named) == len(found)
        return named


def children(spans, parent):
    """In order of their start."""
    mine = [s for s in spans.values() if s.parent and s.parent.span_id == parent.context.span_id]
    return sorted(mine, key=lambda span: (span.start_time, span.end_time))


def check_parts(spans, report, expected):
    """The parts of a prefill follow each other without a gap and add up to TTFT."""
    prefill = spans["prefill"]
    assert (prefill.end_time - prefill.start_time) / NS == pytest.approx(report.ttft_s, abs=1e-6)
    assert prefill.start_time / NS == pytest.approx(report.started, abs=1e-5)
    parts = children(spans, prefill)
    assert [part.name.removeprefix("kvlink.") for part in parts] == expected
    assert parts[0].start_time == prefill.start_time
    assert parts[-1].end_time == pytest.approx(prefill.end_time, abs=2000)
    assert parts[-1].end_time <= prefill.end_time
    for before, after in pairwise(parts):
        assert before.end_time == after.start_time
    for part in parts:
        seconds = getattr(report, f"{part.name.removeprefix('kvlink.')}_s")
        assert (part.end_time - part.start_time) / NS == pytest.approx(seconds, abs=1e-5)
    total = sum(part.end_time - part.start_time for part in parts)
    assert total / NS == pytest.approx(report.ttft_s, abs=1e-5)


LINKED = ["tokenize", "load", "encode", "link", "forward", "sample"]


def test_an_answer():
    traced = Traced()
    report = traced.engine.answer(QUESTION, CHUNKS, max_new_tokens=4).report
    spans = traced.spans()
    answer = spans["answer"]
    assert answer.parent is None
    assert [child.name for child in children(spans, answer)] == ["kvlink.prefill", "kvlink.decode"]
    assert (answer.end_time - answer.start_time) / NS == pytest.approx(report.total_s, abs=1e-5)
    assert spans["decode"].start_time == spans["prefill"].end_time
    assert spans["decode"].end_time == answer.end_time
    check_parts(spans, report, LINKED)
    facts = dict(answer.attributes)
    assert facts["kvlink.strategy"] == "reuse"
    assert (facts["kvlink.hits"], facts["kvlink.misses"]) == (0, 2)
    assert facts["kvlink.new_tokens"] == 4
    assert facts["kvlink.context_tokens"] == report.context_tokens
    assert facts["kvlink.computed_tokens"] == report.computed_tokens
    assert facts["kvlink.fell_back"] is False


def test_a_prefill_and_full_prefill():
    traced = Traced()
    report = traced.engine.prefill(QUESTION, CHUNKS).report
    spans = traced.spans()
    assert spans["prefill"].parent is None
    assert spans["prefill"].attributes["kvlink.misses"] == 2
    check_parts(spans, report, LINKED[:-1])
    report = traced.engine.answer(QUESTION, CHUNKS, strategy="full").report
    check_parts(traced.spans(), report, ["tokenize", "forward", "sample"])


@pytest.mark.parametrize("limit", [0.0, None])
def test_checks(limit):
    traced = Traced(fidelity_rate=1.0, fidelity_limit=limit)
    report = traced.engine.answer(QUESTION, CHUNKS, max_new_tokens=2).report
    spans = traced.spans()
    facts = spans["answer"].attributes
    assert facts["kvlink.fidelity_kl_nats"] == report.fidelity.kl_nats
    assert facts["kvlink.fell_back"] == (limit is not None)
    if limit is None:
        check_parts(spans, report, LINKED)
        assert spans["check"].start_time == spans["decode"].end_time
        assert spans["check"].end_time == spans["answer"].end_time
    else:
        check_parts(spans, report, [*LINKED[:-1], "fidelity", "sample"])
        assert "check" not in spans


def test_indexing():
    traced = Traced()
    report = traced.engine.index(CHUNKS, progress=False)
    (span,) = traced.spans().values()
    assert span.name == "kvlink.index"
    assert (span.end_time - span.start_time) / NS == pytest.approx(report.total_s, abs=1e-5)
    assert span.attributes["kvlink.misses"] == 2
    assert span.attributes["kvlink.tokens"] == report.tokens


@pytest.mark.parametrize("way", ["here", "async", "stream"])
def test_spans_belong_to_the_request(way):
    traced = Traced()
    engine = traced.engine

    async def astream():
        return [piece async for piece in engine.astream(QUESTION, CHUNKS, max_new_tokens=2)]

    with traced.provider.get_tracer("a web server").start_as_current_span("request") as request:
        if way == "here":
            engine.answer(QUESTION, CHUNKS, max_new_tokens=2)
        elif way == "async":
            asyncio.run(engine.aanswer(QUESTION, CHUNKS, max_new_tokens=2))
        else:
            asyncio.run(astream())
    spans = traced.spans()
    assert spans["answer"].parent.span_id == request.get_span_context().span_id
    assert len({span.context.trace_id for span in spans.values()}) == 1
    lies_in = (spans["request"].start_time, spans["request"].end_time)
    assert lies_in[0] <= spans["answer"].start_time <= spans["answer"].end_time
    assert spans["answer"].end_time <= lies_in[1] + 1e6  # two clocks


def test_switched_off():
    traced = Traced()
    traced.engine.observers.remove(traced.observer)
    traced.engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert traced.spans() == {}


@pytest.mark.slow
def test_nothing_is_imported_unless_switched_on():
    code = (
        "import sys\nsys.modules['opentelemetry'] = None\n"
        "import kvlink_rag.engine.engine, kvlink_rag.engine.observe.tracing\n"
        "try:\n    kvlink_rag.engine.observe.tracing.trace(None)\n"
        "except ValueError as error:\n    print(error)\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry.')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kvlink-rag[tracing]'" in out.stdout
    assert out.stdout.splitlines()[-1] == "[]"
