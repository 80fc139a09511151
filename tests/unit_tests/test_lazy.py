"""Caches that are stored by the answers that retrieve their chunks, not at indexing time."""

from __future__ import annotations

from pathlib import Path

import pytest
import scripted
import tiny

from kvlink_rag import Chunk, InputError
from kvlink_rag.errors import KVLinkWarning
from kvlink_rag.store import Budget, open_store

CHUNKS = [Chunk(f"Fact {i} is {i * i}.", id=f"id-{i}") for i in range(4)]
QUESTION = "What is fact 3?"


@pytest.fixture(params=["memory", "folder", "ram"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    return {
        "memory": {},
        "folder": {"store": tmp_path / "kv"},
        "ram": {"store": tmp_path / "kv", "ram_bytes": 10**6},
    }[request.param]


def test_indexing_computes_nothing(store):
    engine = scripted.engine(cache_after=1, **store)
    report = engine.index([*CHUNKS, CHUNKS[0]], progress=False)
    assert (report.chunks, report.hits, report.misses, report.deferred) == (5, 0, 0, 4)
    assert engine.store.stat().entries == 0
    full = scripted.engine().answer(QUESTION, CHUNKS[:2], max_new_tokens=4)
    first = engine.answer(QUESTION, CHUNKS[:2], max_new_tokens=4)
    again = engine.answer(QUESTION, CHUNKS[:2], max_new_tokens=4)
    assert (first.report.misses, again.report.hits) == (2, 2)
    assert first.token_ids == again.token_ids == full.token_ids
    report = engine.index(CHUNKS, progress=False)
    assert (report.hits, report.deferred) == (2, 2)
    # the documents that were indexed own what the answer stored
    assert engine.store.release(["id-0", "id-1"]) == 2


def test_the_nth_retrieval_stores_it(store):
    engine = scripted.engine(cache_after=3, **store)
    engine.index(CHUNKS, progress=False)
    misses = [engine.answer(QUESTION, CHUNKS[:1], max_new_tokens=1).report.misses for _ in range(5)]
    assert misses == [1, 1, 1, 0, 0]
    assert engine.answer(QUESTION, CHUNKS[1:2], max_new_tokens=1).report.misses == 1


def test_a_batch_counts_each_cache_once():
    engine = scripted.engine(cache_after=2)
    questions = [(QUESTION, CHUNKS[:2]), ("Which fact?", CHUNKS[1:3])]
    for _ in range(2):
        answers = engine.answer_batch(questions, max_new_tokens=1)
        assert [answer.report.misses for answer in answers] == [2, 2]
    answers = engine.answer_batch(questions, max_new_tokens=1)
    assert [answer.report.misses for answer in answers] == [0, 0]


def test_counts_last_and_are_of_all_processes(tmp_path):
    for miss in (1, 1, 0):
        engine = scripted.engine(cache_after=2, store=tmp_path / "kv")
        assert engine.answer(QUESTION, CHUNKS[:1], max_new_tokens=1).report.misses == miss
        engine.store.close()


def test_twins_have_it_too(tmp_path):
    engine = scripted.engine().with_store(open_store(tmp_path / "kv", cache_after=1))
    assert engine.index(CHUNKS, progress=False).deferred == 4


@pytest.mark.parametrize("bad", [-1, 1.5, True, "lazy"])
def test_another_value_is_refused(bad):
    with pytest.raises(InputError, match="cache_after is"):
        scripted.engine(cache_after=bad)


def test_an_engine_keeps_the_budget(tmp_path):
    engine = scripted.engine(store=tmp_path / "kv")
    engine.index(CHUNKS[:1], progress=False)
    one = engine.store.stat().nbytes
    engine.store.close()
    engine = scripted.engine(store=tmp_path / "kv", budget=4 * one)
    other = scripted.engine()
    engine.index(CHUNKS, progress=False)
    misses = 0
    for chunk in [*CHUNKS, *CHUNKS]:
        answer = engine.answer(QUESTION, [chunk], max_new_tokens=4)
        assert answer.token_ids == other.answer(QUESTION, [chunk], max_new_tokens=4).token_ids
        assert engine.store.stat().nbytes <= 4 * one
        misses += answer.report.misses
    assert misses > 0
    assert engine.store.verify().clean


def test_an_answer_does_not_fail_for_want_of_room(tmp_path):
    engine = scripted.engine(store=tmp_path / "kv", budget=100)
    expected = scripted.engine().answer(QUESTION, CHUNKS, max_new_tokens=4)
    with pytest.warns(UserWarning, match="may hold 100"):
        answer = engine.answer(QUESTION, CHUNKS, max_new_tokens=4)
    assert answer.token_ids == expected.token_ids


def test_a_budget_is_for_a_folder():
    with pytest.raises(InputError, match="budget is for a folder"):
        scripted.engine(budget=100)


def test_one_that_has_no_room_does_not_keep_the_others_out(tmp_path: Path) -> None:
    large = Chunk("word " * 60, id="large")
    budget = Budget(document_bytes=60_000)
    engine = tiny.engine(store=tmp_path / "kv", budget=budget, cache_after=1)
    with pytest.warns(KVLinkWarning, match="document 'large' may hold 60000") as warned:
        engine.answer(QUESTION, [large, *CHUNKS[:2]], max_new_tokens=1)
    assert len(warned) == 1
    report = engine.answer(QUESTION, CHUNKS[:2], max_new_tokens=1).report
    assert (report.hits, report.misses) == (2, 0)
