"""The model that an adapter was trained on, known again by its sizes and some of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvlink_rag.errors import AdapterError

SAME_WEIGHTS = 0.3
"""Relative difference of sampled weights up to which a model is taken for the same base model:
quantising to 4 bits makes about 0.08, another model about 1.4."""
_SAMPLES = 16
_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True, eq=False)
class BaseModel:
    """What an adapter was trained on.

    Attributes:
        name: for messages.
        sizes: entries of the configuration that have to be the same.
        sample: ``[values]`` float32, weights picked at fixed places.
    """

    name: str
    sizes: Mapping[str, Any]
    sample: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, name: str) -> BaseModel:
        """The description of a model."""
        config = model.config.get_text_config(decoder=True)
        sizes = {key: getattr(config, key, None) for key in _SIZES}
        return cls(name, sizes, _sample(model))

    def check(self, model: PreTrainedModel, adapter: str) -> None:
        """Refuse another model; the same one in another number type or quantised passes.

        Raises:
            AdapterError: sizes or weights differ.
        """
        other = BaseModel.of(model, model.config._name_or_path or type(model).__name__)
        trained = f"adapter {adapter!r} was trained for {self.name}"
        for key, size in self.sizes.items():
            if other.sizes.get(key) != size:
                raise AdapterError(
                    f"{trained} ({key} {size}), and the model has {key} {other.sizes.get(key)}: "
                    "load that model, or train an adapter for this one (kvlink train)"
                )
        difference = float("inf")
        if other.sample.shape == self.sample.shape:
            difference = float((other.sample - self.sample).norm() / self.sample.norm())
        if not difference <= SAME_WEIGHTS:
            raise AdapterError(
                f"{trained}, and the model has other weights (relative difference "
                f"{difference:.2f}): load that model, or train an adapter for this one"
            )


def _sample(model: PreTrainedModel) -> torch.Tensor:
    """A few values of every weight matrix of the base model, LoRA left out."""
    weights = {
        name.replace(".base_layer", ""): weight
        for name, weight in model.named_parameters()
        if weight.dim() >= 2 and "lora_" not in name
    }
    picked = []
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
        picked.append(flat[places.to(flat.device)].float().cpu())
    return torch.cat(picked)
