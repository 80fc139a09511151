"""Caches loaded ahead are those of the store, and each is used once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import scripted

from kvlink_rag import Chunk, InputError, KVLinkEngine
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.engine import prefetch
from kvlink_rag.store import MemoryStore

CHUNKS = [Chunk("The tower is 330 m tall."), Chunk("Bees dance.", title="Bees"), Chunk("x")]
QUESTION = "How tall is it?"


class Watched(MemoryStore):
    """A store that remembers what was asked of it, and waits or fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        self.asked.append(key)
        assert self.go.wait(30)
        if self.error:
            raise self.error
        return super().get(key)


@pytest.fixture
def engine() -> KVLinkEngine:
    made = scripted.engine(store=Watched())
    made.index(CHUNKS, progress=False)
    made.store.asked.clear()  # type: ignore[attr-defined]
    return made


def fetched(engine: KVLinkEngine, chunks: Any = CHUNKS) -> None:
    for future in engine.pipeline.caches.prefetcher.start(chunks):
        future.result(30)


def asked_for(engine: KVLinkEngine) -> list[str]:
    store = engine.store
    assert isinstance(store, Watched)
    keys = engine.keys(CHUNKS)
    return [key for key in store.asked if key in keys]


def test_the_answer_takes_what_was_loaded(engine):
    expected = engine.answer(QUESTION, CHUNKS, max_new_tokens=5)
    engine.store.asked.clear()
    fetched(engine)
    assert sorted(asked_for(engine)) == sorted(engine.keys(CHUNKS))
    engine.store.asked.clear()
    found = engine.answer(QUESTION, CHUNKS[::-1][::-1], max_new_tokens=5)
    assert asked_for(engine) == []
    assert found.token_ids == expected.token_ids
    assert (found.report.hits, found.report.misses) == (3, 0)


def test_each_is_handed_over_once(engine):
    fetched(engine)
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    engine.store.asked.clear()
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert sorted(asked_for(engine)) == sorted(engine.keys(CHUNKS))


def test_an_answer_waits_for_what_is_being_loaded(engine):
    engine.store.go.clear()
    engine.prefetch(CHUNKS[:1])
    while not engine.store.asked:
        pass
    answer: list[Any] = []
    thread = threading.Thread(
        target=lambda: answer.append(engine.answer(QUESTION, CHUNKS[:1], max_new_tokens=1))
    )
    thread.start()
    engine.store.go.set()
    thread.join(60)
    assert answer[0].report.hits == 1
    assert len(asked_for(engine)) == 1


def test_what_is_not_stored_is_computed_by_the_answer(engine):
    fetched(engine, [Chunk("new")])
    report = engine.answer(QUESTION, ["new"], max_new_tokens=1).report
    assert (report.hits, report.misses) == (0, 1)
    fetched(engine, [Chunk("new")])
    assert engine.answer(QUESTION, ["new"], max_new_tokens=1).report.hits == 1


def test_an_error_is_met_by_the_answer_not_lost(engine):
    engine.store.error = ZeroDivisionError("broken store")
    with pytest.raises(ZeroDivisionError):
        fetched(engine)
    with pytest.raises(ZeroDivisionError):
        engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    engine.store.error = None
    assert engine.answer(QUESTION, CHUNKS, max_new_tokens=1).report.hits == 3


def test_few_wait(engine, monkeypatch):
    monkeypatch.setattr(prefetch, "MOST", 2)
    for chunk in CHUNKS:
        fetched(engine, [chunk])
    engine.store.asked.clear()
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert asked_for(engine) == engine.keys(CHUNKS[:1])


def test_the_same_chunk_is_loaded_once(engine):
    fetched(engine, CHUNKS[:1])
    fetched(engine, CHUNKS[:1])
    assert len(asked_for(engine)) == 1


def test_a_twin_with_another_store_has_its_own(engine):
    twin = engine.with_store(None)
    fetched(engine)
    assert twin.answer(QUESTION, CHUNKS, max_new_tokens=1).report.misses == 3


def test_nothing_is_no_chunk(engine):
    with pytest.raises(InputError, match="has no text"):
        engine.prefetch(["a", " "])
    with pytest.raises(InputError, match="not one text"):
        engine.prefetch("a")


def test_after_a_fork_nothing_is_waited_for(engine, monkeypatch):
    fetched(engine)
    assert len(engine.pipeline.caches.prefetcher._loading) == 3
    monkeypatch.setattr(prefetch.os, "getpid", lambda: -1)  # and so nobody is left who loads
    fetched(engine, CHUNKS[:1])
    assert len(engine.pipeline.caches.prefetcher._loading) == 1


def test_the_caches_of_a_prompt_are_loaded_side_by_side(engine):
    both = threading.Barrier(2)
    get = engine.store.get

    def meet(key, within_s):
        if key in engine.keys(CHUNKS[:2]):
            both.wait(30)  # breaks where one waits for the other
        return get(key)

    engine.store.get = meet
    assert engine.answer(QUESTION, CHUNKS, max_new_tokens=1).report.hits == 3
