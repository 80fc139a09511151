"""LoRA on a twin of a model that shares its weights; made by peft."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    """A twin of a model that shares its weights and has a new LoRA, made by peft."""
    from peft import LoraConfig, inject_adapter_in_model

    known = {k: v for k, v in config.items() if k in LoraConfig.__dataclass_fields__}
    twin = share_weights(model)
    inject_adapter_in_model(LoraConfig(**known), twin)  # in place
    twin.eval()
    return twin


def lora_layers(model: torch.nn.Module) -> Iterator[Any]:
    """peft's layers in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose weights are the same memory; the copies are frozen."""
    memo: dict[int, Any] = {id(p): _frozen(p) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    return twin


def _frozen(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.detach(), requires_grad=False)
