"""Who is told of finished answers and indexing runs, and when."""

from __future__ import annotations

import time

import pytest
import scripted

from kvlink_rag import IndexReport, KVLinkWarning, Report

CHUNKS = ["The tower is 330 m tall.", "Bees dance to tell where flowers are."]
QUESTION = "How tall is it?"


def observed(**options):
    engine = scripted.engine(**options)
    engine.stop_ids = frozenset()
    reports: list[Report | IndexReport] = []
    engine.observers.append(reports.append)
    return engine, reports


def test_every_way_to_an_answer_is_reported_once_and_complete():
    engine, reports = observed()
    assert engine.index(CHUNKS, progress=False) is reports.pop()
    assert engine.prefill(QUESTION, CHUNKS).report is reports.pop()
    answer = engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
    assert answer.report is reports.pop()
    assert answer.report.new_tokens == 3
    stream = engine.stream(QUESTION, CHUNKS, max_new_tokens=20)
    next(stream)
    assert reports == []
    list(stream)
    assert reports.pop() is stream.report
    for options in ({}, {"strategy": "full"}):  # together, and one after the other
        answers = engine.answer_batch([(QUESTION, CHUNKS)] * 2, max_new_tokens=3, **options)
        assert [answer.report.new_tokens for answer in answers] == [3, 3]
        assert [id(report) for report in reports] == [id(answer.report) for answer in answers]
        reports.clear()


def test_measurements_and_failures_are_not_reported():
    engine, reports = observed(fidelity_rate=1.0, fidelity_limit=0.0)
    engine.fidelity(QUESTION, CHUNKS)
    with pytest.raises(ValueError, match="no text"):
        engine.answer(QUESTION, [" "])
    stream = engine.stream(QUESTION, CHUNKS, max_new_tokens=20)
    next(stream)
    del stream
    assert reports == []
    assert engine.answer(QUESTION, CHUNKS, max_new_tokens=1).report.fell_back
    assert [report.strategy for report in reports] == ["full"]  # the check itself is no answer


def test_reports_say_when_they_began():
    engine, reports = observed()
    before = time.time()
    engine.index(CHUNKS, progress=False)
    engine.prefill(QUESTION, CHUNKS)
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    engine.answer_batch([(QUESTION, CHUNKS)], max_new_tokens=1)
    started = [report.started for report in reports]
    assert before <= started[0]
    assert started == sorted(started)
    assert started[-1] <= time.time()
    assert len(set(started)) == 4


def test_twins_share_observers():
    engine, reports = observed()
    engine.with_store(None).answer(QUESTION, CHUNKS, max_new_tokens=1)
    engine.with_adapter(None).answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert len(reports) == 2
    engine.observers.clear()
    engine.with_store(None).answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert len(reports) == 2


def test_an_observer_that_fails_costs_no_answer_and_warns_once():
    engine, reports = observed()
    answer = engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
    reports.clear()

    def broken(report):
        raise ZeroDivisionError("of nothing")

    engine.observers.insert(0, broken)
    with pytest.warns(KVLinkWarning, match=r"broken.*ZeroDivisionError: of nothing"):
        assert engine.answer(QUESTION, CHUNKS, max_new_tokens=3).text == answer.text
    assert engine.answer(QUESTION, CHUNKS, max_new_tokens=3).text == answer.text
    assert len(reports) == 2  # those behind it are told
