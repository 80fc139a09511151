"""Where chunk caches are kept."""

from __future__ import annotations

import os
import re

from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store.base import Budget, KVStore, StoreCheck, StoreStat, StoreUsage
from kvlink_rag.store.encryption import EncryptionKey, env_key
from kvlink_rag.store.folder import FolderStore
from kvlink_rag.store.memory import MemoryStore
from kvlink_rag.store.ram import RamTier

__all__ = [
    "Budget",
    "EncryptionKey",
    "FolderStore",
    "KVStore",
    "MemoryStore",
    "RamTier",
    "StoreCheck",
    "StoreStat",
    "StoreUsage",
    "env_key",
    "open_store",
]


def open_store(
    store: str | os.PathLike[str] | KVStore | None,
    ram_bytes: int = 0,
    codec: str | None = None,
    *,
    budget: Budget | int | None = None,
    encryption_key: EncryptionKey | None = None,
) -> KVStore:
    """A store from what a user names it by.

    Args:
        store: a folder, a store (returned as it is), or None for one in memory.
        ram_bytes: memory for recently used caches of a folder (:class:`RamTier`); 0 for none.
        codec, budget, encryption_key: of a folder (:class:`FolderStore`).

    Raises:
        StoreError: the folder cannot be used, or a URL is given.
        InputError: none of these, ``ram_bytes`` is no int >= 0, the store has another codec,
            or the key is not a folder's.
    """
    if not isinstance(ram_bytes, int) or isinstance(ram_bytes, bool) or ram_bytes < 0:
        raise InputError(f"ram_bytes is {ram_bytes!r}: pass a number of bytes, or 0 for none")
    if store is None:
        store = MemoryStore()
    if isinstance(store, str) and re.match(r"[a-z][a-z0-9+.-]+://", store, re.IGNORECASE):
        raise StoreError(f"{store}: only folders are supported as stores in this version")
    if isinstance(store, str) and not store.strip():
        raise InputError("store is an empty string: name a folder, or None for memory")
    if budget is not None and not isinstance(store, (str, os.PathLike)):
        raise InputError("budget is for a folder: name one as store, or set the store's own budget")
    if isinstance(store, (str, os.PathLike)):
        folder = FolderStore(store, codec, budget, encryption_key)
        return RamTier(folder, ram_bytes) if ram_bytes else folder
    if isinstance(store, KVStore):
        if encryption_key is not None:
            raise InputError(
                f"encryption_key is for a folder, not for a {type(store).__name__}: leave it out"
            )
        if codec not in (None, store.codec):
            raise InputError(
                f"codec {codec!r} is for a folder: {type(store).__name__} has {store.codec!r}"
            )
        return store
    raise InputError(f"store is a {type(store).__name__}: pass a folder, a KVStore or None")
