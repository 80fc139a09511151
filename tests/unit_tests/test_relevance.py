"""Recomputation guided by the question: what it attends to is measured, chosen and recomputed."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import tiny
import tiny_adapters
import torch

from kvlink_rag import InputError, KVLinkEngine, UnsupportedModelError
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.runners.transformers.relevance import attention_paid, measured
from kvlink_rag.runners.transformers.together import Tokens, paid_together, run_together

TEXTS = [
    "A chunk that is a good deal longer than any of the sliding windows of these models are.",
    "Bees dance to tell where flowers are.",
    "Zürich lies on a lake; 湖 means lake.",
    "The tower is 330 m tall.",
    "x",
]
"""Short ones last, so that short sliding windows reach more than one."""
QUESTION = "How tall is it?"
GUIDED = {"strategy": "recompute", "recompute_by": "question", "recompute": 0.125}
TOLERANCE = 1e-4


def eager(name: str) -> torch.nn.Module:
    """The tiny model with eager attention, which returns its weights."""
    twin = copy.deepcopy(tiny.model(name))
    twin.set_attn_implementation("eager")
    return twin


def engine(name: str, attention: str) -> KVLinkEngine:
    """A guided engine over a tiny model with another attention than its own."""
    model = copy.deepcopy(tiny.model(name))
    model.set_attn_implementation(attention)
    made = KVLinkEngine.from_pretrained((model, tiny.tokenizer()), prompt=tiny_adapters.PROMPT)
    assert made.model.config._attn_implementation == attention
    return made


def paid_in_reference(name: str, reuse: Prefill, reference: tiny.Reference) -> torch.Tensor:
    """Attention from question to each earlier token in ONE block-masked forward pass."""
    reference.model = eager(name)
    start = reuse.segments[-1].start
    rows, columns = reference.main[start:], reference.main[:start]
    paid = torch.zeros(start)

    def add(_module, _args, output) -> None:
        paid.add_(output[1][0][:, rows][:, :, columns].sum((0, 1)))

    layers = reference.model.model.layers
    for layer in measured(len(layers)):
        layers[layer].self_attn.register_forward_hook(add)
    reference.logits()
    return paid


def chosen(prefill: Prefill) -> list[int]:
    """Positions of recomputed tokens."""
    return [
        segment.start + offset
        for segment in prefill.segments
        if segment.kind == "chunk"
        for offset in segment.full_view
    ]


class TestMeasurement:
    @pytest.mark.parametrize("name", tiny.CONFIGS)
    def test_it_is_that_of_one_block_masked_forward_pass(self, name):
        one = tiny.engine(name)
        reuse = one.prefill(QUESTION, TEXTS)
        start = reuse.segments[-1].start
        question = reuse.token_ids[start:]
        reuse.cache.set_length(start)
        paid = attention_paid(one.model, reuse.cache, question)
        expected = paid_in_reference(name, reuse, tiny.Reference(reuse))
        torch.testing.assert_close(paid, expected, atol=TOLERANCE, rtol=1e-4)
        heads, layers = one.model.config.num_attention_heads, 2  # of 4
        # what is missing went to the question's own tokens
        assert 0 < float(paid.sum()) < heads * layers * len(question)
        assert reuse.cache.get_seq_length() == start

    @pytest.mark.parametrize("name", tiny.CONFIGS)
    def test_in_place_it_is_the_same(self, name):
        one = tiny.engine(name)
        if not one.runner.in_place:
            pytest.skip("not served in place")
        reuse = one.prefill(QUESTION, TEXTS)
        start = reuse.segments[-1].start
        question, places = reuse.token_ids[start:], range(start, len(reuse.token_ids))
        context = reuse.context
        context.forget()
        (paid,) = paid_together(one.model, [Tokens(context, question, places)])
        expected = paid_in_reference(name, reuse, tiny.Reference(reuse))
        torch.testing.assert_close(paid, expected, atol=TOLERANCE, rtol=1e-4)
        # and nothing of it is left
        logits = run_together(one.model, [Tokens(context, question, places)])[0]
        torch.testing.assert_close(logits, reuse.logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("name", tiny.CONFIGS)
    def test_the_most_attended_tokens_behind_the_first_chunk_are_chosen(self, name):
        one = tiny.engine(name)
        reuse = one.prefill(QUESTION, TEXTS)
        guided = one.prefill(QUESTION, TEXTS, **GUIDED)
        assert guided.token_ids == reuse.token_ids
        paid = paid_in_reference(name, reuse, tiny.Reference(reuse))
        found = chosen(guided)
        first, second = reuse.segments[1:3]
        assert len(found) == round(0.125 * (reuse.segments[-1].start - first.start)) == 25
        # the first chunk's cache has seen all that stands before it
        places = range(second.start, reuse.segments[-1].start)
        others = [place for place in places if place not in found]
        assert paid[found].min() > paid[others].max() - TOLERANCE
        assert found != chosen(one.prefill(QUESTION, TEXTS, **GUIDED | {"recompute_by": "first"}))

    @pytest.mark.parametrize("name", ["llama", "mistral", "phi"])
    def test_a_single_chunk_is_complete(self, name):
        one = tiny.engine(name)
        guided = one.prefill(QUESTION, TEXTS[:1], **GUIDED)
        assert chosen(guided) == []
        question = guided.segments[-1]
        again = one.prefill(QUESTION, TEXTS[:1], **GUIDED)
        assert again.report.computed_tokens == question.stop - question.start
        full = one.prefill(QUESTION, TEXTS[:1], strategy="full")
        torch.testing.assert_close(again.logits, full.logits, atol=TOLERANCE, rtol=0)

    def test_behind_another_system_prompt_it_is_not(self):
        one = tiny.engine()
        guided = one.prefill(QUESTION, TEXTS[:1], system="Be brief.", **GUIDED)
        chunk = guided.segments[1]
        assert len(chosen(guided)) == round(0.125 * (chunk.stop - chunk.start)) > 0
        whole = {**GUIDED, "recompute": 1.0, "system": "Be brief."}
        all_anew = one.prefill(QUESTION, TEXTS[:1], **whole)
        full = one.prefill(QUESTION, TEXTS[:1], strategy="full", system="Be brief.")
        torch.testing.assert_close(all_anew.logits, full.logits, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
    def test_sdpa_and_eager_choose_the_same(self, name):
        found = [
            engine(name, attention).prefill(QUESTION, TEXTS, **GUIDED)
            for attention in ("sdpa", "eager")
        ]
        assert chosen(found[0]) == chosen(found[1])
        torch.testing.assert_close(found[0].logits, found[1].logits, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("in_place", [True, False])
    def test_layers_that_are_not_measured_are_not_run(self, in_place):
        one = engine("llama", "sdpa")  # whose model is its own: the others' is not to be changed
        one.runner.in_place = in_place
        runs = [0] * 4

        def count(layer: int) -> None:
            runs[layer] += 1

        for layer, block in enumerate(one.model.get_decoder().layers):
            block.register_forward_pre_hook(lambda *_, layer=layer: count(layer))
        one.prefill(QUESTION, TEXTS, strategy="reuse")
        before = list(runs)
        one.prefill(QUESTION, TEXTS, **GUIDED)
        # once to choose, where it ends within the third layer, and once over what was chosen
        assert [now - then for now, then in zip(runs, before, strict=True)] == [2, 2, 2, 1]

    def test_the_models_attention_is_given_back(self, monkeypatch):
        one = tiny.engine()
        one.runner.in_place = False
        one.prefill(QUESTION, TEXTS, **GUIDED)
        assert one.model.config._attn_implementation == "sdpa"

        def fail(*args):
            raise ZeroDivisionError

        monkeypatch.setattr("kvlink_rag.runners.transformers.relevance.run_behind", fail)
        with pytest.raises(ZeroDivisionError):
            one.prefill(QUESTION, TEXTS, **GUIDED)
        assert one.model.config._attn_implementation == "sdpa"
        layers = one.model.get_decoder().layers
        assert not any(part._forward_hooks for layer in layers for part in layer.children())

    def test_a_layer_without_weights_is_an_error(self):
        one = engine("llama", "eager")
        layer = one.model.get_decoder().layers[1]
        layer.self_attn.register_forward_hook(lambda module, args, output: (output[0], None))
        with pytest.raises(UnsupportedModelError, match=r"1 of the layers 1 to 2.*'first'"):
            one.prefill(QUESTION, TEXTS, **GUIDED)


class TestExactness:
    """That every model's logits are exact is in test_exactness; here is what is special."""

    @pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "mistral"])
    def test_with_eager_attention(self, name):
        prefill = engine(name, "eager").prefill(QUESTION, TEXTS, **GUIDED)
        expected = tiny.Reference(prefill).logits()
        torch.testing.assert_close(prefill.logits, expected, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("name", tiny.CONFIGS)
    def test_these_tests_can_fail(self, name):
        """The wrong tokens, or none, are far outside the tolerance."""
        one = tiny.engine(name)
        prefill = one.prefill(QUESTION, TEXTS, **GUIDED)
        segments = prefill.segments
        for view in (
            [tuple(range(len(segment.full_view))) for segment in segments],
            [() for _ in segments],
        ):
            prefill.segments = [
                replace(s, full_view=v) if s.kind == "chunk" else s
                for s, v in zip(segments, view, strict=True)
            ]
            wrong = tiny.Reference(prefill).logits()
            assert (prefill.logits - wrong).abs().max() > 100 * TOLERANCE

    @pytest.mark.parametrize("kind", tiny_adapters.KINDS)
    @pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
    def test_with_an_adapter(self, name, kind):
        trained = tiny_adapters.adapter(name, kind)
        one = tiny_adapters.engine(name, trained)
        one.stop_ids = frozenset()
        prefill = one.prefill(QUESTION, TEXTS, **GUIDED)
        assert len(chosen(prefill)) == 25
        reference = tiny_adapters.Reference(prefill, name, trained)
        torch.testing.assert_close(prefill.logits, reference.logits(), atol=TOLERANCE, rtol=0)
        for token in one.answer(QUESTION, TEXTS, max_new_tokens=20, **GUIDED).token_ids:
            assert token == int(reference.logits().argmax())
            reference.append(token)

    def test_the_reader_measures(self):
        """A cache-preserving adapter asks with its own eyes: another choice than the base's."""
        trained = tiny_adapters.adapter("llama", "cache-preserving")
        tuned, base = tiny_adapters.engine("llama", trained), tiny.engine()
        assert chosen(tuned.prefill(QUESTION, TEXTS, **GUIDED)) != chosen(
            base.prefill(QUESTION, TEXTS, **GUIDED)
        )


class TestBudget:
    def test_it_is_shared_by_all_chunks(self):
        prefill = tiny.engine().prefill(QUESTION, TEXTS, **GUIDED)
        counts = [len(s.full_view) for s in prefill.segments if s.kind == "chunk"]
        assert sum(counts) == 25
        assert len(set(counts)) > 1

    def test_nothing_is_reuse(self):
        one = tiny.engine()
        one.index(TEXTS, progress=False)
        reuse = one.prefill(QUESTION, TEXTS)
        none = one.prefill(QUESTION, TEXTS, **GUIDED | {"recompute": 0.0})
        assert chosen(none) == []
        torch.testing.assert_close(none.logits, reuse.logits)
        assert one.prefill(QUESTION, [], **GUIDED).report.hits == 0

    def test_computed_tokens_are_all_that_ran(self):
        one = tiny.engine()
        one.answer(QUESTION, TEXTS, max_new_tokens=1)
        lengths: list[int] = []
        hook = one.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: lengths.append(output.shape[1])
        )
        guided = one.prefill(QUESTION, TEXTS, **GUIDED)
        everything = one.prefill(QUESTION, TEXTS, **GUIDED | {"recompute": 1.0})
        hook.remove()
        question = len(guided.token_ids) - guided.segments[-1].start
        # the question to measure, then chosen tokens with the question; nothing to measure for all
        assert lengths[:2] == [question, len(chosen(guided)) + question]
        assert guided.report.computed_tokens == sum(lengths[:2])
        assert lengths[2:] == [everything.report.computed_tokens]

    def test_the_question_decides(self):
        one = tiny.engine()
        found = {
            tuple(chosen(one.prefill(question, TEXTS, **GUIDED)))
            for question in ("How tall is it?", "Where is Zurich?", "What do bees do?")
        }
        assert len(found) > 1

    def test_caches_in_the_store_stay_as_they_are(self):
        one = tiny.engine()
        before = one.prefill(QUESTION, TEXTS)
        one.answer(QUESTION, TEXTS, max_new_tokens=4, **GUIDED)
        after = one.prefill(QUESTION, TEXTS)
        assert after.report.hits == 5
        torch.testing.assert_close(before.logits, after.logits)

    def test_the_engine_and_the_call_may_say(self):
        one = tiny.engine(strategy="recompute", recompute_by="question", recompute=0.125)
        assert one.with_adapter(None).options["recompute_by"] == "question"
        guided = chosen(one.prefill(QUESTION, TEXTS))
        assert guided == chosen(tiny.engine().prefill(QUESTION, TEXTS, **GUIDED))
        first = chosen(one.prefill(QUESTION, TEXTS, recompute_by="first"))
        assert first == chosen(
            tiny.engine().prefill(QUESTION, TEXTS, **GUIDED | {"recompute_by": "first"})
        )
        for make in (
            lambda: tiny.engine(recompute_by="chance"),
            lambda: one.answer(QUESTION, TEXTS, recompute_by="chance"),
        ):
            with pytest.raises(InputError, match="'chance'"):
                make()

    def test_fidelity_of_a_guided_answer(self):
        one = tiny.engine(fidelity_rate=1.0)
        answer = one.answer(QUESTION, TEXTS, max_new_tokens=2, **GUIDED)
        assert answer.report.fidelity == one.fidelity(QUESTION, TEXTS, **GUIDED)
        whole = one.fidelity(QUESTION, TEXTS, **GUIDED | {"recompute": 1.0})
        assert whole.kl_nats < 1e-6

    def test_threads_with_other_strategies(self):
        one = tiny.engine()
        one.index(TEXTS, progress=False)
        ways = [GUIDED, {"strategy": "reuse"}, GUIDED, {"strategy": "full"}]
        expected = [one.answer(QUESTION, TEXTS, max_new_tokens=6, **way).token_ids for way in ways]
        got: dict[int, list[int]] = {}

        def ask(place: int) -> None:
            for _ in range(3):
                answer = one.answer(QUESTION, TEXTS, max_new_tokens=6, **ways[place])
            got[place] = answer.token_ids

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[place] for place in range(4)] == expected
