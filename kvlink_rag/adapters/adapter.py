"""Adapters: trained link tokens, and a LoRA that reads what they link.

Two kinds. A `whole-model` adapter (KVLink, arXiv 2502.16002) acts on every token, chunks included:
caches belong to it. A `cache-preserving` adapter leaves the base model alone for prefix and chunks
and acts only on link tokens, question and answer: the base model's caches stay valid, one store
serves the base model and any number of such adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlink_rag.adapters.base_model import BaseModel
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.adapters.lora import add_lora, lora_layers
from kvlink_rag.errors import AdapterError
from kvlink_rag.prompt.layout import EncodeBehind, PromptTemplate

AdapterKind = Literal["cache-preserving", "whole-model"]
SHARED: tuple[EncodeBehind, ...] = ("documents", "system")
"""What chunks are encoded behind that models without and with a cache-preserving adapter read."""
FORMAT = 1
SETTINGS = "kvlink.json"
LINKS = "links.safetensors"
LORA_CONFIG = "adapter_config.json"
LORA = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What peft puts before a weight's name in its files."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What training makes, and `link` needs.

    Args:
        kind: whether chunk caches are the base model's or the adapter's own.
        base: the model it was trained on; None fits any (a preset for published checkpoints).
        links: link tokens; None for an adapter that only tunes how reused chunks are read.
        lora_config: peft's configuration as a dictionary; None without LoRA.
        lora_weights: peft's weights by name.
        encode_behind: what chunks were encoded behind in training.
        prompt: the words around chunks and question in training.
        around: ids of special tokens of the model that stand right before the first of the linked
            chunks, and right behind the last one and its link tokens. Not part of `full`.
        notes: how it was trained, for people.
        name: where it came from.
    """

    kind: AdapterKind
    links: LinkTokens | None
    base: BaseModel | None = None
    lora_config: Mapping[str, Any] | None = None
    lora_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    encode_behind: EncodeBehind = "system"
    prompt: PromptTemplate = field(default_factory=PromptTemplate)
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    notes: Mapping[str, Any] = field(default_factory=dict)
    name: str = "in memory"

    def apply(
        self, model: PreTrainedModel, *, merge: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The model that encodes chunks, and the one that reads link tokens, question and answer.

        ``model`` itself is not changed; all share its weights in memory, except those that a
        LoRA is merged into.

        Args:
            merge: a cache-preserving LoRA too; a whole-model one always is.

        Raises:
            AdapterError: it was trained for another model, or its LoRA does not fit.
        """
        if self.base is not None:
            self.base.check(model, self.name)
        self._check_links(model)
        if self.lora_config is None:
            return model, model
        try:
            reader = add_lora(model, self.lora_config)
            self.load_lora(reader)
        except (ValueError, TypeError, RuntimeError) as error:
            raise AdapterError(
                f"the LoRA of adapter {self.name!r} does not fit the model ({error}): get it anew, "
                "or train an adapter for this model"
            ) from error
        if merge or self.kind == "whole-model":
            for layer in lora_layers(reader):
                layer.merge(safe_merge=True)  # into new weights: the shared ones stay as they are
        return (reader if self.kind == "whole-model" else model), reader

    def _check_links(self, model: PreTrainedModel) -> None:
        if self.links is None or self.links.embeddings is None:
            return
        table: Any = model.get_input_embeddings()
        hidden, width = table.weight.shape[1], self.links.embeddings.shape[1]
        if width != hidden or self.links.first_id < table.weight.shape[0]:
            raise AdapterError(
                f"the link tokens of adapter {self.name!r} (ids from {self.links.first_id}, size "
                f"{width}) do not fit the model (vocabulary {table.weight.shape[0]}, size "
                f"{hidden}): load the model it was trained for, or train an adapter for this one"
            )

    def check_vocabulary(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that lacks the special tokens of its own that the adapter needs.

        Special, because user text can never become one.

        Raises:
            AdapterError: an id is beyond the vocabulary, or that of another kind of token.
        """
        needed = [token for ids in self.around for token in ids]
        if self.links is not None and self.links.embeddings is None:
            needed += range(self.links.first_id, self.links.first_id + self.links.size)
        rows = model.config.get_text_config(decoder=True).vocab_size
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        wrong = [token for token in sorted(needed) if token >= rows or token not in special]
        if wrong:
            raise AdapterError(
                f"adapter {self.name!r} needs the special tokens {min(needed)} to {max(needed)} of "
                f"the model it was made for; this one has a vocabulary of {rows}, and token "
                f"{wrong[0]} is none of its special tokens: load the model that the adapter is for"
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that changes answers: weights, link tokens and settings."""
        settings = self._settings()
        del settings["notes"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode())
        config = None if self.lora_config is None else dict(self.lora_config)
        digest.update(json.dumps(config, sort_keys=True, default=_plain).encode())
        tensors = dict(self.lora_weights)
        if self.links is not None and self.links.embeddings is not None:
            tensors["links"] = self.links.embeddings
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def load_lora(self, reader: PreTrainedModel) -> None:
        """Give its weights to a LoRA of the same make.

        Raises:
            ValueError: some are missing, or too many.
            RuntimeError: some have other sizes.
        """
        from peft import set_peft_model_state_dict

        result: Any = set_peft_model_state_dict(reader, dict(self.lora_weights))
        missing = [key for key in result.missing_keys if "lora_" in key]
        if result.unexpected_keys or missing:
            raise ValueError(
                f"{len(result.unexpected_keys)} weights too many, {len(missing)} missing"
            )

    def save(self, folder: Path) -> None:
        """Write it: peft's own two files, and the link tokens beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        if self.links is not None and self.links.embeddings is not None:
            tensors["embeddings"] = self.links.embeddings.detach().cpu().contiguous()
        if self.base is not None:
            tensors["base_sample"] = self.base.sample
        save_file(tensors, folder / LINKS)
        if self.lora_config is not None:
            weights = {
                PEFT_PREFIX + k: w.detach().cpu().contiguous() for k, w in self.lora_weights.items()
            }
            save_file(weights, folder / LORA)
            text = json.dumps(dict(self.lora_config), indent=2, sort_keys=True, default=_plain)
            (folder / LORA_CONFIG).write_text(text + "\n", encoding="utf-8")
        else:
            (folder / LORA_CONFIG).unlink(missing_ok=True)
            (folder / LORA).unlink(missing_ok=True)
        text = json.dumps(self._settings(), indent=2, ensure_ascii=False, default=_plain)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        links = self.links and {
            "layout": self.links.layout,
            "count": self.links.count,
            "slots": self.links.slots,
            "first_id": self.links.first_id,
        }
        base = self.base and {"name": self.base.name, "sizes": dict(self.base.sizes)}
        prompt = {**vars(self.prompt), "options": dict(self.prompt.options)}
        return {
            "format": FORMAT,
            "kind": self.kind,
            "links": links,
            "base": base,
            "encode_behind": self.encode_behind,
            "prompt": prompt,
            "around": self.around,
            "notes": dict(self.notes),
        }


def _plain(value: Any) -> Any:
    """What JSON lacks: sets as sorted lists, enumerations by their value."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Sequence):
        return list(value)
    return getattr(value, "value", None) or str(value)


def reads_its_own(adapter: Adapter | None) -> bool:
    """Whether caches that were made without an adapter are of no use to it: its model is another,
    or it was trained for chunks that have not seen the prompt's prefix.
    """
    if adapter is None:
        return False
    return adapter.kind == "whole-model" or adapter.encode_behind not in SHARED


def kept_behind(
    adapter: Adapter | None, now: EncodeBehind, told: EncodeBehind | None
) -> EncodeBehind | None:
    """What chunks stay encoded behind when an engine takes an adapter, or none in its place, so
    that one store serves both; None leaves it to the adapter, or the default.

    Args:
        now: what the engine's chunks are encoded behind; ``told`` if somebody said so.
    """
    if told is not None and not (adapter and adapter.kind == "whole-model"):
        return told
    return now if now in SHARED and not reads_its_own(adapter) else None
