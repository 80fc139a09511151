"""The adapter that comes with the package, on the model it was trained for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny_adapters
import torch

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.adapters.load import SHIPPED, load_adapter, shipped_adapters
from kvlink_rag.demo import QUESTIONS
from kvlink_rag.training.settings import TrainSettings, read_settings

pytestmark = pytest.mark.model

NAME = "smollm2-135m-link5"
ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples" / "corpus"
ANSWERS = ("igneous", "Neil Armstrong", "October 1973", "Yersinia pestis", "Saturn V", "1665")
"""To the demo's questions, in their order."""


def passages() -> list[Chunk]:
    chunks = []
    for path in sorted(CORPUS.glob("[a-z0-9]*.md")):
        blocks = [b.strip() for b in path.read_text(encoding="utf-8").split("\n\n")]
        title = path.stem.replace("_", " ")
        chunks += [Chunk(block, title=title) for block in blocks if len(block) > 200]
    return chunks


@pytest.fixture(scope="module")
def linked(default_model_folder) -> KVLinkEngine:
    return KVLinkEngine.from_pretrained(
        default_model_folder, adapter=NAME, strategy="link", device="cpu", dtype="float32"
    )


@pytest.fixture(scope="module")
def lessons() -> list[tuple[str, str, list[Chunk]]]:
    """The demo's questions, their answers, and ten passages with the answer among them."""
    made, all_chunks = [], passages()
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        holding = [chunk for chunk in all_chunks if answer.lower() in chunk.text.lower()]
        others = [chunk for chunk in all_chunks if chunk not in holding]
        rng = random.Random(question)
        chunks = [rng.choice(holding), *rng.sample(others, 9)]
        rng.shuffle(chunks)
        made.append((question, answer, chunks))
    return made


def test_it_is_small_and_says_where_it_is_from():
    assert NAME in shipped_adapters()
    folder = SHIPPED / NAME
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for source in ("SQuAD", "HotpotQA", "2WikiMultihopQA", "MuSiQue", "BoolQ", "WikiText", "Dolly"):
        assert source in card
    assert (folder / "LICENSE").is_file()


def test_it_was_trained_by_the_committed_configuration():
    notes = load_adapter(NAME).notes
    trained = TrainSettings(**notes["settings"])
    assert trained == read_settings(ROOT / "training" / "link5-shared.json")
    held_out = notes["held_out"]
    assert held_out["after"]["link"] < held_out["before"]["link"]
    assert json.dumps(dict(notes))  # plain values


def test_link_is_one_masked_forward_pass(linked, lessons):
    question, _, chunks = lessons[0]
    prefill = linked.prefill(question, chunks[:4])
    assert sum(segment.kind == "link" for segment in prefill.segments) == 4
    adapter = load_adapter(NAME)
    reference = tiny_adapters.Reference(prefill, linked.model, adapter).logits()
    torch.testing.assert_close(prefill.logits, reference, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_a_store_of_the_base_model_serves_it(linked, lessons):
    base = linked.with_adapter(None)
    for _, _, chunks in lessons:
        base.index(chunks, progress=False)
    for question, _, chunks in lessons:
        report = linked.prefill(question, chunks).report
        assert (report.hits, report.misses) == (10, 0)


@pytest.mark.slow
def test_it_makes_right_answers_likelier(linked, lessons):
    """Than the untuned model's reuse, and than its own reuse without link tokens, in all of the six
    questions together. Their articles are among the training data: this says that the adapter does
    what it was trained for, not how well it does it elsewhere (kvlink eval does)."""
    untuned = [likelihood(linked.with_adapter(None), "reuse", *lesson) for lesson in lessons]
    reused = [likelihood(linked, "reuse", *lesson) for lesson in lessons]
    answers = [likelihood(linked, "link", *lesson) for lesson in lessons]
    assert sum(answers) > sum(untuned) + len(lessons) * 1.0
    assert sum(answers) > sum(reused)


def likelihood(
    engine: KVLinkEngine, strategy, question: str, answer: str, chunks: list[Chunk]
) -> float:
    """Log-probability of an answer's tokens."""
    prefill = engine.prefill(question, chunks, strategy=strategy)
    logits, total = prefill.logits, 0.0
    for token in engine.layout.encode_text(answer):
        total += float(logits.log_softmax(-1)[token])
        out = engine.reader(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[prefill.cache.get_seq_length()]]),
            past_key_values=prefill.cache,
        )
        logits = out.logits[0, -1].detach()
    return total
