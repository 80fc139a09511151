"""The ground truth with adapters: engine and ONE block-masked forward pass give the same logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import pytest
import tiny
import tiny_adapters
import torch
from tiny_adapters import KINDS, LAYOUTS

from kvlink_rag.prompt.layout import EncodeBehind

pytestmark = pytest.mark.matrix

TOLERANCE = 1e-4
TEXTS = [
    "The tower is 330 m tall.",
    "Bees dance to tell where flowers are.",
    "Zürich lies on a lake; 湖 means lake.",
    "x",
    "A chunk that is a good deal longer than any of the sliding windows of these models are.",
]
QUESTION = "How tall is it?"
CASES = {
    "in order": TEXTS,
    "permuted": [TEXTS[i] for i in (3, 0, 4, 2, 1)],
    "one chunk": TEXTS[4:],
    "twice the same": [TEXTS[0], TEXTS[1], TEXTS[0]],
    "no chunks": [],
}
ONE_WITHOUT = {
    "no LoRA": {"lora": False},
    "no link tokens": {"layout": None},
}
FEW = ["llama", "mistral", "gemma3", "phi3", "smollm3"]
"""One of each: plain, windows, windows by layer and scaled embeddings, fused layers, no RoPE."""

all_models = pytest.mark.parametrize("name", tiny.CONFIGS)
few_models = pytest.mark.parametrize("name", FEW)
each_value = pytest.mark.matrix(together=1)
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@functools.cache
def make(name, kind, layout="slot", lora=True):
    """An engine that never stops early, and its adapter."""
    trained = tiny_adapters.adapter(name, kind, layout, lora=lora)
    engine = tiny_adapters.engine(name, trained, recompute=0.1)
    engine.stop_ids = frozenset()
    return engine, trained


def check(name, engine, trained, chunks, **options):
    prefill = engine.prefill(QUESTION, chunks, **options)
    reference = tiny_adapters.Reference(prefill, name, trained)
    torch.testing.assert_close(prefill.logits, reference.logits(), atol=TOLERANCE, rtol=0)
    return prefill


def greedy(prefill, name, trained, token_ids):
    """What the reference would say instead of each of 20 tokens, given those before it."""
    assert len(token_ids) == 20
    return tiny_adapters.Reference(prefill, name, trained).greedy(token_ids)


@all_kinds
@all_layouts
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "permuted") for name in tiny.CONFIGS),
        *((name, case) for name in FEW for case in CASES if case != "permuted"),
    ],
)
def test_link_is_one_block_masked_forward_pass(name, kind, layout, case):
    engine, trained = make(name, kind, layout)
    prefill = check(name, engine, trained, CASES[case])
    per_chunk = 0 if layout == "tail" else 2 * len(CASES[case])
    at_the_end = 2 if layout == "tail" and CASES[case] else 0
    links = sum(token >= 320 for token in prefill.token_ids)
    assert links == per_chunk + at_the_end


@all_kinds
@pytest.mark.parametrize("strategy", ["reuse", "recompute", "full"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "permuted") for name in tiny.CONFIGS),
        *((name, case) for name in FEW for case in ("one chunk", "no chunks")),
    ],
)
def test_the_other_strategies_are_one_block_masked_forward_pass(name, kind, strategy, case):
    check(name, *make(name, kind), CASES[case], strategy=strategy)


@each_value
@all_models
@all_kinds
@all_layouts
def test_twenty_greedy_tokens(name, kind, layout):
    engine, trained = make(name, kind, layout)
    answer = engine.answer(QUESTION, TEXTS, max_new_tokens=20)
    prefill = engine.prefill(QUESTION, TEXTS)
    assert answer.token_ids == greedy(prefill, name, trained, answer.token_ids)


@few_models
@all_kinds
@pytest.mark.parametrize("strategy", ["reuse", "recompute", "full"])
def test_twenty_greedy_tokens_of_the_other_strategies(name, kind, strategy):
    engine, trained = make(name, kind)
    answer = engine.answer(QUESTION, TEXTS, strategy=strategy, max_new_tokens=20)
    prefill = engine.prefill(QUESTION, TEXTS, strategy=strategy)
    assert answer.token_ids == greedy(prefill, name, trained, answer.token_ids)


@few_models
@all_kinds
@all_layouts
def test_generate_of_transformers_goes_on_from_our_cache(name, kind, layout):
    engine, _ = make(name, kind, layout)
    answer = engine.answer(QUESTION, TEXTS, max_new_tokens=20)
    prefill = engine.prefill(QUESTION, TEXTS)
    prompt = torch.tensor([[*prefill.token_ids, int(prefill.logits.argmax())]])
    expected = prefill.model.generate(
        prompt,
        past_key_values=prefill.cache,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=19,
    )
    assert answer.token_ids == expected[0, len(prefill.token_ids) :].tolist()


@few_models
@all_kinds
@pytest.mark.parametrize("without", ONE_WITHOUT)
def test_link_tokens_alone_and_lora_alone(name, kind, without):
    engine, trained = make(name, kind, **ONE_WITHOUT[without])
    for strategy in (engine.options["strategy"], "reuse", "recompute", "full"):
        check(name, engine, trained, TEXTS, strategy=strategy)


@few_models
@all_kinds
@all_layouts
def test_chunks_of_one_token(name, kind, layout, monkeypatch):
    engine, trained = make(name, kind, layout)
    monkeypatch.setattr(engine.layout, "chunk", lambda chunk: [ord(chunk.text)])
    for strategy in ("link", "reuse", "recompute", "full"):
        check(name, engine, trained, list("abcab"), strategy=strategy, recompute=0.3)


@few_models
@all_kinds
@pytest.mark.parametrize("behind", get_args(EncodeBehind))
def test_every_prefix_behind_the_chunks_and_every_system_prompt(name, kind, behind, short_preamble):
    trained = tiny_adapters.adapter(name, kind, encode_behind=behind)
    engine = tiny_adapters.engine(name, trained)
    assert bool(engine.behind) == (behind != "alone")
    for strategy in ("link", "recompute", "full"):
        for system in (None, "x", "Another, much longer system prompt than the default."):
            check(name, engine, trained, TEXTS, strategy=strategy, system=system)


@pytest.mark.parametrize("name", ["mistral", "qwen2-sliding", "gemma2", "gemma3", "phi3-sliding"])
@all_kinds
@all_layouts
def test_windows_are_shorter_than_the_prompt(name, kind, layout):
    engine, trained = make(name, kind, layout)
    prefill = check(name, engine, trained, TEXTS)
    assert len(prefill.token_ids) > 2 * tiny.model(name).config.sliding_window
    windowless = tiny_adapters.Reference(prefill, name, trained)
    mask = windowless.mask(None)
    windowless.mask = lambda window: mask
    assert far(prefill, windowless)


@few_models
@all_layouts
def test_embeddings_are_the_models_and_the_adapters(name, layout):
    engine, trained = make(name, "cache-preserving", layout)
    prefill = engine.prefill(QUESTION, TEXTS)
    reference = tiny_adapters.Reference(prefill, name, trained)
    expected = reference._inputs()["inputs_embeds"][0, reference.main]
    torch.testing.assert_close(prefill.embed(prefill.token_ids), expected, atol=0, rtol=0)


@all_models
@all_kinds
def test_an_adapter_changes_every_strategy(name, kind):
    """Otherwise these tests would say little about its LoRA."""
    engine, _ = make(name, kind)
    base = tiny.engine(name, recompute=0.1)
    for strategy in ("reuse", "recompute", "full"):
        with_it, without = (e.prefill(QUESTION, TEXTS, strategy=strategy) for e in (engine, base))
        assert (with_it.logits - without.logits).abs().max() > 100 * TOLERANCE


# These tests can fail: what is wrong is far outside the tolerance.


def far(prefill, reference) -> bool:
    return bool((prefill.logits - reference.logits()).abs().max() > 100 * TOLERANCE)


def nodes_of(reference, prefill, kind, slot=None):
    """Nodes of the prompt's segments of a kind."""
    return [
        node
        for s in prefill.segments
        if s.kind == kind and slot in (None, s.slot)
        for node in reference.main[s.start : s.stop]
    ]


@few_models
@all_kinds
@pytest.mark.parametrize("part", ["chunk", "link", "question"])
def test_a_wrong_lora_mask_is_seen(name, kind, part):
    engine, trained = make(name, kind)
    prefill = engine.prefill(QUESTION, TEXTS)
    reference = tiny_adapters.Reference(prefill, name, trained)
    for node in nodes_of(reference, prefill, part):
        reference.tuned[node] = not reference.tuned[node]
    assert far(prefill, reference)


@few_models
@all_kinds
def test_swapped_slots_are_seen(name, kind):
    engine, trained = make(name, kind)
    prefill = engine.prefill(QUESTION, TEXTS)
    links = trained.links
    slots = links.embeddings.view(links.slots, links.count, -1)
    for wrong in (slots.flip(1), slots.roll(1, 0)):  # tokens of a slot, and slots
        swapped = dataclasses.replace(links, embeddings=wrong.reshape(links.embeddings.shape))
        adapter = dataclasses.replace(trained, links=swapped)
        assert far(prefill, tiny_adapters.Reference(prefill, name, adapter))


@few_models
@all_kinds
@all_layouts
def test_link_tokens_that_see_less_or_are_seen_less_are_seen(name, kind, layout):
    engine, trained = make(name, kind, layout)
    prefill = engine.prefill(QUESTION, TEXTS)
    for blind, hidden in (("link", "chunk"), ("question", "link")):
        reference = tiny_adapters.Reference(prefill, name, trained)
        lost = set(nodes_of(reference, prefill, hidden))
        for node in nodes_of(reference, prefill, blind):
            reference.sees[node] = [other for other in reference.sees[node] if other not in lost]
        assert far(prefill, reference)


@few_models
@all_kinds
def test_chunks_that_see_link_tokens_are_seen(name, kind):
    engine, trained = make(name, kind)
    prefill = engine.prefill(QUESTION, CASES["permuted"])  # windows reach over the last chunk
    reference = tiny_adapters.Reference(prefill, name, trained)
    before = nodes_of(reference, prefill, "link", slot=3)
    for node in nodes_of(reference, prefill, "chunk", slot=4):
        reference.sees[node] += before
    assert far(prefill, reference)
