"""Keys and values placed by the compiled kernel, from numbers and from codes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kvlink_rag import KVLinkEngine
from kvlink_rag.chunk import ChunkKV, CodedKV
from kvlink_rag.rope import RopeGroup, rotate
from kvlink_rag.runners.transformers import in_place, part
from kvlink_rag.runners.transformers.in_place import LinkedContext
from kvlink_rag.runners.transformers.part import Part
from kvlink_rag.runners.transformers.placement import Placement
from kvlink_rag.runners.transformers.scratch import Scratch
from kvlink_rag.runners.transformers.visibility import Span
from kvlink_rag.store import open_store
from kvlink_rag.store.codec import decode, encode

LAYERS, KV_HEADS = 4, 2
CHUNKS = ["The tower is 330 m tall.", "Zürich lies on a lake; 湖 means lake.", "x", "Bees " * 150]
QUESTION = "How tall is the tower, and where do the bees dance when nobody looks at them?"


def frequencies(pairs: int) -> torch.Tensor:
    return 1 / 1000 ** (torch.arange(pairs) / pairs)


def record(tokens: int, dims: tuple[int, int], dtype: torch.dtype, rope: Any, seed: int) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        3 * torch.randn(LAYERS, KV_HEADS, tokens, dim, generator=generator).to(dtype)
        for dim in dims
    )
    return ChunkKV(tuple(range(tokens)), (5, 6, 7), "model", keys, values, rope)


def coded(made: ChunkKV) -> CodedKV:
    whole = partial(decode, codec="int8", dtype=made.dtype, position=made.position, rope=made.rope)
    ids, behind, model = made.token_ids, made.behind, made.fingerprint
    tensors = encode(made, "int8")
    return CodedKV(ids, behind, model, tensors, made.rope, "int8", made.dtype, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("dims", "pairs"), [((64, 64), 32), ((64, 128), 16), ((16, 6), 8), ((10, 10), None)]
)
def test_numbers_are_where_they_belong(dtype, out, codes, dims, pairs) -> None:
    inv_freq = None if pairs is None else frequencies(pairs)
    rope = (RopeGroup(slice(0, LAYERS), inv_freq),)
    made = [record(tokens, dims, dtype, rope, tokens) for tokens in (1, 300, 128)]
    kept = [coded(each) if codes else each for each in made]
    assert all(part.readable(each, rope) for each in kept)
    starts = (445, 0, 301)
    spans = [Span(each, start) for each, start in zip(kept, starts, strict=True)]
    keys = torch.full((KV_HEADS, 450, dims[0]), 9.0, dtype=out)
    values = torch.full((KV_HEADS, 450, dims[1]), 9.0, dtype=out)
    layer = LAYERS - 1
    parts = [Part.at_its_place(span, inv_freq) for span in spans]
    Placement(parts, pairs or 0).place(layer, keys, values, Scratch())
    free = torch.ones(450, dtype=torch.bool)
    tolerance = {"atol": 2e-5, "rtol": 1e-2 if torch.bfloat16 in (dtype, out) else 1e-5}
    for span, each in zip(spans, made, strict=True):
        place = slice(span.start, span.stop)
        free[place] = False
        expected, wanted = each.keys[layer].float(), each.values[layer].float()
        if codes:  # in float32, whatever type they are decoded to elsewhere
            tensors = span.record.tensors
            keys_there, same = decode(tensors, "int8", torch.float32, span.start, rope)
            expected, wanted = keys_there[layer], same[layer]
        elif inv_freq is not None:
            expected = rotate(expected, torch.tensor([span.shift]), inv_freq)
        if out == torch.bfloat16:  # of a sum of two: as the larger one's last place
            tolerance["atol"] = 0.03
        torch.testing.assert_close(keys[:, place].float(), expected, **tolerance)
        torch.testing.assert_close(values[:, place].float(), wanted, **tolerance)
    assert (keys[:, free] == 9).all()
    assert (values[:, free] == 9).all()


def test_layers_have_their_own_codes_and_scales() -> None:
    rope = (RopeGroup(slice(0, LAYERS), frequencies(8)),)
    one = coded(record(140, (16, 16), torch.float32, rope, 0))
    span = Span(one, one.position)
    placed = Placement([Part.at_its_place(span, rope[0].inv_freq)], 8)
    stop = span.stop
    for layer in range(LAYERS):
        keys, values = torch.zeros(2, KV_HEADS, stop, 16)
        placed.place(layer, keys, values, Scratch())
        torch.testing.assert_close(keys[:, span.start :], one.keys[layer], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(values[:, span.start :], one.values[layer], atol=1e-5, rtol=1e-5)


def test_codes_of_another_rotation_are_not_read() -> None:
    """They were freed of it, and would be given the model's."""
    rope = (RopeGroup(slice(0, LAYERS), frequencies(8)),)
    one = coded(record(5, (16, 16), torch.float32, rope, 0))
    assert part.readable(one, rope)
    assert not part.readable(one, (RopeGroup(slice(0, LAYERS), frequencies(8) * 2),))
    assert not part.readable(one, (RopeGroup(slice(0, LAYERS), None),))
    assert not part.readable(one, ())


def engine_over(folder: Path, name: str = "llama", **options: Any) -> KVLinkEngine:
    engine = tiny.engine(name, store=open_store(folder, codec="int8", **options))
    engine.index(CHUNKS, progress=False)
    engine.prefill(QUESTION, CHUNKS)  # from now on the prefix comes as the codec has it, too
    return engine


@pytest.mark.parametrize("stepped", [True, False])
def test_an_answer_needs_nothing_decoded(
    stepped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(tmp_path)
    assert engine.runner.stepped
    engine.runner.stepped = stepped
    monkeypatch.setattr(CodedKV, "decoded", lambda self: pytest.fail("it was decoded"))
    for options in ({"strategy": "reuse"}, {"strategy": "recompute", "recompute": 0.1}):
        prefill = engine.prefill(QUESTION, CHUNKS, **options)
        assert prefill.report.misses == 0
        assert isinstance(prefill.context, LinkedContext)
        assert not [span for span in prefill.context.spans if type(span.record) is ChunkKV]
        answer = engine.answer(QUESTION, CHUNKS, **options, max_new_tokens=6)
        assert len(answer.token_ids) == 6


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["reuse", "recompute"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "phi3-sliding", "smollm3", "qwen3"])
def test_codes_and_what_they_are_decoded_to_give_the_same(
    name: str, strategy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(tmp_path, name)
    assert "int8" in engine.runner.abilities.codecs
    options: Any = {"strategy": strategy, "recompute": 0.2}
    found = engine.prefill(QUESTION, CHUNKS, **options)
    assert any(isinstance(span.record, CodedKV) for span in found.context.spans)  # type: ignore[union-attr]
    answer = engine.answer(QUESTION, CHUNKS, **options, max_new_tokens=8).token_ids
    monkeypatch.setattr(part, "CODECS", frozenset())
    assert not engine.runner.abilities.codecs
    for many in (2, 10**6):
        monkeypatch.setattr(in_place, "MANY_QUERIES", many)
        expected = engine.prefill(QUESTION, CHUNKS, **options)
        assert not any(isinstance(span.record, CodedKV) for span in expected.context.spans)  # type: ignore[union-attr]
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        again = engine.answer(QUESTION, CHUNKS, **options, max_new_tokens=8).token_ids
        assert again == answer
    engine.runner.in_place = False
    copied = engine.prefill(QUESTION, CHUNKS, **options)
    torch.testing.assert_close(found.logits, copied.logits, atol=1e-4, rtol=0)


def test_memory_keeps_codes_and_no_more(tmp_path: Path) -> None:
    engine = engine_over(tmp_path, ram_bytes=10**9)
    engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
    tier: Any = engine.store
    tier.flush()
    engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
    kept = [tier.get(key) for key in engine.keys(CHUNKS)]
    assert all(isinstance(each, CodedKV) for each in kept)
    numbers = sum(each.keys.nbytes + each.values.nbytes for each in kept)
    assert sum(each.nbytes for each in kept) < numbers / 2  # of float32
    assert tier.nbytes == sum(each.nbytes for each in kept) + sum(
        each.nbytes for key, each in tier._kept.items() if key not in engine.keys(CHUNKS)
    )


def test_one_decoding_is_for_all_who_hold_it(tmp_path: Path) -> None:
    engine = engine_over(tmp_path)
    one = engine.store.get(engine.keys(CHUNKS)[3])
    assert isinstance(one, CodedKV)
    held = one.decoded()
    assert one.decoded() is held
    assert one.keys is held.keys
    assert held.decoded() is held
    place = held.keys.data_ptr()
    del held
    assert one._made is not None
    assert one._made() is None
    assert place


def test_a_coded_file_that_was_changed_while_it_is_mapped_is_found(tmp_path: Path) -> None:
    engine = engine_over(tmp_path)
    key = engine.keys(CHUNKS)[3]
    held = engine.store.get(key)
    assert isinstance(held, CodedKV)
    (file,) = tmp_path.rglob(f"{key}*")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    with open(file, "r+b") as changed:
        changed.write(data)
    with pytest.warns(UserWarning, match="checksum"):
        assert engine.store.get(key) is None
