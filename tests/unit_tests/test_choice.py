"""`auto`: what it comes to, and that every answer says so."""

from __future__ import annotations

import pytest
import scripted
import tiny
import tiny_adapters
import torch

from kvlink_rag import InputError, KVLinkEngine
from kvlink_rag.engine.choice import Choice, choose
from kvlink_rag.store import MemoryStore

QUESTION = "How tall is it?"
TEXTS = ["Bees dance.", "The tower is 330 m tall.", "Ants follow trails of scent."]


def engine(**options):
    """A tiny engine as one without wishes makes it."""
    return tiny.engine(**{"strategy": None, **options})


class TestChoice:
    def test_an_untuned_model_recomputes(self):
        report = engine().answer(QUESTION, TEXTS, max_new_tokens=2).report
        assert (report.asked, report.strategy, report.recompute) == ("auto", "recompute", 0.15)
        assert report.way == "recompute 15 %"
        assert report.why == "plain reuse answers worse than full prefill"

    def test_the_answer_is_that_of_recompute(self):
        auto = engine().prefill(QUESTION, TEXTS)
        asked = engine().prefill(QUESTION, TEXTS, strategy="recompute")
        torch.testing.assert_close(auto.logits, asked.logits, atol=0, rtol=0)
        assert [s.full_view for s in auto.segments] == [s.full_view for s in asked.segments]
        assert any(s.full_view for s in auto.segments if s.kind == "chunk")

    def test_the_share_can_be_another(self):
        report = engine(recompute=0.05).prefill(QUESTION, TEXTS).report
        assert (report.strategy, report.recompute) == ("recompute", 0.05)
        assert report.way == "recompute 5 %"

    @pytest.mark.parametrize(
        ("kind", "expected"), [("cache-preserving", "recompute"), ("whole-model", "reuse")]
    )
    def test_adapters(self, kind, expected):
        trained = tiny_adapters.adapter("llama", kind)
        one = tiny_adapters.engine("llama", trained, strategy=None)
        report = one.prefill(QUESTION, TEXTS).report
        assert (report.asked, report.strategy) == ("auto", expected)
        assert report.why == choose(one.runner, one.encode_behind).why

    def test_where_nothing_can_be_computed_anew_all_is(self):
        runner = scripted.ScriptedRunner(strategies=frozenset({"full", "reuse"}))
        report = scripted.engine(runner, strategy=None).answer(QUESTION, TEXTS).report
        assert (report.asked, report.strategy, report.recompute) == ("auto", "full", 0.0)
        assert report.way == "full"
        assert "scripted can compute no part of a chunk anew" in report.why
        assert runner.jobs[-1].strategy == "full"


class TestReports:
    @pytest.mark.parametrize("strategy", ["full", "reuse", "recompute"])
    def test_what_was_asked_for_has_no_reason(self, strategy):
        report = engine().prefill(QUESTION, TEXTS, strategy=strategy).report
        assert (report.asked, report.strategy, report.why) == (strategy, strategy, "")

    def test_an_engine_of_another_default_can_be_asked(self):
        one = engine(strategy="reuse")
        assert one.prefill(QUESTION, TEXTS).report.strategy == "reuse"
        assert one.prefill(QUESTION, TEXTS, strategy="auto").report.strategy == "recompute"

    def test_together(self):
        asked = [(QUESTION, TEXTS), ("Who dances?", TEXTS[::-1])]
        for answer in engine().answer_batch(asked, max_new_tokens=2):
            assert (answer.report.asked, answer.report.way) == ("auto", "recompute 15 %")

    def test_a_fallback_is_no_recompute(self):
        options = {"fidelity_rate": 1.0, "fidelity_limit": 0.0, "max_new_tokens": 2}
        report = engine().answer(QUESTION, TEXTS, **options).report
        assert report.fell_back
        assert (report.strategy, report.recompute, report.way) == ("full", 0.0, "full")

    def test_what_there_is(self):
        with pytest.raises(InputError, match=r"'auto', 'full', 'reuse'.*not 'magic'"):
            engine().prefill(QUESTION, TEXTS, strategy="magic")


def test_behind_documents_less_is_computed_anew(short_preamble):
    one = engine(encode_behind="documents")
    report = one.answer(QUESTION, TEXTS, max_new_tokens=1).report
    assert (report.asked, report.strategy, report.recompute) == ("auto", "recompute", 0.04)
    behind_the_prefix = one.with_encode_behind("system")
    report = behind_the_prefix.answer(QUESTION, TEXTS, max_new_tokens=1).report
    assert (report.strategy, report.recompute) == ("recompute", 0.15)
    one.tuned = Choice("recompute", "measured", 0.3)
    assert one.answer(QUESTION, TEXTS, max_new_tokens=1).report.recompute == 0.3


def test_chunks_are_encoded_behind_documents_unless_told(short_preamble):
    model = tiny.model("llama"), tiny.tokenizer()
    plain = KVLinkEngine.from_pretrained(model, store=MemoryStore())
    assert plain.encode_behind == "documents"
    trained = plain.with_adapter(tiny_adapters.adapter())
    assert trained.encode_behind == "documents", "one store serves both"
    assert trained.with_adapter(None).encode_behind == "documents"
    adapter = tiny_adapters.adapter()
    made_with = KVLinkEngine.from_pretrained(model, store=MemoryStore(), adapter=adapter)
    assert made_with.encode_behind == "system", "what the adapter was trained behind"
    assert made_with.with_adapter(None).encode_behind == "system"
    apart = plain.with_adapter(tiny_adapters.adapter(encode_behind="alone"))
    assert apart.encode_behind == "alone", "it was trained for others"
    assert apart.with_adapter(None).encode_behind == "documents"
    told = plain.with_encode_behind("documents").with_adapter(tiny_adapters.adapter())
    report = told.prefill(QUESTION, TEXTS).report
    assert (report.strategy, report.recompute) == ("recompute", 0.15)
    own = told.with_adapter(tiny_adapters.adapter(kind="whole-model", encode_behind="alone"))
    assert own.encode_behind == "alone", "its weights read no other caches"
    assert plain.with_encode_behind("header", override=False).encode_behind == "header"
    assert told.with_encode_behind("header", override=False).encode_behind == "documents"
