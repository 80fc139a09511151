"""Perplexity with an adapter on against off."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import tiny_adapters
import torch
from tiny_sets import save_adapter

from kvlink_rag import InputError
from kvlink_rag.evaluation import ability
from kvlink_rag.evaluation.plan import Plan, Row
from kvlink_rag.evaluation.run import evaluate
from kvlink_rag.evaluation.table import results, write

MESSAGES = [
    {"role": "user", "content": "How tall is the tower?"},
    {"role": "assistant", "content": "It is 330 m tall."},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def plan(tmp_path):
    texts = [{"text": f"Text {i} is about bees and towers."} for i in range(25)]
    talks = [{"messages": [*MESSAGES, {"role": "user", "content": "?"}]}] * 12
    adapters = [save_adapter(tmp_path, kind, kind=kind) for kind in tiny_adapters.KINDS]
    return Plan(
        tuple(Row(f"reuse {i}", "reuse", adapter) for i, adapter in enumerate(adapters)),
        text=(write_lines(tmp_path / "plain.jsonl", texts),),
        instructions=(write_lines(tmp_path / "talks.jsonl", talks),),
    )


@torch.inference_mode()
def loss_of(model, given, wanted):
    """One by one: -log p of each wanted token."""
    total = 0.0
    for place in range(len(wanted)):
        ids = torch.tensor([[*given, *wanted[:place]]])
        total -= float(model(ids).logits[0, -1].log_softmax(-1)[wanted[place]])
    return total


def test_the_loss_of_a_text_is_of_all_tokens_but_the_first():
    engine = tiny.engine()
    ids = engine.layout.encode_text("Bees dance.")
    loss, tokens = ability.text_loss(engine, "Bees dance.")
    assert tokens == len(ids) - 1
    assert loss == pytest.approx(loss_of(engine.model, ids[:1], ids[1:]), abs=1e-3)


def test_the_loss_of_instructions_is_of_the_response_and_its_end():
    engine = tiny.engine()
    prompt = (
        "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHow tall is the tower?<|end|>\n"
        "<|start|>assistant\n"
    )
    ids = tiny.tokenizer()(prompt)["input_ids"]
    response = tiny.tokenizer()("It is 330 m tall.<|end|>")["input_ids"]
    loss, tokens = ability.response_loss(engine, MESSAGES)
    assert tokens == len(response)
    assert loss == pytest.approx(loss_of(engine.model, ids, response), abs=1e-3)


def test_adapters_are_read_with_their_reader():
    for kind in tiny_adapters.KINDS:
        trained = tiny_adapters.adapter(kind=kind)
        off, _ = ability.text_loss(tiny.engine(), "Bees dance.")
        on, _ = ability.text_loss(tiny.engine(adapter=trained), "Bees dance.")
        _, reader = trained.apply(tiny.model("llama"))
        ids = tiny.engine().layout.encode_text("Bees dance.")
        assert on == pytest.approx(loss_of(reader, ids[:1], ids[1:]), abs=1e-3)
        assert abs(on - off) > 0.1


def test_long_texts_are_cut(monkeypatch):
    monkeypatch.setattr(ability, "MAX_TOKENS", 10)
    assert ability.text_loss(tiny.engine(), "x" * 100)[1] == 9
    assert ability.response_loss(tiny.engine(), MESSAGES) == (0.0, 0)


def test_perplexities_on_and_off(plan, tmp_path):
    out = tmp_path / "out"
    evaluate(plan, tiny.engine(), out, progress=False)
    found = results(out)["ability"]
    assert [(each["file"], each["texts"]) for each in found] == [
        ("plain", 3), ("plain", 3), ("talks", 2), ("talks", 2),
    ]  # fmt: skip
    each = found[0]
    engine = tiny.engine()
    losses = [ability.text_loss(engine, f"Text {i} is about bees and towers.") for i in (0, 10, 20)]
    expected = math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
    assert each["off"] == pytest.approx(expected, rel=1e-4)
    assert each["ratio"]["mean"] == pytest.approx(each["on"] / each["off"])
    assert each["ratio"]["low"] <= each["ratio"]["mean"] <= each["ratio"]["high"]
    (line,) = [
        line for line in write(out).splitlines() if "plain (3 text" in line and "cache" in line
    ]
    assert f"| {each['off']:.3f} | {each['on']:.3f} | {each['ratio']['mean']:.4f} (" in line


def test_losses_are_computed_once(plan, tmp_path, monkeypatch):
    out, read = tmp_path / "out", []
    loss = ability._loss
    monkeypatch.setattr(ability, "_loss", lambda *given: read.append(given) or loss(*given))
    evaluate(plan, tiny.engine(), out, progress=False)
    assert len(read) == 3 * (3 + 2) - 3  # of the instructions, the held-out ones are the same
    before = results(out)
    file = out / "ability.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    read.clear()
    evaluate(plan, tiny.engine(), out, progress=False)
    assert len(read) == 1
    assert results(out) == before
    save_adapter(tmp_path, "whole-model", kind="whole-model", seed=5)
    read.clear()
    evaluate(plan, tiny.engine(), out, progress=False)
    assert len(read) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": MESSAGES[:1]}, "'assistant'"),
        ({"messages": [{"role": "user"}]}, "line 1: a message is"),
        ({"text": "x"}, "no field 'messages'"),
    ],
)
def test_damaged_instructions_are_named(tmp_path, row, message):
    plan = Plan((Row("full", "full"),), instructions=(write_lines(tmp_path / "i.jsonl", [row]),))
    with pytest.raises(InputError, match=message):
        ability.read_files(plan)


def test_damaged_texts_are_named(tmp_path):
    for rows, message in (([{"title": "x"}], "no field 'text'"), ([], "is empty")):
        plan = Plan((Row("full", "full"),), text=(write_lines(tmp_path / "t.jsonl", rows),))
        with pytest.raises(InputError, match=message):
            ability.read_files(plan)
