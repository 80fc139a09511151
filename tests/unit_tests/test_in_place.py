"""Chunk caches attended where they lie give what copied ones give, and are left as they are."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import tiny
import torch
from tiny_adapters import LAYOUTS, adapter
from transformers.models.llama.modeling_llama import LlamaAttention

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.prompt.segments import RecomputeBy
from kvlink_rag.runners.transformers import in_place, placement, visibility
from kvlink_rag.runners.transformers import positions as at_positions
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.in_place import LinkedContext

MODELS = ["llama", "llama-yarn", "mistral", "qwen3", "gemma3", "phi", "phi3-sliding", "smollm3"]
CHUNKS = [
    Chunk("The tower is 330 m tall."),
    Chunk("x"),
    Chunk("Bees dance to tell where flowers are, and this is longer than any sliding window here."),
    Chunk("Zürich lies on a lake; 湖 means lake."),
]
QUESTION = "How tall is the tower, and where do the bees dance when nobody looks at them?"
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def engines(name: str, **options: Any) -> tuple[KVLinkEngine, KVLinkEngine]:
    """One that attends in place, and one that copies; they share nothing but the weights."""
    first, second = tiny.engine(name, **options), tiny.engine(name, **options)
    assert first.runner.in_place
    second.runner.in_place = False
    return first, second


@pytest.mark.matrix(together=1)
@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_answers_are_those_of_copied_caches(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "MANY_QUERIES", 10**6)
    monkeypatch.setattr(visibility, "BLOCK_QUERIES", block)
    one, other = engines(name)
    for chunks in (CHUNKS, CHUNKS[::-1], CHUNKS[:1], [CHUNKS[2]] * 3, []):
        found, expected = one.prefill(QUESTION, chunks), other.prefill(QUESTION, chunks)
        assert isinstance(found.context, LinkedContext)
        assert isinstance(expected.context, ContextCache)
        torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
        answers = [e.answer(QUESTION, chunks, max_new_tokens=12) for e in (one, other)]
        assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.matrix
@pytest.mark.parametrize("least", [1, 3, 12])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-sliding"])
def test_linked_answers_are_those_of_copied_caches(
    name: str, layout: Any, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "MANY_QUERIES", 10**6)
    monkeypatch.setattr(visibility, "LEAST_QUERIES", least)
    one, other = (e.with_adapter(adapter(name, layout=layout)) for e in engines(name))
    other.runner.in_place = False
    for chunks in (CHUNKS, CHUNKS[::-1]):
        made = [e.prefill(QUESTION, chunks, strategy="link") for e in (one, other)]
        assert isinstance(made[0].context, LinkedContext)
        assert isinstance(made[1].context, ContextCache)
        torch.testing.assert_close(made[0].logits, made[1].logits, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_that_is_asked_for_is_the_copied_one(name: str) -> None:
    one, other = engines(name)
    found, expected = one.prefill(QUESTION, CHUNKS), other.prefill(QUESTION, CHUNKS)
    length = len(found.token_ids)
    assert found.cache.get_seq_length() == expected.cache.get_seq_length() == length
    assert found.cache.capacity == expected.cache.capacity
    for buffer in ("key_buffer", "value_buffer"):
        copied, made = (getattr(each.cache, buffer)[:, :, :, :length] for each in (found, expected))
        torch.testing.assert_close(copied, made, **TOLERANCE)
    assert found.cache is found.cache
    torch.testing.assert_close(found.run([7]), expected.run([7]), **TOLERANCE)


def test_records_are_read_alone() -> None:
    one, _ = engines("llama")
    one.index(CHUNKS, progress=False)
    records = [one.store.get(key) for key in one.keys(CHUNKS)]
    before = [(r.keys.clone(), r.values.clone()) for r in records if r]
    assert len(before) == len(CHUNKS)
    one.answer(QUESTION, CHUNKS, max_new_tokens=5)
    _ = one.prefill(QUESTION, CHUNKS).cache
    for record, (keys, values) in zip(records, before, strict=True):
        assert record is not None
        assert torch.equal(record.keys, keys)
        assert torch.equal(record.values, values)


def test_prompts_share_the_caches_and_do_not_disturb_each_other() -> None:
    one, _ = engines("llama")
    questions = [f"Question {number}?" for number in range(4)]
    alone = [one.answer(q, CHUNKS, max_new_tokens=8).token_ids for q in questions]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = one.answer(questions[number], CHUNKS, max_new_tokens=8).token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == alone
    prefills = [one.prefill(q, CHUNKS) for q in questions[:2]]
    spans = [prefill.context.spans for prefill in prefills]  # type: ignore[union-attr]
    for mine, other in zip(*spans, strict=True):
        assert mine.record.keys.data_ptr() == other.record.keys.data_ptr()


def test_own_memory_is_that_of_question_and_answer() -> None:
    one, _ = engines("llama")
    prefill = one.prefill(QUESTION, CHUNKS)
    assert isinstance(prefill.context, LinkedContext)
    question = prefill.segments[-1]
    assert prefill.context.own.capacity == question.stop - question.start


@pytest.mark.parametrize("window", [None, 4])
def test_who_sees_whom(window: int | None) -> None:
    at, keys = [3, 5, 9], range(2, 8)
    bias = visibility.bias_of(at, keys, window, torch.float32)
    assert bias is not None
    for query, row in zip(at, bias, strict=True):
        for key, value in zip(keys, row, strict=True):
            sees = key <= query and (window is None or query - key < window)
            assert float(value) == (0 if sees else float("-inf"))
    assert visibility.bias_of([7, 8], range(5, 8), window, torch.float32) is None
    assert visibility._sees_some([3, 4], 4, 9, window)
    assert not visibility._sees_some([3, 4], 5, 9, window)
    assert visibility._sees_some([9, 30], 2, 6, window) == (window is None)


def test_blocks_end_where_positions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visibility, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(visibility, "LEAST_QUERIES", 2)
    at = [3, 10, 11, 20, 30, 31, 32, 33, 34, 35]
    blocks = [at[block] for block in visibility._cut(at)]
    assert blocks == [[3, 10, 11], [20, 30, 31, 32], [33, 34, 35]]
    assert [at[block] for block in visibility._cut(at[:1])] == [[3]]


def test_a_model_whose_attention_is_another_is_copied_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.engine("llama").answer(QUESTION, CHUNKS, max_new_tokens=5)
    forward = LlamaAttention.forward

    def with_sinks(self: Any, *args: Any, **options: Any) -> Any:
        return forward(self, *args, **options, s_aux=torch.zeros(4))

    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", with_sinks)
        engine = tiny.engine("llama")
        assert not engine.runner.in_place
    assert engine.answer(QUESTION, CHUNKS, max_new_tokens=5).token_ids == expected.token_ids
    attend = LinkedContext.attend
    with monkeypatch.context() as patch:
        patch.setattr(LinkedContext, "attend", lambda *args: attend(*args) * 1.2)
        assert not tiny.engine("llama").runner.in_place


@pytest.mark.matrix(together=1)
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("way", ["reuse", *get_args(RecomputeBy)])
@pytest.mark.parametrize("name", MODELS)
def test_many_queries_over_moved_keys_are_one_block_masked_forward_pass(
    name: str, way: Any, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(placement, "available", lambda dtype: False)
    engine = tiny.engine(name)
    engine.runner.stepped = False  # which knows no other attention than that of one query
    monkeypatch.setattr(in_place, "MANY_QUERIES", 1)
    monkeypatch.setattr(in_place, "MANY_UNPLACED", 1)
    monkeypatch.setattr(at_positions, "BLOCK_QUERIES", 7)
    assert engine.runner.in_place
    options: Any = {"strategy": "recompute", "recompute_by": way, "recompute": 0.3}
    if way == "reuse":
        options = {"strategy": way}
    prefill = engine.prefill(QUESTION, CHUNKS, **options)
    assert isinstance(prefill.context, LinkedContext)
    reference = tiny.Reference(prefill)
    torch.testing.assert_close(prefill.logits, reference.logits(), atol=1e-4, rtol=0)
    found = engine.answer(QUESTION, CHUNKS, **options, max_new_tokens=10).token_ids
    monkeypatch.setattr(in_place, "MANY_QUERIES", 10**6)
    monkeypatch.setattr(in_place, "MANY_UNPLACED", 10**6)
    assert engine.answer(QUESTION, CHUNKS, **options, max_new_tokens=10).token_ids == found


def test_models_and_devices_it_does_not_serve_copy() -> None:
    assert not tiny.engine("gemma2").runner.in_place  # caps its scores
    engine = tiny.engine("llama")
    assert isinstance(engine.prefill(QUESTION, CHUNKS, strategy="full").context, ContextCache)
    for by in ("first", "question"):
        context = engine.prefill(QUESTION, CHUNKS, strategy="recompute", recompute_by=by).context
        assert isinstance(context, LinkedContext)
