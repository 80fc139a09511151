"""The project's ground truth: linked caches give what ONE block-masked forward pass gives."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import tiny
import torch

from kvlink_rag import Chunk
from kvlink_rag.prompt.layout import EncodeBehind
from kvlink_rag.prompt.segments import RecomputeBy

pytestmark = pytest.mark.matrix
each_value = pytest.mark.matrix(together=1)

TOLERANCE = 1e-4
TEXTS = [
    "The tower is 330 m tall.",
    "Bees dance to tell where flowers are.",
    "Zürich lies on a lake; 湖 means lake.",
    "x",
    "A chunk that is a good deal longer than any of the sliding windows of these models are.",
]
QUESTION = "How tall is it?"
FEW = ["llama", "mistral", "gemma3", "phi3", "smollm3"]
"""One of each: plain, windows, windows by layer and scaled embeddings, fused layers, no RoPE."""

CASES = {
    "in order": TEXTS,
    "permuted": [TEXTS[i] for i in (3, 0, 4, 2, 1)],
    "one chunk": TEXTS[4:],
    "twice the same": [TEXTS[0], TEXTS[1], TEXTS[0]],
    "twenty": [f"{i}: {TEXTS[i % 5]}" for i in random.Random(0).sample(range(20), 20)],
}


def check(engine, chunks, **options) -> None:
    prefill = engine.prefill(QUESTION, chunks, **options)
    reference = tiny.Reference(prefill)
    torch.testing.assert_close(prefill.logits, reference.logits(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_reuse_is_one_block_masked_forward_pass(name, case):
    engine = tiny.engine(name)
    engine.index(CASES[case], progress=False)
    prefill = engine.prefill(QUESTION, CASES[case])
    assert prefill.report.hits == len(CASES[case])
    check(engine, CASES[case])


every_way_of_choosing = pytest.mark.parametrize("by", get_args(RecomputeBy))


@every_way_of_choosing
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "permuted") for name in tiny.CONFIGS),
        *((name, case) for name in FEW for case in CASES if case != "permuted"),
    ],
)
def test_recompute_is_one_block_masked_forward_pass(name, case, by):
    engine = tiny.engine(name, recompute_by=by)
    check(engine, CASES[case], strategy="recompute", recompute=0.15)


@pytest.mark.parametrize("behind", get_args(EncodeBehind))
@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
def test_every_prefix_behind_the_chunks(name, behind, short_preamble):
    engine = tiny.engine(name, encode_behind=behind)
    assert bool(engine.behind) == (behind != "alone")
    ways = [{"recompute_by": by} for by in get_args(RecomputeBy)]
    for options in ({"strategy": "reuse"}, *({"strategy": "recompute", **way} for way in ways)):
        # A system prompt shorter than what chunks are encoded behind puts private copies at
        # negative positions: RoPE is relative, it must not matter.
        for system in (None, "x", "Another, much longer system prompt than the default."):
            check(engine, TEXTS, system=system, **options)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_chunks_of_one_token(name, monkeypatch):
    engine = tiny.engine(name)
    monkeypatch.setattr(engine.layout, "chunk", lambda chunk: [ord(chunk.text)])
    check(engine, list("abcab"))
    check(engine, list("abcab"), strategy="recompute", recompute=0.2)
    monkeypatch.setattr(engine.layout, "chunk", lambda chunk: list(chunk.text.encode()))
    check(engine, ["a", "bcd", "a"], strategy="recompute", recompute=0.2)
    options = {"strategy": "recompute", "recompute_by": "question", "recompute": 0.2}
    check(engine, ["a", "bcd", "a"], **options)


@each_value
@pytest.mark.parametrize("way", ["reuse", *get_args(RecomputeBy)])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_twenty_greedy_tokens(name, way):
    options = {"strategy": "reuse"} if way == "reuse" else {"recompute_by": way}
    options = {"strategy": "recompute", "recompute": 0.15, **options}
    engine = tiny.engine(name)
    engine.stop_ids = frozenset()
    answer = engine.answer(QUESTION, TEXTS, max_new_tokens=20, **options)
    reference = tiny.Reference(engine.prefill(QUESTION, TEXTS, **options))
    assert len(answer.token_ids) == 20
    assert answer.token_ids == reference.greedy(answer.token_ids)


@each_value
@every_way_of_choosing
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_recompute_of_everything_is_full(name, by):
    engine = tiny.engine(name, recompute_by=by)
    full = engine.prefill(QUESTION, TEXTS, strategy="full")
    whole = engine.prefill(QUESTION, TEXTS, strategy="recompute", recompute=1.0)
    torch.testing.assert_close(whole.logits, full.logits, atol=TOLERANCE, rtol=0)
    assert whole.token_ids == full.token_ids


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_full_is_generate_of_transformers(name):
    engine = tiny.engine(name)
    engine.stop_ids = frozenset()
    answer = engine.answer(QUESTION, TEXTS, strategy="full", max_new_tokens=20)
    prompt = torch.tensor([engine.prefill(QUESTION, TEXTS, strategy="full").token_ids])
    expected = tiny.model(name).generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
    )
    assert answer.token_ids == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_generate_of_transformers_goes_on_from_our_cache(name):
    engine = tiny.engine(name)
    engine.stop_ids = frozenset()
    answer = engine.answer(QUESTION, TEXTS, max_new_tokens=20)
    prefill = engine.prefill(QUESTION, TEXTS)
    prompt = torch.tensor([[*prefill.token_ids, int(prefill.logits.argmax())]])
    expected = tiny.model(name).generate(
        prompt,
        past_key_values=prefill.cache,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=19,
    )
    assert answer.token_ids == expected[0, len(prefill.token_ids) :].tolist()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_these_tests_can_fail(name):
    """Full attention, a forgotten rotation and a lost window are all far outside the tolerance."""
    engine = tiny.engine(name)
    reuse = engine.prefill(QUESTION, TEXTS)
    full = engine.prefill(QUESTION, TEXTS, strategy="full")
    assert (reuse.logits - full.logits).abs().max() > 100 * TOLERANCE
    reference = tiny.Reference(reuse)
    for node in reference.nodes:
        node.position -= 3 * (node.owner == 4)  # the last chunk's private copy, misplaced
    assert (reuse.logits - reference.logits()).abs().max() > 10 * TOLERANCE
    if getattr(tiny.model(name).config, "sliding_window", None):
        windowless = tiny.Reference(reuse)
        mask = windowless.mask(None)
        windowless.mask = lambda window: mask  # type: ignore[method-assign]
        assert (reuse.logits - windowless.logits()).abs().max() > 100 * TOLERANCE


def test_titles_and_order_do_not_change_a_cache():
    engine = tiny.engine()
    chunks = [Chunk(text, title=f"T{i}") for i, text in enumerate(TEXTS)]
    engine.index(chunks, progress=False)
    report = engine.prefill(QUESTION, chunks[::-1]).report
    assert (report.hits, report.misses) == (5, 0)
    untitled = engine.prefill(QUESTION, TEXTS).report
    assert (untitled.hits, untitled.misses) == (0, 5)
