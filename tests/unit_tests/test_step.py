"""The compiled step, beside the same token run by torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import tiny_adapters
import torch
import transformers as hf
from peft import LoraConfig, inject_adapter_in_model

from kvlink_rag import KVLinkEngine
from kvlink_rag.adapters.lora import lora_layers
from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.runners.transformers import one_query
from kvlink_rag.runners.transformers.step import Step
from kvlink_rag.runners.transformers.step_weights import MAKES, StepWeights
from kvlink_rag.store import MemoryStore

QUESTION = "How tall is it?"
TEXTS = [
    "A chunk that is a good deal longer than any of the sliding windows of these models are.",
    "Bees dance to tell where flowers are.",
    "The tower is 330 m tall.",
]
STEPPED = [
    "llama", "llama-linear", "llama-llama3", "llama-yarn", "mistral", "phi3", "phi3-sliding",
    "qwen2", "qwen2-sliding", "qwen3", "smollm3",
]  # fmt: skip
TOLERANCE = 1e-4
OTHERS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "biases everywhere": lambda: hf.LlamaConfig(**tiny.SIZES, attention_bias=True, mlp_bias=True),
    "half of a head turns": lambda: hf.Phi3Config(
        **tiny.SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                       "partial_rotary_factor": 0.5}
    ),
    "tied head": lambda: hf.LlamaConfig(**tiny.SIZES, tie_word_embeddings=True),
    "windows by layer": lambda: hf.MinistralConfig(
        **tiny.SIZES, head_dim=16, sliding_window=40, layer_types=tiny.HYBRID
    ),
    "as many key heads as queries": lambda: hf.LlamaConfig(
        **{**tiny.SIZES, "num_key_value_heads": 4}
    ),
}  # fmt: skip


def fresh(config: hf.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of one's own, whose norms and biases are not all ones and zeros."""
    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn(weight.shape)
    return made.to(dtype)


def engine_of(model: Any) -> KVLinkEngine:
    return KVLinkEngine.from_pretrained(
        (model, tiny.tokenizer()), strategy="reuse", store=MemoryStore()
    )


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens that a step runs."""
    tokens: list[int] = []
    run = Step.run

    def counting(self: Step, context: Any, token_id: int) -> Any:
        logits = run(self, context, token_id)
        tokens.extend([token_id] * (logits is not None))
        return logits

    with monkeypatch.context() as patched:
        patched.setattr(Step, "run", counting)
        yield tokens


def compare(engine: KVLinkEngine, strategy: str = "reuse", tokens: int = 30) -> float:
    """The largest difference of logits, over tokens behind a prompt."""
    stepped, other = (
        engine.prefill(QUESTION, TEXTS, strategy=strategy, max_new_tokens=tokens + 1).state
        for _ in range(2)
    )
    assert stepped.stepped
    other.stepped = False
    pairs = [(stepped.run([id]), other.run([id])) for id in range(40, 40 + tokens)]
    assert all(float(logits.std()) > 0.1 for logits, _ in pairs)
    return max(float((found - expected).abs().max()) for found, expected in pairs)


def test_which_models_it_serves() -> None:
    served = [name for name in tiny.CONFIGS if tiny.engine(name).runner.stepped]
    assert sorted(served) == STEPPED
    assert {type(tiny.model(name)).__name__ for name in STEPPED} <= MAKES


@pytest.mark.parametrize("strategy", ["reuse", "recompute"])
@pytest.mark.parametrize("name", STEPPED)
def test_it_is_the_model(name: str, strategy: str) -> None:
    assert compare(tiny.engine(name), strategy) <= TOLERANCE


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_and_parts(name: str) -> None:
    assert compare(engine_of(fresh(OTHERS[name]()))) <= TOLERANCE


@pytest.mark.parametrize("layout", tiny_adapters.LAYOUTS)
@pytest.mark.parametrize("kind", tiny_adapters.KINDS)
def test_adapters(kind: Any, layout: Any) -> None:
    engine = tiny.engine("llama", adapter=tiny_adapters.adapter("llama", kind, layout))
    assert compare(engine, "link") <= TOLERANCE


@pytest.mark.parametrize("name", ["phi3", "qwen2", "qwen3"])
def test_a_lora_on_every_layer(name: str) -> None:
    engine = tiny.engine(name, adapter=tiny_adapters.adapter(name))
    assert compare(engine, "link") <= TOLERANCE
    bare = tiny.engine(name).prefill(QUESTION, TEXTS, max_new_tokens=2).state.run([40])
    tuned = engine.prefill(QUESTION, TEXTS, max_new_tokens=2).state.run([40])
    assert float((bare - tuned).abs().max()) > 0.1  # it does something


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compare(tiny.engine("qwen3"), tokens=8) <= TOLERANCE
    finally:
        torch.set_num_threads(before)


def test_in_half_precision_it_is_nearer_to_exact_numbers_than_torch() -> None:
    half = fresh(tiny.CONFIGS["qwen3"](), torch.bfloat16)
    exact = fresh(tiny.CONFIGS["qwen3"]())
    exact.load_state_dict(half.state_dict())
    engine = engine_of(half)
    expected = engine_of(exact).prefill(QUESTION, TEXTS, max_new_tokens=9).state
    stepped, other = (engine.prefill(QUESTION, TEXTS, max_new_tokens=9).state for _ in range(2))
    other.stepped = False
    off = {"step": 0.0, "torch": 0.0}
    for token in range(40, 48):
        truth = expected.run([token])
        off["step"] += float((stepped.run([token]) - truth).norm() / truth.norm())
        off["torch"] += float((other.run([token]) - truth).norm() / truth.norm())
    assert off["step"] < off["torch"] < 0.4 * 8, off


@pytest.mark.parametrize("name", STEPPED)
def test_answers_run_through_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine(name)
    engine.stop_ids = frozenset()
    with counted(monkeypatch) as tokens:
        found = engine.answer(QUESTION, TEXTS, max_new_tokens=24)
    assert tokens == found.token_ids[:-1]
    with monkeypatch.context() as patched:
        patched.setattr(one_query, "available", lambda: False)
        assert engine.answer(QUESTION, TEXTS, max_new_tokens=24).token_ids == found.token_ids


def test_beyond_the_room_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine()
    stepped, other = (engine.prefill(QUESTION, TEXTS, max_new_tokens=4).state for _ in range(2))
    other.stepped = False
    with counted(monkeypatch) as tokens:
        for token in range(40, 60):
            torch.testing.assert_close(
                stepped.run([token]), other.run([token]), atol=TOLERANCE, rtol=0
            )
    assert 0 < len(tokens) < 20


def test_weights_are_read_as_they_are_at_every_answer() -> None:
    model = fresh(tiny.CONFIGS["llama"]())
    engine = engine_of(model)
    before = engine.prefill(QUESTION, TEXTS, max_new_tokens=4).state.run([40])
    with torch.no_grad():
        head = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(head * 2)
    after = engine.prefill(QUESTION, TEXTS, max_new_tokens=4).state.run([40])
    torch.testing.assert_close(after, 2 * before)


def test_a_hook_of_later_is_run() -> None:
    model = fresh(tiny.CONFIGS["llama"]())
    engine = engine_of(model)
    assert engine.runner.stepped
    engine.stop_ids = frozenset()
    tokens: list[int] = []
    layer = model.get_decoder().layers[1]
    layer.register_forward_hook(lambda *its: tokens.append(its[2].shape[1]))
    engine.answer(QUESTION, TEXTS, max_new_tokens=4)
    assert tokens[-3:] == [1, 1, 1]


def test_without_numba_torch_runs_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.engine().answer(QUESTION, TEXTS, max_new_tokens=6).token_ids
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it fails
    monkeypatch.setattr(one_query, "_code", one_query._code.__wrapped__)  # asked anew
    engine = tiny.engine()
    assert not engine.runner.stepped
    assert engine.answer(QUESTION, TEXTS, max_new_tokens=6).token_ids == expected


class Scaled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_own_linear(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj = Scaled(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)


def with_own_forward(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def with_two_loras(model: Any) -> None:
    for name in ("one", "two"):
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, name)
    for layer in lora_layers(model):
        layer.set_adapter(["one", "two"])


def with_dora(model: Any) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], use_dora=True), model)


def in_training(model: Any) -> None:
    model.train()


def in_double(model: Any) -> None:
    model.double()


def with_norms_that_differ(model: Any) -> None:
    model.model.layers[2].input_layernorm.variance_epsilon = 1e-3


def with_another_activation(model: Any) -> None:
    model.model.layers[3].mlp.act_fn = torch.nn.GELU()


@pytest.mark.parametrize(
    "change",
    [
        with_hook, with_own_linear, with_own_forward, with_two_loras, with_dora, in_training,
        in_double, with_norms_that_differ, with_another_activation,
    ],
)  # fmt: skip
def test_what_computes_otherwise_is_left_to_torch(change: Callable[[Any], None]) -> None:
    model = fresh(tiny.CONFIGS["llama"]())
    StepWeights(model)  # it is served as it is
    change(model)
    model.train(change is in_training)
    with pytest.raises(UnsupportedModelError):
        StepWeights(model)


def test_another_class_is_left_to_torch() -> None:
    class LlamaForCausalLM(hf.LlamaForCausalLM):
        pass

    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is none of"):
        StepWeights(LlamaForCausalLM(tiny.CONFIGS["llama"]()).eval())


def test_a_lora_that_is_switched_off_or_merged() -> None:
    model = fresh(tiny.CONFIGS["llama"]())
    inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), model
    )
    model.eval()
    found = []
    for change in ("on", "off", "merged"):
        for layer in lora_layers(model):
            layer.enable_adapters(change != "off")
            if change == "merged":
                layer.merge()
        engine = engine_of(model)
        assert compare(engine, tokens=4) <= TOLERANCE
        found.append(engine.prefill(QUESTION, TEXTS, max_new_tokens=2).state.run([40]))
    torch.testing.assert_close(found[2], found[0], atol=1e-3, rtol=0)
    assert float((found[1] - found[0]).abs().max()) > 1e-2


def test_a_step_that_computes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda self, c, t: 1.01 * run(self, c, t))
    engine = tiny.engine("qwen3")
    assert not engine.runner.stepped
    assert not engine.prefill(QUESTION, TEXTS, max_new_tokens=2).state.stepped
