"""Adapters: trained link tokens, and a LoRA that reads what they link.

Two kinds. A `whole-model` adapter (KVLink, arXiv 2502.16002) acts on every token, chunks included:
caches belong to it. A `cache-preserving` adapter leaves the base model alone for prefix and chunks
and acts only on link tokens, question and answer: the base model's caches stay valid, one store
serves the base model and any number of such adapters.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlink_rag.errors import AdapterError, InputError
from kvlink_rag.prompt.layout import EncodeBehind, PromptTemplate

AdapterKind = Literal["cache-preserving", "whole-model"]
LinkLayout = Literal["slot", "shared", "tail"]
"""Where link tokens stand: behind each chunk with embeddings of their own in each slot, behind each
chunk with the same embeddings everywhere, or all behind the last chunk."""

FORMAT = 1
SETTINGS = "kvlink.json"
LINKS = "links.safetensors"
LORA_CONFIG = "adapter_config.json"
LORA = "adapter_model.safetensors"
_PEFT = "base_model.model."
"""What peft puts before a weight's name in its files."""
SHIPPED = Path(__file__).parent
"""Adapters that come with the package, a folder each."""

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
class LinkTokens:
    """The link tokens of a prompt.

    Args:
        layout: where they stand.
        count: tokens for each slot (`slot`, `shared`), or in all (`tail`).
        first_id: token id of the first one; the others follow, slot by slot.
        slots: chunks a prompt may have; None is any number. Only `slot` has a limit.
        embeddings: ``[tokens, hidden]``, those of ``first_id ...``; None when they are part of the
            model's vocabulary.
    """

    layout: LinkLayout
    count: int
    first_id: int
    slots: int | None = None
    embeddings: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Distinct link tokens."""
        return self.count * (self.slots or 1)

    def ids(self, slot: int, chunks: int) -> list[int]:
        """Ids of the link tokens right behind chunk ``slot`` of ``chunks``.

        Raises:
            InputError: more chunks than the adapter has slots for.
        """
        if self.layout == "tail" and slot != chunks - 1:
            return []
        if self.layout != "slot":
            return list(range(self.first_id, self.first_id + self.count))
        if self.slots is not None and slot >= self.slots:
            raise InputError(
                f"{chunks} chunks, and the adapter has link tokens for {self.slots}: use fewer, or "
                "strategy 'reuse', or an adapter with the layout 'shared'"
            )
        first = self.first_id + slot * self.count
        return list(range(first, first + self.count))

    def embed(self, token_ids: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
        """Input embeddings ``[..., hidden]`` of ids ``[...]``, link tokens among them."""
        table: Any = model.get_input_embeddings()
        if self.embeddings is None:
            return cast("torch.Tensor", table(token_ids))
        own = token_ids >= self.first_id
        embedded: torch.Tensor = table(token_ids.masked_fill(own, 0))
        rows = self.embeddings.to(embedded.device)[token_ids[own] - self.first_id]
        return embedded.index_put((own,), rows.to(embedded.dtype))


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
                _PEFT + k: w.detach().cpu().contiguous() for k, w in self.lora_weights.items()
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
        from kvlink_rag.adapters.presets import PRESETS

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
        lora_weights = {name.removeprefix(_PEFT): weight for name, weight in named.items()}
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


def _plain(value: Any) -> Any:
    """What JSON lacks: sets as sorted lists, enumerations by their value."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Sequence):
        return list(value)
    return getattr(value, "value", None) or str(value)
