"""What cannot be right is refused when the engine is made; what differs gets other caches."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
import transformers as hf

from kvlink_rag import InputError, KVLinkEngine, UnsupportedModelError
from kvlink_rag.runners.transformers.architecture import fingerprint, inspect_model

SMALL = {k: v for k, v in tiny.SIZES.items() if k != "initializer_range"}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 320}

REFUSED = {
    "gpt2": (lambda: hf.GPT2Config(**GPT), "no rotary positions"),
    "bloom": (
        lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=320),
        "no rotary positions",
    ),
    "dynamic": (
        lambda: hf.LlamaConfig(**SMALL, **tiny._rope(rope_type="dynamic", factor=2.0)),
        "'dynamic' makes keys depend on the length",
    ),
    "longrope": (
        lambda: hf.Phi3Config(
            **SMALL,
            original_max_position_embeddings=2048,
            **tiny._rope(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8),
        ),
        "'longrope' makes keys depend on the length",
    ),
    "mamba": (
        lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=320),
        "recurrent or linear-attention",
    ),
    "jamba": (
        lambda: hf.JambaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=8, vocab_size=320,
            num_attention_heads=2, num_key_value_heads=2, num_experts=2, use_mamba_kernels=False,
        ),
        "recurrent or linear-attention",
    ),
    "cohere": (lambda: hf.CohereConfig(**SMALL), "are not those at position 0 rotated"),
    "deepseek": (
        lambda: hf.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=8, n_group=2,
            topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        ),
        "multi-head latent attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_name_reason_and_what_is_supported(name):
    config, reason = REFUSED[name]
    model = hf.AutoModelForCausalLM.from_config(config()).eval()
    model.config._name_or_path = f"some/{name}-model"
    with pytest.raises(UnsupportedModelError) as error:
        KVLinkEngine.from_pretrained((model, tiny.tokenizer()))
    message = str(error.value)
    assert f"some/{name}-model" in message
    assert reason in message
    assert "Supported are" in message
    assert "Llama" in message


def test_encoder_decoder_is_refused():
    config = hf.T5Config(
        d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=16, vocab_size=320,
        decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        inspect_model(hf.T5ForConditionalGeneration(config), "t5")


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        inspect_model(hf.LlamaModel(tiny.CONFIGS["llama"]()), "bare")


def test_chunked_attention_is_refused():
    model = copy.deepcopy(tiny.model("qwen2-sliding"))
    model.config.layer_types = ["chunked_attention", *tiny.HYBRID[1:]]
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        inspect_model(model, "chunked")


def test_learned_positions_beside_rope_are_found_by_measurement():
    """No structure tells of them: only running the tokens at two places does."""
    model = copy.deepcopy(tiny.model("llama"))
    inspect_model(model, "rope only")
    learned = torch.nn.Embedding(4096, 64)

    def add_positions(module, args, kwargs):
        kwargs["hidden_states"] = args[0] + learned(kwargs["position_ids"])
        return (), kwargs

    model.model.layers[0].register_forward_pre_hook(add_positions, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        inspect_model(model, "rope and learned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", {"is_causal": False}), ("gemma3", {"use_bidirectional_attention": True})],
)
def test_tokens_that_see_what_stands_behind_them_are_found_by_measurement(name, change, dtype):
    config = copy.deepcopy(tiny.model(name).config)
    config.update(change)
    model = hf.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with pytest.raises(UnsupportedModelError, match="depend on the tokens behind it"):
        inspect_model(model, name)


def test_weights_whose_package_is_missing_are_named(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"cannot be loaded here: .*(?i:hqq)") as error:
        KVLinkEngine.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_activations_that_are_quantised_together_are_refused():
    model = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(tiny.model("llama")), {torch.nn.Linear}, torch.qint8
    )
    with pytest.raises(UnsupportedModelError, match="quantised by what runs together"):
        inspect_model(model, "dynamic")


def test_a_compiled_model_is_refused_with_its_name():
    model = torch.compile(copy.deepcopy(tiny.model("llama")))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is compiled"):
        KVLinkEngine.from_pretrained((model, tiny.tokenizer()))


def test_a_model_that_cannot_be_moved_is_named(monkeypatch):
    model = copy.deepcopy(tiny.model("llama"))

    def offloaded(*_):
        raise RuntimeError("You can't move a model that has some modules offloaded to disk.")

    monkeypatch.setattr(model, "to", offloaded)
    with pytest.raises(InputError, match=r"LlamaForCausalLM .*'bfloat16'.*offloaded to disk"):
        KVLinkEngine.from_pretrained((model, tiny.tokenizer()), dtype="bfloat16")
    with pytest.raises(InputError, match="dtype 'int8' is no float type"):
        KVLinkEngine.from_pretrained((model, tiny.tokenizer()), dtype="int8")


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_supported_models_are_described(name):
    model = tiny.model(name)
    seen = inspect_model(model, name)
    assert seen.layers == 4
    assert seen.head_dim == seen.value_dim
    assert seen.bytes_per_token == 4 * seen.kv_heads * seen.head_dim * 2 * 4
    covered = [i for g in seen.groups for i in range(g.layers.start, g.layers.stop)]
    assert covered == [0, 1, 2, 3]


def test_frequencies_and_windows_of_each_layer():
    gemma = inspect_model(tiny.model("gemma3"), "gemma3")
    assert gemma.windows == (40, 40, None, 40)
    assert [(g.layers.start, g.layers.stop) for g in gemma.groups] == [(0, 2), (2, 3), (3, 4)]
    no_rope = inspect_model(tiny.model("smollm3"), "smollm3")
    assert [g.inv_freq is None for g in no_rope.groups] == [False, True, False, True]
    assert inspect_model(tiny.model("mistral"), "mistral").windows == (40,) * 4


def test_fingerprint_tells_models_apart():
    model = copy.deepcopy(tiny.model("llama"))
    prints = {fingerprint(model)}
    assert fingerprint(tiny.model("llama")) in prints  # a copy is the same model
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-6  # one weight of 100,000
    prints.add(fingerprint(model))
    model.config.rope_parameters["rope_theta"] = 20000.0
    prints.add(fingerprint(model))
    model.config.rms_norm_eps = 1e-3
    prints.add(fingerprint(model))
    prints.add(fingerprint(model.to(torch.bfloat16)))
    assert len(prints) == 5


def test_fingerprint_ignores_where_a_model_was_loaded_from():
    model = copy.deepcopy(tiny.model("llama"))
    before = fingerprint(model)
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    assert fingerprint(model) == before
