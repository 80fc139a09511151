"""A store never serves the caches of a model that computes something else, and always one's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from kvlink_rag import InputError, KVLinkEngine
from kvlink_rag.runners.transformers.identity import fingerprint

CHUNKS = ["Bees dance to tell others where flowers are.", "Ants follow trails of scent."]
QUESTION = "How do ants find their way?"


def engine(model: Any, store: Any) -> KVLinkEngine:
    return KVLinkEngine.from_pretrained((model, tiny.tokenizer()), store=store)


def with_adapters(*names: str) -> Any:
    """A tiny model with random LoRA adapters of these names; the first is active."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(copy.deepcopy(tiny.model("llama")), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.normal_(0, 0.3)
    return model.eval()


def check_others_caches_are_not_served(store: str, change: Any, model: Any) -> None:
    """Index with a model, change it, and hold a new engine to one that has a store of its own."""
    engine(model, store).index(CHUNKS, progress=False)
    change()
    shared, own = engine(model, store), engine(model, None)
    prefill = shared.prefill(QUESTION, CHUNKS)
    assert (prefill.report.hits, prefill.report.misses) == (0, 2)
    expected = own.prefill(QUESTION, CHUNKS)
    torch.testing.assert_close(prefill.logits, expected.logits, atol=1e-4, rtol=0)
    again = engine(model, store).prefill(QUESTION, CHUNKS)
    assert again.report.hits == 2  # what it stored is found by the next engine


def test_another_active_adapter(tmp_path):
    model = with_adapters("default", "two")
    check_others_caches_are_not_served(
        str(tmp_path / "kv"), lambda: model.set_adapter("two"), model
    )


def test_a_disabled_adapter(tmp_path):
    model = with_adapters("default")
    check_others_caches_are_not_served(
        str(tmp_path / "kv"), model.base_model.disable_adapter_layers, model
    )


def test_a_scaled_adapter(tmp_path):
    model = with_adapters("default")

    def halve() -> None:
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)

    check_others_caches_are_not_served(str(tmp_path / "kv"), halve, model)


def test_an_adapter_switched_under_a_living_engine(tmp_path):
    model = with_adapters("default", "two")
    made = engine(model, str(tmp_path / "kv"))
    made.index(CHUNKS, progress=False)
    before = made.answer(QUESTION, CHUNKS, max_new_tokens=4).token_ids
    model.set_adapter("two")
    for act in (lambda: made.answer(QUESTION, CHUNKS), lambda: made.index(["New."])):
        with pytest.raises(InputError, match="switched"):
            act()
    model.set_adapter("default")
    assert made.answer(QUESTION, CHUNKS, max_new_tokens=4).token_ids == before


def test_a_hook_that_changes_what_a_layer_says(tmp_path):
    model = copy.deepcopy(tiny.model("llama"))

    def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 1.5

    layer = model.model.layers[1].mlp.down_proj
    check_others_caches_are_not_served(
        str(tmp_path / "kv"), lambda: layer.register_forward_hook(hook), model
    )


def test_a_forward_put_in_front_of_the_class_own(tmp_path):
    model = copy.deepcopy(tiny.model("llama"))
    mlp = model.model.layers[0].mlp
    own = mlp.forward

    def change() -> None:
        mlp.forward = lambda x: own(x) * 0.5

    check_others_caches_are_not_served(str(tmp_path / "kv"), change, model)


class Packed(torch.nn.Module):
    """A linear layer whose weights are no parameter and no buffer, as quantised ones often are."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.packed = (weight,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed[0].T


def test_weights_outside_parameters_and_buffers(tmp_path):
    model = copy.deepcopy(tiny.model("llama"))
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.k_proj = Packed(layer.self_attn.k_proj.weight.detach().clone())

    def change() -> None:
        layers[2].self_attn.k_proj.packed[0].mul_(-1)

    check_others_caches_are_not_served(str(tmp_path / "kv"), change, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_is_no_part_of_an_identity(dtype):
    model = copy.deepcopy(tiny.model("llama")).to(dtype)
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output * 1.01)
    threads = torch.get_num_threads()
    prints = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            prints.add(fingerprint(model))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1


def test_rounding_of_another_processor_is_hardly_ever_another_identity():
    """A hook stands for it: noise a thousand times that of float32's rounding is told apart."""
    model = copy.deepcopy(tiny.model("llama"))
    noise = 0.0

    def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + noise * torch.randn(output.shape, generator=generator))

    model.model.layers[0].mlp.register_forward_hook(hook)
    prints: dict[float, set[str]] = {}
    for noise in (1e-7, 1e-2):
        prints[noise] = set()
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            prints[noise].add(fingerprint(model))
    assert len(prints[1e-7]) == 1
    assert len(prints[1e-2]) == 5


def counted(name: str) -> Any:
    """A tiny model whose weights are the same numbers on every processor."""
    model = copy.deepcopy(tiny.model(name))
    with torch.no_grad():
        for weight in model.parameters():
            numbers = torch.arange(weight.numel()) * 40503 % 65536
            weight.copy_((numbers.float() / 65536 - 0.5).view(weight.shape))
    return model


# What versions before this test computed: stores of that time are opened without a miss.
BEFORE = {
    "llama": "10e79e74079395c2",
    "gemma3": "aeff43197af429de",
    "llama-yarn": "72647040731dfe32",
}


@pytest.mark.parametrize("name", BEFORE)
def test_identities_of_plain_models_stay(name):
    assert fingerprint(counted(name))[:16] == BEFORE[name]
