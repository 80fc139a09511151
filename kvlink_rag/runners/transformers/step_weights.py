"""A model's weights as the compiled step reads them, for models of a make that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.runners.transformers.part import DTYPES

MAKES = frozenset(
    {
        "LlamaForCausalLM",
        "MinistralForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    }
)
"""Classes of transformers whose layers are attention and a gated linear unit, each behind a root
mean square norm and added to the residual stream."""


class StepWeights:
    """Where a model's weights are, as they are now.

    Args:
        model: hold its lock.

    Attributes:
        layers: ``[layers + 1, LAYER_FIELDS]`` int64 of :mod:`.step_kernel`, norms filled in.
        linears: ``[7 * layers + 1, LINEAR_FIELDS]`` int64.
        rank: the highest of a LoRA.
        numbers: what norms add to the variance, and what scores are multiplied by, float32.

    Raises:
        UnsupportedModelError: it is of another make, or something in it computes otherwise.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from kvlink_rag.runners.transformers import step_kernel as k

        _check_make(model)
        self._kept: list[torch.Tensor] = []  # what the addresses belong to
        self._rows: list[tuple[int, ...]] = []
        self._epsilons: set[float] = set()
        self.rank = 0
        decoder: Any = model.get_decoder()
        self.layers = np.zeros((len(decoder.layers) + 1, k.LAYER_FIELDS), dtype=np.int64)
        for row, layer in zip(self.layers, decoder.layers, strict=False):
            for module, part in _linear_layers(layer):
                self._add_linear(module, part)
            activation = getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn
            if type(activation).__name__ not in ("SiLU", "SiLUActivation"):
                raise UnsupportedModelError(f"its activation is {type(activation).__name__}")
            row[k.BEFORE_ATTENTION] = self._norm(layer.input_layernorm)
            row[k.BEFORE_MLP] = self._norm(layer.post_attention_layernorm)
            if hasattr(layer.self_attn, "q_norm"):
                row[k.QUERY_NORM] = self._norm(layer.self_attn.q_norm)
                row[k.KEY_NORM] = self._norm(layer.self_attn.k_norm)
        self.layers[-1, k.BEFORE_ATTENTION] = self._norm(decoder.norm)
        self._add_linear(cast("torch.nn.Module", model.get_output_embeddings()))
        self.linears = np.array(self._rows, dtype=np.int64)
        scales = {float(layer.self_attn.scaling) for layer in decoder.layers}
        if len(scales) > 1 or len(self._epsilons) > 1:
            raise UnsupportedModelError("its layers differ in their norms or scores")
        self.numbers = np.array([*self._epsilons, *scales], dtype=np.float32)

    def _add_linear(self, module: torch.nn.Module, part: slice = slice(None)) -> None:
        """A linear layer, with peft's LoRA or without, or some of its rows."""
        base: Any = getattr(module, "base_layer", module)
        if type(base) is not torch.nn.Linear:
            raise UnsupportedModelError(f"{type(base).__name__} is no plain linear layer")
        bias = 0 if base.bias is None else self._address(base.bias[part].float())
        weight = base.weight[part]
        lora = (0, 0, 0, 0, 0)
        if base is not module and (found := _lora(module)):
            small, large, scaling = found
            lora = (
                len(small), self._address(small), self._address(large[part].to(small.dtype)),
                int(small.dtype == torch.bfloat16), self._address(torch.tensor([scaling])),
            )  # fmt: skip
            self.rank = max(self.rank, len(small))
        half = int(weight.dtype == torch.bfloat16)
        self._rows.append((self._address(weight), *weight.shape, half, bias, *lora))

    def _norm(self, module: Any) -> int:
        self._epsilons.add(float(module.variance_epsilon))
        return self._address(module.weight.float())

    def _address(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach()
        plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
        if not (plain and tensor.dtype in DTYPES and tensor.is_contiguous()):
            raise UnsupportedModelError(f"weights are {tensor.dtype} on {tensor.device}")
        self._kept.append(tensor)
        return tensor.data_ptr()


def _linear_layers(layer: Any) -> Iterator[tuple[Any, slice]]:
    """The seven of a decoder layer, in the kernel's order; some are rows of a larger one."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        dim, config = attention.head_dim, attention.config
        stops = [config.num_attention_heads * dim, config.num_key_value_heads * dim]
        stops = [stops[0], stops[0] + stops[1], stops[0] + 2 * stops[1]]
        for start, stop in zip([0, *stops], stops, strict=False):
            yield attention.qkv_proj, slice(start, stop)
    else:
        yield from ((each, slice(None)) for each in (attention.q_proj, attention.k_proj))
        yield attention.v_proj, slice(None)
    yield attention.o_proj, slice(None)
    if hasattr(mlp, "gate_up_proj"):
        size = mlp.config.intermediate_size
        yield mlp.gate_up_proj, slice(0, size)
        yield mlp.gate_up_proj, slice(size, 2 * size)
    else:
        yield from ((each, slice(None)) for each in (mlp.gate_proj, mlp.up_proj))
    yield mlp.down_proj, slice(None)


def _lora(module: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """What is active of a layer of peft's: ``[rank, columns]``, ``[rows, rank]``, and the factor.

    Raises:
        UnsupportedModelError: it is no LoRA, or more than one.
    """
    from peft.tuners.lora import Linear

    if type(module) is not Linear:
        raise UnsupportedModelError(f"{type(module).__name__} is no plain LoRA")
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return None
    if len(active) > 1 or module.lora_variant or module.lora_bias[active[0]]:
        raise UnsupportedModelError("a LoRA of another kind, or more than one")
    (name,) = active
    small: Any = module.lora_A[name]
    large: Any = module.lora_B[name]
    return small.weight.detach(), large.weight.detach(), float(module.scaling[name])


def _check_make(model: PreTrainedModel) -> None:
    """Refuse what may compute otherwise than the classes of :data:`MAKES` say."""
    kind = type(model)
    if kind.__name__ not in MAKES or not kind.__module__.startswith("transformers.models."):
        raise UnsupportedModelError(f"{kind.__name__} is none of {', '.join(sorted(MAKES))}")
    hooks = bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
    for module in model.modules():
        hooks |= bool(module._forward_hooks or module._forward_pre_hooks)
        if "forward" in vars(module) or not type(module).__module__.startswith(
            ("torch.nn.modules.", "peft.tuners.lora.", kind.__module__, "transformers.activations")
        ):
            raise UnsupportedModelError(f"{type(module).__name__} is not of its make")
    if hooks or model.training:
        raise UnsupportedModelError("it has hooks, or is in training")
