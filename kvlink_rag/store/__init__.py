"""Where chunk caches are kept."""

from __future__ import annotations

import os
import re

from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store.base import KVStore, StoreCheck, StoreStat
from kvlink_rag.store.folder import FolderStore, is_store
from kvlink_rag.store.memory import MemoryStore
from kvlink_rag.store.ram import RamTier

__all__ = [
    "FolderStore",
    "KVStore",
    "MemoryStore",
    "RamTier",
    "StoreCheck",
    "StoreStat",
    "is_store",
    "open_store",
]


def open_store(
    store: str | os.PathLike[str] | KVStore | None, ram_bytes: int = 0, codec: str | None = None
) -> KVStore:
    """A store from what a user names it by.

    Args:
        store: a folder, a store (returned as it is), or None for one in memory.
        ram_bytes: memory for recently used caches of a folder (:class:`RamTier`); 0 for none.
        codec: of a folder (:class:`FolderStore`).

    Raises:
        StoreError: the folder cannot be used, or a URL is given.
        InputError: none of these, ``ram_bytes`` is no int >= 0, or the store has another codec.
    """
    if not isinstance(ram_bytes, int) or isinstance(ram_bytes, bool) or ram_bytes < 0:
        raise InputError(f"ram_bytes is {ram_bytes!r}: pass a number of bytes, or 0 for none")
    if store is None:
        store = MemoryStore()
    if isinstance(store, str) and re.match(r"[a-z][a-z0-9+.-]+://", store, re.IGNORECASE):
        raise StoreError(f"{store}: only folders are supported as stores in this version")
    if isinstance(store, str) and not store.strip():
        raise InputError("store is an empty string: name a folder, or None for memory")
    if isinstance(store, (str, os.PathLike)):
        folder = FolderStore(store, codec)
        return RamTier(folder, ram_bytes) if ram_bytes else folder
    if isinstance(store, KVStore):
        if codec not in (None, store.codec):
            raise InputError(
                f"codec {codec!r} is for a folder: {type(store).__name__} has {store.codec!r}"
            )
        return store
    raise InputError(f"store is a {type(store).__name__}: pass a folder, a KVStore or None")
