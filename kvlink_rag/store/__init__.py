"""Where chunk caches are kept."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from kvlink_rag.common.paths import cache_dir
from kvlink_rag.errors import InputError
from kvlink_rag.store.base import Budget, KVStore, StoreCheck, StoreStat, StoreUsage
from kvlink_rag.store.encryption import EncryptionKey, env_key
from kvlink_rag.store.folder.store import FolderStore, is_store
from kvlink_rag.store.memory import MemoryStore
from kvlink_rag.store.ram import RamTier
from kvlink_rag.store.remote.base import (
    FsspecRemote,
    RedisRemote,
    Remote,
    RemoteError,
    RemoteRefused,
    open_remote,
    redacted,
)
from kvlink_rag.store.remote.tier import RemoteTier

__all__ = [
    "Budget",
    "EncryptionKey",
    "FolderStore",
    "FsspecRemote",
    "KVStore",
    "MemoryStore",
    "RamTier",
    "RedisRemote",
    "Remote",
    "RemoteError",
    "RemoteRefused",
    "RemoteTier",
    "StoreCheck",
    "StoreStat",
    "StoreUsage",
    "env_key",
    "is_store",
    "open_store",
]

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def open_store(
    store: str | os.PathLike[str] | KVStore | None,
    ram_bytes: int = 0,
    codec: str | None = None,
    *,
    budget: Budget | int | None = None,
    encryption_key: EncryptionKey | None = None,
    remote: str | Remote | None = None,
) -> KVStore:
    """A store from what a user names it by.

    Args:
        store: a folder, a URL, a store (returned as it is), or None for one in memory. A URL is a
            remote (:mod:`kvlink_rag.store.remote`) behind a folder of its own in the user's
            cache folder.
        ram_bytes: memory for recently used caches of a folder (:class:`RamTier`); 0 for none.
        codec, budget, encryption_key: of a folder (:class:`FolderStore`).
        remote: of a folder (:class:`RemoteTier`): a URL, or an object made with credentials.

    Raises:
        StoreError: the folder cannot be used.
        InputError: none of these, ``ram_bytes`` is no int >= 0, the store has another codec or
            key, the kind of URL is not known, or a package for it is missing.
    """
    if not isinstance(ram_bytes, int) or isinstance(ram_bytes, bool) or ram_bytes < 0:
        raise InputError(f"ram_bytes is {ram_bytes!r}: pass a number of bytes, or 0 for none")
    if store is None:
        store = MemoryStore()
    if isinstance(store, str) and not store.strip():
        raise InputError("store is an empty string: name a folder, or None for memory")
    if isinstance(store, str) and URL.match(store):
        if remote is not None:
            raise InputError(f"store is the URL {redacted(store)}: give a folder, and one remote")
        remote = open_remote(store)
        store = _folder_for(store)
    if budget is not None and not isinstance(store, (str, os.PathLike)):
        raise InputError("budget is for a folder: name one as store, or set the store's own budget")
    if isinstance(store, (str, os.PathLike)):
        found = _behind(remote) if remote is not None else None  # before a folder is made
        folder = FolderStore(store, codec, budget, encryption_key)
        tier: KVStore = folder if found is None else RemoteTier(folder, found)
        return RamTier(tier, ram_bytes) if ram_bytes else tier
    if isinstance(store, KVStore):
        if encryption_key is not None:
            raise InputError(
                f"encryption_key is for a folder, not for a {type(store).__name__}: leave it out"
            )
        if codec not in (None, store.codec):
            raise InputError(
                f"codec {codec!r} is for a folder: {type(store).__name__} has {store.codec!r}"
            )
        if remote is not None:
            raise InputError(
                f"remote is behind a folder, not a {type(store).__name__}: name a folder as store"
            )
        return store
    raise InputError(f"store is a {type(store).__name__}: pass a folder, a KVStore or None")


def _behind(remote: str | Remote) -> Remote:
    if isinstance(remote, str):
        if not URL.match(remote):
            raise InputError(f"remote is {remote!r}: pass a URL such as s3://bucket/folder")
        return open_remote(remote)
    if not isinstance(remote, Remote):
        raise InputError(f"remote is a {type(remote).__name__}: pass a URL or a Remote")
    return remote


def _folder_for(url: str) -> Path:
    """The local folder of a URL: the same for all who may have other credentials."""
    name = hashlib.sha256(redacted(url).encode()).hexdigest()[:16]
    return cache_dir() / "remote" / name
