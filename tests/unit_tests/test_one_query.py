"""The compiled attention of one token, beside the same in plain torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kvlink_rag.runners.transformers import kernel, one_query
from kvlink_rag.runners.transformers.one_query import OneQuery
from kvlink_rag.runners.transformers.part import DTYPES, PIECE, Part
from kvlink_rag.runners.transformers.scratch import Scratch

LAYERS, KV_HEADS, LAYER = 3, 2, 1
QUESTION = "How tall is it?"
TEXTS = [
    "A chunk that is a good deal longer than any of the sliding windows of these models are.",
    "Bees dance to tell where flowers are.",
    "The tower is 330 m tall.",
]
IN_PLACE = [name for name in tiny.CONFIGS if tiny.engine(name).runner.in_place]


def part(tokens: int, dims: tuple[int, int], dtype: torch.dtype, hidden: range) -> Part:
    keys, values = (torch.randn(LAYERS, KV_HEADS, tokens, dim).to(dtype) for dim in dims)
    bias = torch.zeros(tokens).index_fill_(0, torch.tensor(hidden, dtype=torch.long), float("-inf"))
    return Part(keys, values, bias if len(hidden) else None)


def in_torch(parts: list[Part], queries: torch.Tensor, own: Part) -> torch.Tensor:
    scores, values = [], []
    for each, query in zip([*parts, own], queries, strict=True):
        score = query @ each.keys[LAYER].float().transpose(1, 2)
        scores.append(score if each.bias is None else score + each.bias)
        values.append(each.values[LAYER].float())
    weights = torch.cat(scores, -1).softmax(-1)
    return (weights @ torch.cat(values, 1)).flatten(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dims", [(8, 8), (20, 12)])
def test_it_is_the_softmax_over_everything(
    dtype: torch.dtype, group: int, dims: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    piece = PIECE
    parts = [
        part(5, dims, dtype, range(0)),
        part(2 * piece + 3, dims, dtype, range(piece, 2 * piece)),  # a piece of which none is seen
        part(piece, dims, dtype, range(1, piece, 2)),
    ]
    capacity, used = 2 * piece, piece + 7
    room = part(capacity, dims, dtype, range(0))  # as a cache with room for more tokens has it
    bias = torch.zeros(used).index_fill_(0, torch.tensor([0, 3]), float("-inf"))
    own = Part(room.keys[:, :, :used], room.values[:, :, :used], bias)
    assert all(each.readable for each in [*parts, own])
    queries = torch.randn(len(parts) + 1, KV_HEADS, group, dims[0])
    attention = OneQuery(parts, used, bias, Scratch())
    found = attention.attend(LAYER, queries, own.keys[LAYER], own.values[LAYER])
    torch.testing.assert_close(found, in_torch(parts, queries, own), atol=1e-5, rtol=1e-5)
    moved = Part(own.keys.clone(), own.values.clone(), bias)  # a cache that has grown
    again = attention.attend(LAYER, queries, moved.keys[LAYER], moved.values[LAYER])
    torch.testing.assert_close(again, found, atol=0, rtol=0)


def test_huge_scores_and_a_single_token() -> None:
    own = Part(torch.full((LAYERS, KV_HEADS, 1, 4), 1e4), torch.ones(LAYERS, KV_HEADS, 1, 4), None)
    queries = torch.full((1, KV_HEADS, 2, 4), 1e4)
    found = OneQuery([], 1, None, Scratch()).attend(0, queries, own.keys[0], own.values[0])
    torch.testing.assert_close(found, torch.ones(4, 4), atol=0, rtol=0)


def test_what_it_cannot_read() -> None:
    keys = torch.zeros(LAYERS, KV_HEADS, 6, 8)
    assert Part(keys, keys, None).readable
    assert not Part(keys.half(), keys, None).readable
    assert not Part(keys, keys.transpose(2, 3), None).readable
    assert not Part(keys[..., ::2], keys, None).readable


@pytest.mark.parametrize("strategy", ["reuse", "recompute"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_answers_are_those_without(
    name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny.engine(name, strategy=strategy)
    one.stop_ids = frozenset()
    one.runner.stepped = False  # token by token through torch's layers
    runs: list[int] = []
    run = one_query._run
    monkeypatch.setattr(one_query, "_run", lambda told: runs.append(told) or run(told))
    compiled = one.answer(QUESTION, TEXTS, max_new_tokens=24)
    assert len(runs) == 23 * len(one.model.get_decoder().layers)  # the first is the question's
    prefill = one.prefill(QUESTION, TEXTS, max_new_tokens=4)
    logits = prefill.state.run([7])
    monkeypatch.setattr(one_query, "available", lambda: False)
    runs.clear()
    assert one.answer(QUESTION, TEXTS, max_new_tokens=24).token_ids == compiled.token_ids
    other = one.prefill(QUESTION, TEXTS, max_new_tokens=4)
    torch.testing.assert_close(logits, other.state.run([7]), atol=1e-4, rtol=0)
    assert not runs


def test_where_there_is_no_folder_for_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    make = kernel.cfunc

    def refuse(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return make(*args, **options)

    monkeypatch.setattr(kernel, "cfunc", refuse)
    assert kernel.compiled(kernel.combine)


def test_code_is_kept_for_these_sources_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba itself looks at the file of a function, and not at what the function calls."""
    names: list[str] = []
    make = kernel.cfunc

    def named(*args: object, **options: object) -> Any:
        def kept(function: Any) -> Any:
            names.append(function.__qualname__)
            return make(*args)(function)

        return kept

    monkeypatch.setattr(kernel, "cfunc", named)
    kernel.compiled(kernel.combine)
    monkeypatch.setattr(kernel, "_sources", lambda: "others")
    kernel.compiled(kernel.combine)
    assert len(set(names)) == 2
    assert all(name.startswith("combine_") for name in names)
    assert kernel.combine.__qualname__ == "combine"


def test_without_numba_attention_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.engine().answer(QUESTION, TEXTS, max_new_tokens=6).token_ids
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it fails
    monkeypatch.setattr(one_query, "_code", one_query._code.__wrapped__)  # asked anew
    assert not one_query.available()
    assert tiny.engine().answer(QUESTION, TEXTS, max_new_tokens=6).token_ids == expected


FORKED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(2)
import tiny

engine = tiny.engine("llama")
chunks = ["Bees dance.", "The tower is 330 m tall."]
expected = engine.answer("How tall?", chunks, max_new_tokens=8).token_ids
child = os.fork()
if not child:
    os._exit(engine.answer("How tall?", chunks, max_new_tokens=8).token_ids != expected)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_goes_on() -> None:
    tests = str(Path(__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", FORKED, tests], capture_output=True, text=True, check=True
    )
    assert found.stdout == "0\n", found.stderr
