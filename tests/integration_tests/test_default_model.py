"""The default model itself, on real text: exactness, and agreement with transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from effort import times

from kvlink_rag import Chunk, KVLinkEngine

pytestmark = pytest.mark.model

CORPUS = Path(__file__).parents[2] / "examples" / "corpus"
PROMPTS = times(full=20, quick=1)
BFLOAT16_TOLERANCE = 0.05
"""Relative error (Euclidean norm) of the centred first-token logits in bfloat16, against the block-
masked forward pass in float32. Full prefill itself is measured against the same bound below."""


def paragraphs() -> list[Chunk]:
    chunks = []
    for path in sorted(CORPUS.glob("[a-z0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        blocks = [b.strip() for b in text.split("\n\n") if len(b) > 200]
        chunks += [Chunk(block[:320], title=path.stem) for block in blocks]
    return random.Random(0).sample(chunks, 20)


@pytest.fixture(scope="module")
def float32(default_model_folder) -> KVLinkEngine:
    return KVLinkEngine.from_pretrained(default_model_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine(default_model_folder) -> KVLinkEngine:
    return KVLinkEngine.from_pretrained(default_model_folder, device="cpu")


@pytest.mark.parametrize("strategy", ["reuse", "recompute"])
def test_float32_is_one_block_masked_forward_pass(float32, strategy):
    chunks = paragraphs()[:4]
    for order in (chunks, chunks[::-1]):
        prefill = float32.prefill("When was it?", order, strategy=strategy)
        reference = tiny.Reference(prefill).logits()
        torch.testing.assert_close(prefill.logits, reference, atol=1e-4, rtol=1e-5)


def test_float32_continuation_is_that_of_the_reference(float32):
    chunks = paragraphs()[4:7]
    answer = float32.answer("What is this about?", chunks, max_new_tokens=20)
    reference = tiny.Reference(float32.prefill("What is this about?", chunks))
    assert len(answer.token_ids) > 5
    assert answer.token_ids == reference.greedy(answer.token_ids)


def test_float32_recompute_of_everything_is_full(float32):
    chunks = paragraphs()[:3]
    whole = float32.prefill("Why?", chunks, strategy="recompute", recompute=1.0)
    full = float32.prefill("Why?", chunks, strategy="full")
    torch.testing.assert_close(whole.logits, full.logits, atol=1e-4, rtol=1e-5)


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    logits, expected = logits - logits.mean(), expected - expected.mean()
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "strategy",
    [
        "reuse",
        pytest.param("recompute", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_near_the_float32_reference(float32, engine, strategy):
    chunks = paragraphs()[:4]
    exact = tiny.Reference(float32.prefill("When was it?", chunks, strategy=strategy)).logits()
    prefill = engine.prefill("When was it?", chunks, strategy=strategy)
    assert relative_error(prefill.logits, exact) < BFLOAT16_TOLERANCE
    other = tiny.Reference(float32.prefill("When was it?", chunks[::-1])).logits()
    assert (
        relative_error(prefill.logits, other) > BFLOAT16_TOLERANCE
    )  # the bound tells orders apart


def test_full_is_generate_of_transformers_on_twenty_prompts(engine):
    for chunk in paragraphs()[:PROMPTS]:
        answer = engine.answer("What is it about?", [chunk], strategy="full", max_new_tokens=12)
        prefill = engine.prefill("What is it about?", [chunk], strategy="full")
        prompt = torch.tensor([prefill.token_ids])
        expected = engine.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12
        )
        assert answer.token_ids == expected[0, prompt.shape[1] :].tolist()
