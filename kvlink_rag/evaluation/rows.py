"""The engines that rows answer with, and what identifies a row's answers."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from kvlink_rag.adapter import Adapter
from kvlink_rag.engine import KVLinkEngine
from kvlink_rag.errors import AdapterRequiredError
from kvlink_rag.evaluation.items import digest_of
from kvlink_rag.evaluation.plan import Row

FORMAT = 1
"""Version of how answers are made; part of every digest."""


def row_engines(base: KVLinkEngine, rows: Sequence[Row]) -> dict[Row, KVLinkEngine]:
    """An engine for each row. All share the store, and each adapter has one reader.

    Args:
        base: of the model without adapter.

    Raises:
        AdapterError: an adapter is missing or for another model.
        AdapterRequiredError: a row has strategy `link` and its adapter no link tokens.
    """
    made: dict[str | None, KVLinkEngine] = {None: base}
    engines = {}
    for row in rows:
        if row.adapter not in made:
            made[row.adapter] = base.with_adapter(row.adapter)
        engine = made[row.adapter]
        if row.strategy == "link" and (engine.adapter is None or engine.adapter.links is None):
            raise AdapterRequiredError(
                f"row {row.name!r}: adapter {row.adapter!r} has no link tokens, so strategy 'link' "
                "is not for it: use 'reuse' or 'full'"
            )
        if row.encode_behind is not None:
            engine = copy.copy(engine)
            engine.behind = tuple(engine.layout.behind(row.encode_behind))
        engines[row] = engine
    return engines


def row_digest(row: Row, engine: KVLinkEngine, base: KVLinkEngine) -> str:
    """Over everything about a row that its answers depend on; its name is not part of it."""
    linked = row.strategy in ("reuse", "recompute", "link")
    return digest_of(
        {
            "format": FORMAT,
            "model": base.fingerprint,
            "adapter": adapter_digest(engine.adapter),
            "strategy": row.strategy,
            "behind": engine.behind if linked else None,
            "recompute": row.recompute_tokens if row.strategy == "recompute" else None,
            "prompt": _prompt(engine),
        }
    )


def context_key(row: Row, engine: KVLinkEngine) -> str:
    """Equal for rows that have the same in front of the question, and the same question.

    That is so for `full` with the bare model and all cache-preserving adapters, which leave the
    context to it. Link tokens are read by the adapter, so `link` shares with no other row.
    """
    return digest_of(
        {
            "row": row.name if row.strategy == "link" else None,
            "model": engine.fingerprint,
            "strategy": row.strategy,
            "behind": engine.behind if row.strategy in ("reuse", "recompute") else None,
            "recompute": row.recompute_tokens if row.strategy == "recompute" else None,
            "prompt": _prompt(engine),
        }
    )


def _prompt(engine: KVLinkEngine) -> list[str]:
    return [str(vars(engine.layout.template)), str(engine.tokenizer.chat_template)]


def adapter_digest(adapter: Adapter | None) -> str | None:
    """SHA-256 over an adapter's kind, link tokens and weights; None without."""
    if adapter is None:
        return None
    links = adapter.links
    settings = {
        "kind": adapter.kind,
        "links": links and [links.layout, links.count, links.first_id, links.slots],
        "lora": dict(adapter.lora_config or {}),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode())
    tensors = dict(adapter.lora_weights)
    if links is not None and links.embeddings is not None:
        tensors["links"] = links.embeddings
    for name in sorted(tensors):
        weights = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {weights.dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(weights.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
