"""What the chunks of an index are encoded behind, so that whoever opens it finds their caches."""

from __future__ import annotations

from typing import cast

from kvlink_rag.adapters.adapter import Adapter, reads_its_own
from kvlink_rag.index.catalog import IndexCatalog
from kvlink_rag.prompt.layout import EncodeBehind

UNRECORDED: EncodeBehind = "system"
"""Of indexes made before it was recorded."""


def recorded_behind(catalog: IndexCatalog, adapter: Adapter | None) -> EncodeBehind | None:
    """What an index was made with; None leaves it to the engine: of an index that is new, and with
    an adapter that reads caches of its own.
    """
    nothing_added = not catalog.meta("embedding_dim")
    if nothing_added or reads_its_own(adapter):
        return None
    recorded = catalog.meta("encode_behind") or UNRECORDED
    return cast("EncodeBehind", recorded)


def behind_to_record(encode_behind: EncodeBehind, adapter: Adapter | None) -> dict[str, str]:
    """What to keep in the catalog when chunks were added."""
    return {} if reads_its_own(adapter) else {"encode_behind": encode_behind}
