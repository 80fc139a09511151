"""What a model must be like for chunk caches to be exact.

Two lines of defence. Structure: architectures whose keys depend on more than relative position
are refused by name. Measurement: a few tokens are run at two places of the prompt, and the keys
of every layer must come out as the same keys, rotated. A model that passes neither is refused when
the engine is made, never served wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.rope import RopeGroup, group_layers, rotate
from kvlink_rag.runners.transformers.attention import FOLDED_DTYPES
from kvlink_rag.runners.transformers.identity import fingerprint, probe_cache
from kvlink_rag.runners.transformers.number_type import cache_dtype

SUPPORTED = (
    "Supported are decoder-only transformers with rotary positions (RoPE default, linear, llama3 "
    "or yarn) and full or sliding-window attention, such as Llama, Mistral, Qwen2, Qwen3, Gemma 2, "
    "Gemma 3, Phi-3, OLMo 2, StableLM and SmolLM3."
)
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
MASKABLE = frozenset({"sdpa", "eager"})
"""Attention implementations of transformers that take an additive 4-D mask."""

DYNAMIC = ("torch.ao.nn.quantized.dynamic", "torch.nn.quantized.dynamic")
"""Where torch has modules that quantise what they are given."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """Sizes, positions and identity of a supported model.

    Attributes:
        name: for messages and reports.
        groups: layers by their RoPE frequencies.
        windows: per layer, the sliding window in tokens, or None for full attention.
        max_tokens: the longest prompt the model was made for.
        dtype: what it computes in.
        cache_dtype: what its caches are kept in.
        fingerprint: the model's identity (:mod:`kvlink_rag.runners.transformers.identity`).
        maskable: whether its attention takes a custom mask (`recompute` and `link` need one).
        foldable: whether its attention is plain grouped-query attention, on a CPU.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    groups: tuple[RopeGroup, ...]
    windows: tuple[int | None, ...]
    max_tokens: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    fingerprint: str
    maskable: bool
    foldable: bool

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values a cached token takes."""
        per_head = self.head_dim + self.value_dim
        return self.layers * self.kv_heads * per_head * self.cache_dtype.itemsize


def inspect_model(model: PreTrainedModel, name: str) -> Architecture:
    """Check that a model can be served exactly, and describe it.

    Raises:
        UnsupportedModelError: naming the model, the reason and what is supported.
    """
    _refuse_by_structure(model, name)
    config = model.config.get_text_config(decoder=True)
    windows = _windows(config, name)
    inv_freqs, keys, values = _probe(model, name)
    attention = getattr(model.config, "_attn_implementation", None)
    return Architecture(
        name=name,
        layers=len(inv_freqs),
        kv_heads=keys.shape[1],
        head_dim=keys.shape[3],
        value_dim=values.shape[3],
        groups=tuple(group_layers(inv_freqs)),
        windows=windows,
        max_tokens=int(getattr(config, "max_position_embeddings", None) or 2**31),
        dtype=keys.dtype,
        cache_dtype=cache_dtype(model),
        device=keys.device,
        fingerprint=fingerprint(model),
        maskable=attention in MASKABLE,
        foldable=attention == "sdpa" and keys.device.type == "cpu" and keys.dtype in FOLDED_DTYPES,
    )


def _refuse(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} cannot be served with chunk caches: {reason}. {SUPPORTED}"
    )


def _refuse_by_structure(model: PreTrainedModel, name: str) -> None:
    """Refuse what is known not to hold, with the reason in words."""
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", type(model).__name__)
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refuse(name, f"{kind} is an encoder-decoder model, its chunks are no prompt prefix")
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise _refuse(name, f"{type(model).__name__} has no language-model head")
    if _is_recurrent(model, config):
        raise _refuse(
            name,
            f"{kind} has recurrent or linear-attention layers, whose state cannot be cut by chunk",
        )
    if any(type(module).__module__.startswith(DYNAMIC) for module in model.modules()):
        raise _refuse(
            name,
            "its activations are quantised by what runs together (torch's dynamic quantisation), "
            "so a chunk's keys depend on its company",
        )
    if getattr(config, "kv_lora_rank", None):
        raise _refuse(name, f"{kind} compresses its keys (multi-head latent attention)")
    rotary = _frequencies(model)
    if not rotary:
        raise _refuse(
            name, f"{kind} has no rotary positions (learned, ALiBi or none), so keys cannot move"
        )
    for kind_of_rope in _rope_types(config):
        if kind_of_rope not in ROPE_TYPES:
            raise _refuse(
                name,
                f"its RoPE type {kind_of_rope!r} makes keys depend on the length of the prompt"
                if kind_of_rope in {"dynamic", "longrope", "su"}
                else f"its RoPE type {kind_of_rope!r} is not known to be relative",
            )


def _is_recurrent(model: PreTrainedModel, config: Any) -> bool:
    if getattr(model, "_is_stateful", False):
        return True
    names = " ".join(type(module).__name__.lower() for module in model.modules())
    words = ("mamba", "rwkv", "recurrent", "deltanet", "shortconv", "linearattention", "lightning")
    return any(word in names for word in words)


def _rope_types(config: Any) -> Iterable[str]:
    """The RoPE types of a configuration, one a kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for entry in nested or [parameters]:
        yield str(entry.get("rope_type") or entry.get("type") or "default")


def _frequencies(model: PreTrainedModel) -> list[torch.Tensor]:
    """Distinct ``inv_freq`` buffers of the decoder, ``[rotary_dim / 2]`` each."""
    found: list[torch.Tensor] = []
    for name, buffer in model.get_decoder().named_buffers():
        short = name.rsplit(".", 1)[-1]
        if not short.endswith("inv_freq") or "original" in short or buffer.dim() != 1:
            continue
        if not any(buffer.shape == other.shape and torch.equal(buffer, other) for other in found):
            found.append(buffer)
    return found


def _windows(config: Any, name: str) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * layers
    unknown = sorted(set(types) - LAYER_TYPES)
    if unknown:
        raise _refuse(
            name, f"its layers of type {', '.join(unknown)} are not attention over a window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@torch.inference_mode()
def _probe(
    model: PreTrainedModel, name: str
) -> tuple[list[torch.Tensor | None], torch.Tensor, torch.Tensor]:
    """Run the same tokens at two places and find, per layer, the rotation between their keys.

    Returns:
        per layer its frequencies (None: no RoPE), and one layer's keys and values
        ``[1, kv_heads, tokens, dim]``.
    """
    config = model.config.get_text_config(decoder=True)
    limit = int(getattr(config, "max_position_embeddings", None) or 2048)
    distance = max(min(limit - 16, 997), 1)
    near, far = (_probe_cache(model, name, start) for start in (0, distance))
    _check_causal(near, _probe_cache(model, name, 0, tokens=4), name, model.dtype)
    frequencies = _frequencies(model)
    found: list[torch.Tensor | None] = []
    tolerance = _tolerance(model.dtype)
    for layer, ((keys, values), (far_keys, far_values)) in enumerate(zip(near, far, strict=True)):
        positions = torch.full((keys.shape[2],), distance, device=keys.device)
        candidates: list[torch.Tensor | None] = [None, *frequencies]
        errors = [
            _difference(keys if freq is None else rotate(keys, positions, freq), far_keys)
            if freq is None or 2 * freq.shape[0] <= keys.shape[3]
            else float("inf")
            for freq in candidates
        ]
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] > tolerance or _difference(values, far_values) > tolerance:
            raise _refuse(
                name,
                f"the keys of layer {layer} at position {distance} are not those at position 0 "
                f"rotated (relative error {errors[best]:.2g})",
            )
        found.append(candidates[best])
    shapes = {(keys.shape, values.shape) for keys, values in near}
    if len(shapes) != 1:
        raise _refuse(name, "its layers have key-value heads of different sizes")
    return found, *near[0]


def _tolerance(dtype: torch.dtype) -> float:
    """Of relative differences."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


def _check_causal(
    whole: Sequence[tuple[torch.Tensor, torch.Tensor]],
    beginning: Sequence[tuple[torch.Tensor, torch.Tensor]],
    name: str,
    dtype: torch.dtype,
) -> None:
    """Refuse a model in which tokens see what stands behind them.

    Args:
        whole: keys and values of a text; ``beginning``: of its first tokens alone.
    """
    for layer, (pair, begun) in enumerate(zip(whole, beginning, strict=True)):
        for many, few in zip(pair, begun, strict=True):
            if _difference(many[:, :, : few.shape[2]], few) > _tolerance(dtype):
                raise _refuse(
                    name,
                    f"a token's keys in layer {layer} depend on the tokens behind it: its "
                    "attention is not causal",
                )


def _probe_cache(
    model: PreTrainedModel, name: str, start: int, **tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`probe_cache`, or a refusal."""
    try:
        return probe_cache(model, start, **tokens)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise _refuse(
            name, f"its forward pass does not take a cache and positions ({error})"
        ) from error


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
