"""Loading a model and its tokenizer from whatever the user names it by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvlink_rag.common.text import one_line
from kvlink_rag.errors import InputError, UnsupportedModelError
from kvlink_rag.runners.transformers.models import load_gguf, not_found, resolve
from kvlink_rag.runners.transformers.number_type import to_fastest

Source = str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load(
    source: Source, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model (in evaluation mode, on its device), tokenizer and name.

    Raises:
        ModelNotFoundError: neither on disk nor to be fetched.
        UnsupportedModelError: it is no causal language model.
        InputError: a setting has no meaning.
    """
    if isinstance(source, tuple):
        return _in_memory(*source, device, dtype)
    place = resolve(str(source))
    if place.endswith(".gguf"):
        dense = torch.bfloat16 if dtype == "auto" else _dtype(dtype)
        model, tokenizer = load_gguf(Path(place), dense)
    else:
        number_type = "auto" if dtype == "auto" else _dtype(dtype)
        model, tokenizer = _from_pretrained(place, str(source), number_type)
    model = model.to(_device(device)).eval()
    if dtype == "auto":
        model = to_fastest(model)
    return model, tokenizer, str(source)


def _in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The user's own objects; `auto` leaves them where and as they are.

    Raises:
        UnsupportedModelError: it is compiled.
        InputError: it cannot be moved, or given another type.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            f"{type(model._orig_mod).__name__} is compiled (torch.compile), and runs as it was "
            "traced: give the model that was compiled"
        )
    module: torch.nn.Module = model
    try:
        if device != "auto":
            module.to(_device(device))
        if dtype != "auto":
            module.to(_dtype(dtype))
    except (RuntimeError, ValueError) as error:  # parts on disk, or quantised
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{type(model).__name__} cannot be moved to device {str(device)!r} or dtype "
            f"{str(dtype)!r} ({one_line(error)}): leave both out, or load it so"
        ) from error
    return model.eval(), tokenizer, model.config._name_or_path or type(model).__name__


def _from_pretrained(place: str, name: str, dtype: Any) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{name} is not a causal language model that transformers knows"
            ) from error
        raise not_found(name, error) from error
    except OSError as error:
        raise not_found(name, error) from error
    except (ImportError, RuntimeError) as error:  # such as a package for quantised weights
        raise UnsupportedModelError(f"{name} cannot be loaded here: {one_line(error)}") from error
    return model, tokenizer


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device {device!r} is unknown to torch: use 'auto', 'cpu' or 'cuda'"
        ) from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r} is no float type: use 'auto', 'bfloat16' or 'float32'")
    return found
