"""Whose caches these are: a model's fingerprint, from what it holds and from what it computes.

Configuration and weights identify a model whose code is torch's and transformers' own. Where
something else has a say in what it computes (an adapter that can be switched, a hook, another
library's layer with weights of its own making), what it does compute is part of its identity too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import xxhash
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from kvlink_rag.runners.transformers.number_type import cache_dtype, in_cache_dtype

_IDENTITY_VERSION = 1
"""Of what a fingerprint is made of."""

# Config entries that do not change what a model computes.
_NOT_IDENTITY = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "architectures",
        "use_cache",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "problem_type",
        "initializer_range",
        "_attn_implementation",
        "attention_dropout",
        "quantization_config",
        "chunk_size_feed_forward",
    }
)

KNOWN_CODE = ("torch.nn.", "transformers.")
"""Modules whose layers compute nothing but what configuration, weights and buffers say."""

PROBED_LAYERS = 8
PROBED_NUMBERS = 16
"""Of the keys and of the values of each of these layers."""
GRID = 2**-5
"""What numbers are rounded to, in root mean squares of their layer: far above what rounding of
float32 does to them, so that another processor seldom changes a fingerprint (which costs caches
computed anew). What is computed otherwise shows if it moves the numbers by a hundredth; what acts
on other tokens than the fixed ones does not."""

AdapterState = tuple[tuple[Any, ...], ...]
"""Of each layer with adapters that can be switched: its name and what is switched on in it."""


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over configuration, RoPE, every weight and number type, and what is switched on.

    All bytes of all weights are read (xxh3, at memory speed), so that any other model, whether
    fine-tuned, quantised or merged with an adapter, gets other caches. A model whose adapters can
    be switched, or part of whose code or weights is none of torch's or transformers' own, is also
    told from others by its keys and values of a few fixed tokens.
    """
    weights = xxhash.xxh3_128()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    readable, kept = True, cache_dtype(model)
    for name in sorted(tensors):
        tensor = in_cache_dtype(tensors[name].detach(), kept)
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            readable = False  # of another make, and its bytes are its own business
            continue
        flat = tensor.cpu().contiguous().view(-1)
        if flat.numel():
            weights.update(flat.view(torch.uint8).numpy().data)
    identity: dict[str, Any] = {
        "format": _IDENTITY_VERSION,
        "class": type(model).__name__,
        "config": _identity(model.config.to_dict()),
        "dtype": str(kept),
        "weights": weights.hexdigest(),
    }
    adapters = adapter_state(model)
    if not (readable and _is_its_weights(model, adapters)):
        identity |= {"adapters": adapters, "computed": _computed(model)}
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _identity(v) for k, v in config.items() if k not in _NOT_IDENTITY}
    return config


def adapter_state(model: PreTrainedModel) -> AdapterState:
    """Which of peft's adapters are active, switched off, merged, and how strong, layer by layer."""
    return tuple(
        (
            name,
            bool(module._disable_adapters),
            tuple(_listed(getattr(module, "active_adapters", ()))),
            tuple(_listed(getattr(module, "merged_adapters", ()))),
            tuple(sorted((k, str(v)) for k, v in (getattr(module, "scaling", None) or {}).items())),
        )
        for name, module in model.named_modules()
        if hasattr(module, "_disable_adapters")
    )


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _is_its_weights(model: PreTrainedModel, adapters: AdapterState) -> bool:
    """Whether configuration, weights and buffers say all about what a model computes."""
    merged = all(  # the one adapter that there is has become part of the weights
        not off and len(active) == 1 and merged == active and len(scaling) == 1
        for _, off, active, merged, scaling in adapters
    )
    switched = {name for name, *_ in adapters}
    own = KNOWN_CODE if not adapters else (*KNOWN_CODE, "peft.")
    everywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    return (
        merged
        and not everywhere
        and all(
            _is_plain(module, own) for name, module in model.named_modules() if name not in switched
        )
    )


def _is_plain(module: torch.nn.Module, own: tuple[str, ...]) -> bool:
    """Whether a module's forward pass is that of its class, and its class is of known make."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    code = [type(module).forward, *hooks]
    if "forward" in vars(module):  # put in front of the class' own
        return False
    return all(f"{getattr(part, '__module__', '')}.".startswith(own) for part in code)


def _computed(model: PreTrainedModel) -> list[list[int]]:
    """Keys and values of a few fixed tokens at several layers, rounded.

    By one thread, whatever the process uses: how a sum is divided among threads changes its
    rounding.
    """
    with _one_thread():
        pairs = probe_cache(model, 0)
    last = len(pairs) - 1
    layers = sorted({round(i * last / (PROBED_LAYERS - 1)) for i in range(PROBED_LAYERS)})
    return [_rounded(tensor) for layer in layers for tensor in pairs[layer]]


def _rounded(tensor: torch.Tensor) -> list[int]:
    flat = tensor.detach().reshape(-1).cpu().double()
    step = GRID * float(flat.square().mean().sqrt())
    places = torch.linspace(0, flat.numel() - 1, PROBED_NUMBERS, dtype=torch.float64).long()
    if not step > 0:  # all zero, or not a number
        return [0] * PROBED_NUMBERS
    return [int(number) for number in (flat[places] / step).nan_to_num().round()]


@torch.inference_mode()
def probe_cache(
    model: PreTrainedModel, start: int, tokens: int = 7
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the keys and values of a few fixed tokens, the first of them at ``start``.

    Raises:
        what the model raises; ValueError where it keeps no keys and values of some layer.
    """
    vocabulary: int = cast("torch.Tensor", model.get_input_embeddings().weight).shape[0]
    token_ids = torch.arange(tokens, device=model.device)[None] * 31 % vocabulary
    cache = DynamicCache()
    positions = torch.arange(start, start + token_ids.shape[1], device=model.device)[None]
    model.get_decoder()(
        input_ids=token_ids, position_ids=positions, past_key_values=cache, use_cache=True
    )
    pairs = [(layer.keys, layer.values) for layer in cast("list[CacheLayerMixin]", cache.layers)]
    kept = [(k, v) for k, v in pairs if k is not None and v is not None and k.dim() == 4]
    if len(kept) != model.config.get_text_config(decoder=True).num_hidden_layers:
        raise ValueError("not every layer keeps keys and values of every token")
    return kept


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
