"""Tiny random models of real architectures, and the block-masked forward pass they are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvlink_rag import KVLinkEngine, PromptTemplate
from kvlink_rag.engine.prefill import Prefill
from kvlink_rag.store import open_store

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes as tokens, with chat marks and one tool mark that is not flagged special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Far larger than in real models, so that attention is sharp and a wrong mask or a wrong
    # rotation shows in the logits.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


HYBRID = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "llama-llama3": lambda: hf.LlamaConfig(
        **SIZES,
        **_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=512,
        ),
    ),
    "llama-linear": lambda: hf.LlamaConfig(**SIZES, **_rope(rope_type="linear", factor=4.0)),
    "llama-yarn": lambda: hf.LlamaConfig(
        **SIZES, **_rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=512)
    ),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=40),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen2-sliding": lambda: hf.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=40, layer_types=HYBRID
    ),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=24),
    "gemma2": lambda: hf.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=40, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=40, layer_types=HYBRID, query_pre_attn_scalar=16
    ),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "phi3-sliding": lambda: hf.Phi3Config(**SIZES, sliding_window=40),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "stablelm": lambda: hf.StableLmConfig(**SIZES),
    "phi": lambda: hf.PhiConfig(**SIZES),
    "smollm3": lambda: hf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0]),
}
STORE_OPTIONS = {"budget", "cache_after", "codec", "encryption_key", "ram_bytes", "remote"}
TAKES_MASK_BY_LAYER_TYPE = {"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"}


@cache
def model(name: str) -> hf.PreTrainedModel:
    """The random model of that name, float32; not to be changed."""
    torch.manual_seed(len(name))
    made = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # norms and biases of a new model are all ones and zeros
        for key, weight in made.named_parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn(weight.shape)
            if "lm_head" in key:
                weight *= 2
    return made


def engine(name: str = "llama", **options: Any) -> KVLinkEngine:
    """An engine over a tiny model: store in memory, `reuse`, unless told otherwise.

    Few words around the question, so that short sliding windows reach the chunks; and without an
    adapter chunks are encoded behind the prefix, since made-up documents have a token a byte here.
    """
    template = PromptTemplate(before="Read:\n", question="{question}")
    behind = {} if options.get("adapter") else {"encode_behind": "system"}
    options = {"prompt": template, "strategy": "reuse", **behind, **options}
    store = its_store(options)
    return KVLinkEngine.from_pretrained((model(name), tokenizer()), store=store, **options)


def its_store(options: dict[str, Any]) -> Any:
    """The store of an engine, and what is said to it, taken out of the engine's options."""
    said = {key: options.pop(key) for key in STORE_OPTIONS & options.keys()}
    store = options.pop("store", None)
    return open_store(store, **said) if said else store


@dataclass
class _Node:
    token: int
    position: int
    owner: int | None
    """None: part of the prompt proper; else the slot whose private copy this is."""


class Reference:
    """ONE ordinary forward pass with a 4-D mask, built from a prefill's segments alone.

    Each chunk is preceded by a private copy of what it was encoded behind, and each of its tokens
    that is recomputed later by a private copy of itself (the rest of the chunk was encoded with the
    first version of those).
    """

    def __init__(self, prefill: Prefill) -> None:
        self.model = prefill.model
        self.nodes: list[_Node] = []
        self.sees: list[list[int]] = []
        main: list[int] = []
        for segment in prefill.segments:
            ids = prefill.token_ids[segment.start : segment.stop]
            own: list[int] = []
            partly = segment.kind == "chunk" and len(segment.full_view) < len(ids)
            if partly:
                first = segment.start - len(segment.behind)
                for offset, token in enumerate(segment.behind):
                    own.append(self._add(token, first + offset, segment.slot, own))
            for offset, token in enumerate(ids):
                position, full = segment.start + offset, offset in segment.full_view
                if full and partly:
                    own.append(self._add(token, position, segment.slot, own))
                node = self._add(token, position, None, main if full else own)
                main.append(node)
                if not full:
                    own.append(node)
        self.main = main

    def _add(self, token: int, position: int, owner: int | None, sees: list[int]) -> int:
        self.nodes.append(_Node(token, position, owner))
        self.sees.append([*sees, len(self.nodes) - 1])
        return len(self.nodes) - 1

    def append(self, token: int) -> None:
        """One more token at the end that sees the whole prompt."""
        self.main.append(self._add(token, self.nodes[-1].position + 1, None, self.main))

    def mask(self, window: int | None) -> torch.Tensor:
        """Additive ``[1, 1, tokens, tokens]``."""
        size = len(self.nodes)
        seen = torch.zeros((size, size), dtype=torch.bool)
        for row, columns in enumerate(self.sees):
            seen[row, columns] = True
        if window is not None:
            positions = torch.tensor([node.position for node in self.nodes])
            seen &= positions[:, None] - positions[None] < window
        mask = torch.full((size, size), torch.finfo(self.model.dtype).min, dtype=self.model.dtype)
        return mask.masked_fill_(seen, 0.0)[None, None]

    def _inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[node.token for node in self.nodes]])}

    def logits(self) -> torch.Tensor:
        """Of the last token, ``[vocab]``."""
        return self.all_logits()[-1]

    def greedy(self, token_ids: list[int]) -> list[int]:
        """What it would say instead of each token of a continuation, given those before it."""
        for token in token_ids[:-1]:
            self.append(token)
        return [int(row.argmax()) for row in self.all_logits()[-len(token_ids) :]]

    @torch.inference_mode()
    def all_logits(self) -> torch.Tensor:
        """Of every token, ``[tokens, vocab]``."""
        config = self.model.config
        mask: Any = self.mask(getattr(config, "sliding_window", None))
        if config.model_type in TAKES_MASK_BY_LAYER_TYPE:
            mask = {"full_attention": self.mask(None), "sliding_attention": mask}
        return self.model(
            **self._inputs(),
            position_ids=torch.tensor([[node.position for node in self.nodes]]),
            attention_mask=mask,
            use_cache=False,
        ).logits[0]
