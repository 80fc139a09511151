"""Link tokens: trained tokens behind chunks, which see everything before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from kvlink_rag.errors import InputError

LinkLayout = Literal["slot", "shared", "tail"]
"""Where link tokens stand: behind each chunk with embeddings of their own in each slot, behind each
chunk with the same embeddings everywhere, or all behind the last chunk."""


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
