"""What is trained: LoRA and link tokens, on a frozen base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import kvlink_rag.training.attention as attention
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.adapters.lora import add_lora, lora_layers, share_weights
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.training.pack import IGNORED, Pack


class LinkModel(torch.nn.Module):
    """A reader with trainable LoRA and link tokens; its loss is that of the packs it is given.

    Args:
        model: the base model; stays as it is and shares its weights.
        architecture: its description.
        lora_config: peft's settings as a dictionary; None trains link tokens alone.
        links: link tokens, whose embeddings are the starting values; None without.

    Attributes:
        reader: the model with LoRA; weights of the LoRA are float32.
        link_embeddings: ``[tokens, hidden]`` float32, or None.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        lora_config: Mapping[str, Any] | None,
        links: LinkTokens | None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.reader = add_lora(model, lora_config) if lora_config else share_weights(model)
        self.reader.set_attn_implementation(attention.NAME)
        for layer in lora_layers(self.reader):
            layer.cast_input_dtype_enabled = False  # autocast does it
        for parameter in self.reader.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.links = links
        self.link_embeddings: torch.nn.Parameter | None = None
        if links is not None and links.embeddings is not None:
            self.link_embeddings = torch.nn.Parameter(links.embeddings.float().clone())

    def forward(self, packs: Sequence[Pack]) -> dict[str, torch.Tensor]:
        """The loss: cross-entropy, or divergence from a teacher, a mean over turns of means over
        their labels (long answers weigh no more than short ones).

        Returns:
            ``loss``, and ``logits`` ``[labels, vocab]``.
        """
        device = self.architecture.device
        token_ids = torch.tensor([[t for pack in packs for t in pack.token_ids]], device=device)
        positions = torch.tensor([[p for pack in packs for p in pack.positions]], device=device)
        labels = torch.tensor([label for pack in packs for label in pack.labels], device=device)
        places = (labels != IGNORED).nonzero()[:, 0]
        contexts = [pack.for_attention() for pack in packs]
        with attention.packed(attention.Batch(contexts, self.architecture.windows)):
            logits = self.reader(
                inputs_embeds=self._embed(token_ids),
                position_ids=positions,
                use_cache=False,
                logits_to_keep=places,
            ).logits[0]
        losses = self._losses(packs, logits.float(), labels[places])
        weights = [1 / count for pack in packs for count in pack.answers for _ in range(count)]
        turns = sum(len(pack.answers) for pack in packs)
        loss = (losses * torch.tensor(weights, device=device)).sum() / turns
        return {"loss": loss, "logits": logits}

    def autocast(self) -> torch.autocast:
        """Half precision as in training: off where the base model has full precision."""
        half = self.architecture.dtype != torch.float32
        return torch.autocast(self.architecture.device.type, self.architecture.dtype, enabled=half)

    @staticmethod
    def _losses(packs: Sequence[Pack], logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Each label's loss, ``[labels]``."""
        losses, start = [], 0
        for pack in packs:
            mine = slice(start, start + sum(pack.answers))
            loss = torch.zeros(sum(pack.answers), device=logits.device)
            if pack.distill < 1:
                loss = (1 - pack.distill) * F.cross_entropy(
                    logits[mine], labels[mine], reduction="none"
                )
            if pack.teacher is not None:
                own = logits[mine].log_softmax(-1)
                divergence = F.kl_div(own, pack.teacher.float(), reduction="none", log_target=True)
                loss = loss + pack.distill * divergence.sum(-1)
            losses.append(loss)
            start = mine.stop
        return torch.cat(losses)

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As inference does it, with the embeddings in training."""
        if self.links is not None:
            links = replace(self.links, embeddings=self.link_embeddings)
            return links.embed(token_ids, self.reader)
        table: Any = self.reader.get_input_embeddings()
        embedded: torch.Tensor = table(token_ids)
        return embedded
