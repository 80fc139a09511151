"""Random adapters for the tiny models, and the forward pass that answers with them are held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, get_args

import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import PreTrainedModel

from kvlink_rag import Adapter, KVLinkEngine, PromptTemplate
from kvlink_rag.adapters.adapter import AdapterKind
from kvlink_rag.adapters.base_model import BaseModel
from kvlink_rag.adapters.links import LinkLayout, LinkTokens
from kvlink_rag.adapters.lora import add_lora
from kvlink_rag.engine.prefill import Prefill

KINDS = get_args(AdapterKind)
LAYOUTS = get_args(LinkLayout)
PROMPT = PromptTemplate(before="Read:\n", question="{question}")
"""As in :func:`tiny.engine`."""


def links(
    name: str = "llama", layout: LinkLayout = "slot", *, count: int = 2, slots: int = 24, seed=0
) -> LinkTokens:
    """Random link tokens, about as long as the model's own embeddings; ids from its vocabulary's
    size on."""
    embedding = tiny.model(name).get_input_embeddings()
    size, generator = embedding.num_embeddings, torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        usual: torch.Tensor = embedding(torch.arange(size))
    made = LinkTokens(layout, count, size, slots if layout == "slot" else None)
    rows = torch.randn((made.size, usual.shape[1]), generator=generator) * float(usual.std())
    return LinkTokens(layout, count, size, made.slots, rows)


def lora_config(name: str = "llama", rank: int = 4) -> dict[str, Any]:
    """peft's settings for a LoRA on all linear layers of the decoder."""
    targets = {
        path.rpartition(".")[2]
        for path, module in tiny.model(name).get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(targets)).to_dict()


@cache
def _lora_shapes(name: str) -> dict[str, torch.Size]:
    state = get_peft_model_state_dict(add_lora(tiny.model(name), lora_config(name)))
    return {key: weight.shape for key, weight in state.items()}


def lora_weights(name: str = "llama", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random matrices whose products are half as large as the tiny models' own weights."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * (0.15 if "lora_A" in key else 0.12)
        for key, shape in _lora_shapes(name).items()
    }


def adapter(
    name: str = "llama",
    kind: AdapterKind = "cache-preserving",
    layout: LinkLayout | None = "slot",
    *,
    lora: bool = True,
    count: int = 2,
    slots: int = 24,
    seed: int = 0,
    **options: Any,
) -> Adapter:
    """A random adapter for :func:`tiny.model`; without link tokens if ``layout`` is None.

    Args:
        lora: False for link tokens alone.
        count, slots: link tokens for each slot, and slots (layout `slot`).
        options: other fields of :class:`kvlink_rag.Adapter`.
    """
    given: dict[str, Any] = {"prompt": PROMPT, **options}
    if lora:
        given |= {"lora_config": lora_config(name), "lora_weights": lora_weights(name, seed)}
    return Adapter(
        kind=kind,
        links=layout and links(name, layout, count=count, slots=slots, seed=seed),
        base=BaseModel.of(tiny.model(name), f"tiny {name}"),
        **given,
    )


def engine(name: str, trained: Adapter, **options: Any) -> KVLinkEngine:
    """:func:`tiny.engine` with an adapter; answers by `link` if it has link tokens."""
    options = {"strategy": "link" if trained.links else "reuse", **options}
    return tiny.engine(name, adapter=trained, **options)


class Reference(tiny.Reference):
    """:class:`tiny.Reference` with an adapter: the base model in ONE forward pass.

    Link tokens come in by the adapter's own tensor, and the LoRA is added by hooks, written out,
    times 0 or 1 for each token: 1 everywhere for a whole-model adapter, 1 for link tokens, question
    and answer for a cache-preserving one.
    """

    def __init__(self, prefill: Prefill, base: str | PreTrainedModel, trained: Adapter) -> None:
        super().__init__(prefill)
        self.model = tiny.model(base) if isinstance(base, str) else base
        self.trained = trained
        self.tuned = [trained.kind == "whole-model"] * len(self.nodes)
        for segment in prefill.segments:
            if segment.kind in ("link", "question"):
                for node in self.main[segment.start : segment.stop]:
                    self.tuned[node] = True

    def append(self, token: int) -> None:
        super().append(token)
        self.tuned.append(True)

    def _inputs(self) -> dict[str, torch.Tensor]:
        table = self.model.get_input_embeddings()
        return {
            "inputs_embeds": torch.stack([self._embed(n.token, table) for n in self.nodes])[None]
        }

    def _embed(self, token: int, table: Any) -> torch.Tensor:
        link = self.trained.links
        if link is not None and link.embeddings is not None and token >= table.num_embeddings:
            return link.embeddings[token - table.num_embeddings].float()
        return table(torch.tensor(token))

    def all_logits(self) -> torch.Tensor:
        with _lora(self.model, self.trained, torch.tensor(self.tuned, dtype=torch.float32)):
            return super().all_logits()


@contextmanager
def _lora(model: Any, trained: Adapter, tuned: torch.Tensor) -> Iterator[None]:
    """Add ``tuned * alpha / r * x A^T B^T`` to each layer's output; ``tuned``: ``[tokens]``."""
    if trained.lora_config is None:
        yield
        return
    scale = trained.lora_config["lora_alpha"] / trained.lora_config["r"]

    def add(a: torch.Tensor, b: torch.Tensor) -> Any:
        def hook(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out + tuned[None, :, None] * scale * (args[0] @ a.T.float() @ b.T.float())

        return hook

    with ExitStack() as stack:
        for key, a in trained.lora_weights.items():
            if key.endswith(".lora_A.weight"):
                b = trained.lora_weights[key.replace("lora_A", "lora_B")]
                layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
                stack.callback(layer.register_forward_hook(add(a, b)).remove)
        yield
