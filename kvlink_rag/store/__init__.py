"""Where chunk caches are kept."""

from __future__ import annotations

import os
import re

from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store.base import KVStore, StoreCheck, StoreStat
from kvlink_rag.store.folder import FolderStore
from kvlink_rag.store.memory import MemoryStore

__all__ = ["FolderStore", "KVStore", "MemoryStore", "StoreCheck", "StoreStat", "open_store"]


def open_store(store: str | os.PathLike[str] | KVStore | None) -> KVStore:
    """A store from what a user names it by.

    Args:
        store: a folder, a store (returned as it is), or None for one in memory.

    Raises:
        StoreError: the folder cannot be used, or a URL is given.
        InputError: none of these.
    """
    if store is None:
        return MemoryStore()
    if isinstance(store, str) and re.match(r"[a-z][a-z0-9+.-]+://", store, re.IGNORECASE):
        raise StoreError(f"{store}: only folders are supported as stores in this version")
    if isinstance(store, str) and not store.strip():
        raise InputError("store is an empty string: name a folder, or None for memory")
    if isinstance(store, (str, os.PathLike)):
        return FolderStore(store)
    if isinstance(store, KVStore):
        return store
    raise InputError(f"store is a {type(store).__name__}: pass a folder, a KVStore or None")
