"""`dtype="auto"`: computed in the faster type, kept in the checkpoint's, found on any machine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from kvlink_rag import KVLinkEngine
from kvlink_rag.chunk import ChunkKV, CodedKV
from kvlink_rag.runners.transformers import number_type
from kvlink_rag.runners.transformers.identity import fingerprint
from kvlink_rag.runners.transformers.number_type import cache_dtype, float32_is_faster, to_fastest
from kvlink_rag.store import MemoryStore, open_store
from kvlink_rag.store.codec import decode

CHUNKS = ["Bees dance to tell others where flowers are.", "Ants follow trails of scent."]
QUESTION = "How do ants find their way?"


def load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")


def in_float32(record: CodedKV) -> ChunkKV:
    """Decoded to it, whatever type the caches are of."""
    numbers = decode(record.tensors, record.codec, torch.float32, record.position, record.rope)
    ids, behind, model = record.token_ids, record.behind, record.fingerprint
    return ChunkKV(ids, behind, model, *numbers, record.rope, record.codec)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model on disk, in bfloat16."""
    place = tmp_path / "model"
    model: Any = copy.deepcopy(tiny.model("llama"))
    model.to(torch.bfloat16).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(params=[True, False], ids=["float32 faster", "bfloat16 faster"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it is faster in float32."""
    monkeypatch.setattr(number_type, "float32_is_faster", lambda dtype: request.param)
    return bool(request.param)


def test_a_store_serves_every_processor(
    checkpoint: Path, processor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "kv"
    one = KVLinkEngine.from_pretrained(str(checkpoint), store=store)
    one.index(CHUNKS, progress=False)
    assert one.model.dtype == (torch.float32 if processor else torch.bfloat16)
    monkeypatch.setattr(number_type, "float32_is_faster", lambda dtype: not processor)
    other = KVLinkEngine.from_pretrained(str(checkpoint), store=store)
    assert other.model.dtype == (torch.bfloat16 if processor else torch.float32)
    report = other.prefill(QUESTION, CHUNKS).report
    assert (report.hits, report.misses) == (2, 0)
    record = other.store.get(other.keys(CHUNKS)[0])
    assert record is not None
    assert (record.keys.dtype, record.values.dtype) == (torch.bfloat16,) * 2
    bfloat16 = KVLinkEngine.from_pretrained(str(checkpoint), store=store, dtype="bfloat16")
    assert bfloat16.runner.fingerprint == one.runner.fingerprint == other.runner.fingerprint
    float32 = KVLinkEngine.from_pretrained(str(checkpoint), store=store, dtype="float32")
    assert float32.prefill(QUESTION, CHUNKS).report.misses == 2  # said, and so kept in it


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_answers_are_those_of_float32_within_the_caches_rounding(
    checkpoint: Path, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_type, "float32_is_faster", lambda dtype: True)
    engine = KVLinkEngine.from_pretrained(
        str(checkpoint), store=open_store(tmp_path / "kv", codec=codec)
    )
    assert engine.runner.in_place
    exact = KVLinkEngine.from_pretrained(
        str(checkpoint), store=MemoryStore(), dtype="float32", prompt=engine.layout.template
    )
    full = engine.prefill(QUESTION, CHUNKS, strategy="full").logits
    torch.testing.assert_close(
        full, exact.prefill(QUESTION, CHUNKS, strategy="full").logits, atol=1e-5, rtol=0
    )
    engine.prefill(QUESTION, CHUNKS)  # from now on caches come as the codec has them
    in_place = engine.prefill(QUESTION, CHUNKS).logits
    engine.runner.in_place = False
    # codes are read in place without a detour by the caches' type
    monkeypatch.setattr(CodedKV, "decoded", in_float32)
    copied = engine.prefill(QUESTION, CHUNKS).logits
    torch.testing.assert_close(in_place, copied, atol=1e-4, rtol=0)
    reference = exact.prefill(QUESTION, CHUNKS).logits
    rounding = 0.02 if codec == "raw" else 0.1
    assert (in_place - reference).norm() < rounding * reference.norm()
    assert (in_place - full).norm() > 0.05 * full.norm()  # the chunks have not seen each other


def test_weights_that_changed_after_loading_are_another_model(checkpoint: Path) -> None:
    model: Any = load(checkpoint)
    before = fingerprint(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(number_type, "float32_is_faster", lambda dtype: True)
        to_fastest(model)
    assert (model.dtype, cache_dtype(model)) == (torch.float32, torch.bfloat16)
    assert fingerprint(model) == before
    assert fingerprint(copy.deepcopy(model)) == before
    with torch.no_grad():  # less than bfloat16 shows
        model.model.layers[2].mlp.up_proj.weight[0, 0] *= 1 + 2**-12
    assert fingerprint(model) != before


def test_what_is_not_converted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_type, "float32_is_faster", lambda dtype: True)
    mixed: Any = load(checkpoint)
    mixed.model.norm.float()
    assert to_fastest(mixed).model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    own: Any = load(checkpoint)  # a user's object
    engine = KVLinkEngine.from_pretrained((own, tiny.tokenizer()), store=MemoryStore())
    assert engine.model is own
    assert own.dtype == torch.bfloat16
    monkeypatch.setattr(number_type, "MEMORY", 0)  # it would not fit
    assert to_fastest(own).dtype == torch.bfloat16


def test_a_processor_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLINK_CACHE", str(tmp_path / "new"))
    measured: list[torch.dtype] = []

    def measure(dtype: torch.dtype) -> float:
        measured.append(dtype)
        return 3.5 if dtype == torch.bfloat16 else 0.5

    monkeypatch.setattr(number_type, "measure", measure)
    assert [float32_is_faster(torch.bfloat16) for _ in range(2)] == [True, True]
    assert [float32_is_faster(torch.float16) for _ in range(2)] == [False, False]
    assert measured == [torch.bfloat16, torch.float16]
    (file,) = (tmp_path / "new").iterdir()
    assert sorted(json.loads(file.read_text()).values()) == [0.5, 3.5]
    file.write_text("{")  # half a file, or not ours
    assert float32_is_faster(torch.bfloat16)
    assert len(measured) == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        float32_is_faster(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 4
    monkeypatch.setenv("KVLINK_CACHE", str(file / "below-a-file"))  # cannot be written
    assert float32_is_faster(torch.bfloat16)


def test_the_measurement_compares_the_types(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slow = [0.0], torch.bfloat16

    def linear(a: torch.Tensor, weight: torch.Tensor) -> None:
        assert a.dtype == weight.dtype
        now[0] += 4.0 if a.dtype == slow else 1.0

    monkeypatch.setattr(number_type.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert number_type.measure(torch.bfloat16) == pytest.approx(4)
    slow = torch.float32
    assert number_type.measure(torch.bfloat16) == pytest.approx(1 / 4)
