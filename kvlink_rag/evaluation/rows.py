"""The engines that rows answer with, and what identifies a row's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlink_rag.chunk import RAW, ChunkKV
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import AdapterRequiredError
from kvlink_rag.evaluation.items import digest_of
from kvlink_rag.evaluation.plan import Row
from kvlink_rag.store import KVStore
from kvlink_rag.store.codec import coded

FORMAT = 2
"""Version of how answers are made; part of every digest."""


class CodedStore:
    """A view of a store in memory: what a codec would give back of each cache.

    Caches are computed once for all codecs.
    """

    def __init__(self, store: KVStore, codec: str) -> None:
        self._store = store
        self._codec = codec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)  # among it the codec, so that keys are the same

    def get(self, key: str, within_s: float | None = None) -> ChunkKV | None:
        """The cache under ``key``, coded and decoded."""
        record = self._store.get(key, within_s)
        return record and coded(record, self._codec)


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
        trained = engine.adapter.encode_behind if engine.adapter else None
        if (behind := row.encode_behind or trained) is not None:
            engine = engine.with_encode_behind(behind)
        if row.codec != RAW:
            engine = engine.with_store(CodedStore(engine.store, row.codec))
        engines[row] = engine
    return engines


def row_digest(row: Row, engine: KVLinkEngine, base: KVLinkEngine) -> str:
    """Over everything about a row that its answers depend on; its name is not part of it."""
    linked = row.strategy in ("reuse", "recompute", "link")
    return digest_of(
        {
            "format": FORMAT,
            "model": base.fingerprint,
            "adapter": engine.adapter and engine.adapter.fingerprint,
            "strategy": row.strategy,
            "behind": engine.behind if linked else None,
            "recompute": row.anew,
            "prompt": _prompt(engine),
            **({} if row.codec == RAW else {"codec": row.codec}),
        }
    )


def context_key(row: Row, engine: KVLinkEngine) -> str:
    """Equal for rows that have the same in front of the question, and the same question.

    That is so for `full` with the bare model and all cache-preserving adapters, which leave the
    context to it. Link tokens are read by the adapter, and so is the question that chooses what is
    computed anew: such rows share with no other.
    """
    by_reader = row.strategy == "link" or (row.anew is not None and row.recompute_by == "question")
    return digest_of(
        {
            "row": row.name if by_reader else None,
            "model": engine.fingerprint,
            "strategy": row.strategy,
            "behind": engine.behind if row.strategy in ("reuse", "recompute") else None,
            "recompute": row.anew,
            "prompt": _prompt(engine),
            "codec": row.codec,
        }
    )


def _prompt(engine: KVLinkEngine) -> list[str]:
    return [str(vars(engine.layout.template)), str(engine.tokenizer.chat_template)]
