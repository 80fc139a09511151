"""Adapters by name: from a folder, from those that come with the package, from presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvlink_rag.adapters.adapter import (
    FORMAT,
    LINKS,
    LORA,
    LORA_CONFIG,
    PEFT_PREFIX,
    SETTINGS,
    Adapter,
    AdapterKind,
)
from kvlink_rag.adapters.base_model import BaseModel
from kvlink_rag.adapters.links import LinkLayout, LinkTokens
from kvlink_rag.adapters.presets import PRESETS
from kvlink_rag.errors import AdapterError
from kvlink_rag.prompt.layout import EncodeBehind, PromptTemplate

SHIPPED = Path(__file__).parent
"""Adapters that come with the package, a folder each."""


def load_adapter(source: str | Path | Adapter) -> Adapter:
    """An adapter from its folder, or by the name of one that comes with the package or a preset.

    Raises:
        AdapterError: there is none, or its files are damaged.
    """
    if isinstance(source, Adapter):
        return source
    folder = Path(source).expanduser()
    if not (folder / SETTINGS).is_file() and (SHIPPED / str(source) / SETTINGS).is_file():
        folder = SHIPPED / str(source)
    if not (folder / SETTINGS).is_file():
        if str(source) in PRESETS:
            return PRESETS[str(source)]
        known = ", ".join(shipped_adapters()) or "none"
        raise AdapterError(
            f"no adapter at {str(source)!r}: give the folder that kvlink train made, the name of "
            f"one that comes with kvlink_rag ({known}), or that of a preset for a published model "
            f"({', '.join(PRESETS)})"
        )
    try:
        return _read(folder, str(source))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(f"the adapter in {folder} is damaged ({error}): get it anew") from error


def shipped_adapters() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SETTINGS}"))


def _read(folder: Path, name: str) -> Adapter:
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if settings["format"] != FORMAT:
        raise ValueError(f"format {settings['format']}, this version reads {FORMAT}")
    if settings["kind"] not in get_args(AdapterKind):
        raise ValueError(f"kind {settings['kind']!r}")
    if settings["encode_behind"] not in get_args(EncodeBehind):
        raise ValueError(f"encode_behind {settings['encode_behind']!r}")
    tensors = load_file(folder / LINKS)
    links = _read_links(settings["links"], tensors.get("embeddings"))
    before, behind = settings.get("around", ((), ()))  # adapters without marks may leave it out
    base = settings["base"] and BaseModel(**settings["base"], sample=tensors["base_sample"])
    lora_config, lora_weights = None, {}
    if (folder / LORA_CONFIG).is_file():
        lora_config = dict(json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8")))
        named = load_file(folder / LORA)
        lora_weights = {name.removeprefix(PEFT_PREFIX): weight for name, weight in named.items()}
    return Adapter(
        kind=settings["kind"],
        links=links,
        base=base,
        lora_config=lora_config,
        lora_weights=lora_weights,
        encode_behind=settings["encode_behind"],
        prompt=PromptTemplate(**settings["prompt"]),
        around=(tuple(before), tuple(behind)),
        notes=settings["notes"],
        name=name,
    )


def _read_links(
    settings: dict[str, Any] | None, embeddings: torch.Tensor | None
) -> LinkTokens | None:
    if settings is None:
        return None
    links = LinkTokens(**settings, embeddings=embeddings)
    if links.layout not in get_args(LinkLayout):
        raise ValueError(f"layout {links.layout!r}")
    if embeddings is not None and embeddings.shape[0] != links.size:
        raise ValueError(f"{embeddings.shape[0]} embeddings for {links.size} link tokens")
    return links
