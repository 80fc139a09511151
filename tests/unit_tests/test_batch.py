"""Answers made together are those made alone."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest
import tiny
from tiny_adapters import LAYOUTS, adapter

from kvlink_rag import Chunk, InputError, KVLinkEngine
from kvlink_rag.engine.answer import Answer
from kvlink_rag.prompt.segments import RecomputeBy
from kvlink_rag.store import MemoryStore

TOWER = Chunk("The tower is 330 m tall.", id="tower")
BEES = Chunk("Bees dance to tell where flowers are, and this is longer than any window here.")
LAKE = Chunk("Zürich lies on a lake; 湖 means lake.")
ASKED: list[tuple[Any, list[Any]]] = [
    ("How tall is it?", [TOWER, BEES]),
    ("Who dances, and why do they do it when nobody looks?", [BEES, TOWER, LAKE]),
    ("?", [LAKE]),
    ("What without documents?", []),
    ([{"role": "user", "content": "And?"}], [TOWER, TOWER]),
]
SETTINGS = {"max_new_tokens": 12}
MODELS = ["llama", "llama-yarn", "mistral", "qwen3", "gemma3", "phi", "phi3-sliding", "smollm3"]


class Counting(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def get(self, key: str, within_s: float | None = None) -> Any:
        self.asked.append(key)
        return super().get(key)


def alone(engine: KVLinkEngine, **options: Any) -> list[Answer]:
    return [engine.answer(question, chunks, **options) for question, chunks in ASKED]


def same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert one.chunks == other.chunks


@pytest.mark.parametrize("name", MODELS)
def test_together_as_alone(name: str) -> None:
    engine = tiny.engine(name)
    same(engine.answer_batch(ASKED, **SETTINGS), alone(engine, **SETTINGS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linked_together_as_alone(layout: Any) -> None:
    engine = tiny.engine("llama", adapter=adapter(layout=layout), strategy="link")
    same(engine.answer_batch(ASKED, **SETTINGS), alone(engine, **SETTINGS))


@pytest.mark.parametrize("by", get_args(RecomputeBy))
@pytest.mark.parametrize("lora", [False, True], ids=["model", "reader of its own"])
def test_computed_anew_together_as_alone(by: Any, lora: bool) -> None:
    engine = tiny.engine("llama", adapter=adapter(layout="tail") if lora else None)
    assert (engine.reader is not engine.model) == lora
    options = {"strategy": "recompute", "recompute_by": by, "recompute": 0.3}
    same(engine.answer_batch(ASKED, **options, **SETTINGS), alone(engine, **options, **SETTINGS))
    passes: list[int] = []
    hook = engine.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: passes.append(output.shape[1])
    )
    engine.answer_batch(ASKED, **options, max_new_tokens=1)
    hook.remove()
    if not lora:  # all caches are there now: to measure, if at all, and to answer
        assert len(passes) == 1 + (by == "question")


def test_full_prefill_one_after_the_other() -> None:
    engine = tiny.engine("llama")
    options = {"strategy": "full", **SETTINGS}
    same(engine.answer_batch(ASKED, **options), alone(engine, **options))


def test_a_model_that_is_not_served_in_place_too() -> None:
    engine = tiny.engine("gemma2")
    same(engine.answer_batch(ASKED, **SETTINGS), alone(engine, **SETTINGS))


def test_shared_chunks_are_loaded_once_and_missing_ones_made_once() -> None:
    engine = tiny.engine("llama", store=Counting())
    store = engine.store
    assert isinstance(store, Counting)
    answers = engine.answer_batch(ASKED, **SETTINGS)
    assert [answer.report.misses for answer in answers] == [2, 3, 1, 0, 2]
    assert len(store.asked) == len(set(store.asked))
    assert ("tower", engine.keys([TOWER])[0]) in store.references()
    store.asked.clear()
    answers = engine.answer_batch(ASKED, **SETTINGS)
    assert [answer.report.hits for answer in answers] == [2, 3, 1, 0, 2]
    assert len(store.asked) == len(set(store.asked))


def test_reports_add_up_and_count() -> None:
    engine = tiny.engine("llama")
    expected = alone(engine, **SETTINGS)
    for found, other in zip(engine.answer_batch(ASKED, **SETTINGS), expected, strict=True):
        one, two = found.report, other.report
        parts = one.tokenize_s + one.load_s + one.encode_s + one.link_s + one.forward_s
        assert one.ttft_s == pytest.approx(parts + one.sample_s)
        assert one.total_s >= one.ttft_s > 0
        for name in ("context_tokens", "new_tokens", "strategy", "hits", "misses"):
            if name not in ("hits", "misses"):  # the first answers alone had to compute
                assert getattr(one, name) == getattr(two, name)
        assert one.misses == 0


def test_each_stops_at_its_own_end() -> None:
    engine = tiny.engine("llama")
    texts = [answer.text for answer in alone(engine, max_new_tokens=30)]
    stop = next(text[3:5] for text in texts if len(text) > 10)
    options = {"max_new_tokens": 30, "stop": stop}
    found, expected = engine.answer_batch(ASKED, **options), alone(engine, **options)
    same(found, expected)
    assert {answer.finish_reason for answer in found} >= {"stop"}
    assert len({len(answer.token_ids) for answer in found}) > 1


def test_sampling_is_by_its_seed() -> None:
    engine = tiny.engine("llama")
    options = {"temperature": 1.0, "seed": 3, **SETTINGS}
    same(engine.answer_batch(ASKED, **options), alone(engine, **options))


def test_nothing_is_answered_if_one_is_refused() -> None:
    engine = tiny.engine("llama")
    with pytest.raises(InputError, match="has no text"):
        engine.answer_batch([*ASKED, ("a", [" "])])
    with pytest.raises(InputError, match=r"takes \d+ tokens"):
        engine.answer_batch([*ASKED, ("a", ["word " * 5000])])
    assert engine.store.stat().entries == 0
    assert engine.answer_batch([]) == []


def test_with_a_fidelity_rate_each_is_checked() -> None:
    engine = tiny.engine("llama", fidelity_rate=1.0)
    answers = engine.answer_batch(ASKED, **SETTINGS)
    assert [answer.report.fidelity is not None for answer in answers] == [True] * 3 + [False, True]


def test_async() -> None:
    engine = tiny.engine("llama")
    same(asyncio.run(engine.aanswer_batch(ASKED, **SETTINGS)), alone(engine, **SETTINGS))
