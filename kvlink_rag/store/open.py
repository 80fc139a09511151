"""A store from what a user names it by."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kvlink_rag.common.paths import cache_dir
from kvlink_rag.errors import InputError
from kvlink_rag.store.base import Budget, KVStore, check_cache_after
from kvlink_rag.store.encryption import EncryptionKey
from kvlink_rag.store.folder.store import FolderStore
from kvlink_rag.store.memory import MemoryStore
from kvlink_rag.store.one_pass import available
from kvlink_rag.store.ram import RamTier
from kvlink_rag.store.remote.base import URL, Remote, redacted
from kvlink_rag.store.remote.open import open_remote
from kvlink_rag.store.remote.tier import RemoteTier


def open_store(
    store: str | os.PathLike[str] | KVStore | None = None,
    ram_bytes: int = 0,
    *,
    codec: str | None = None,
    budget: Budget | int | None = None,
    encryption_key: EncryptionKey | None = None,
    remote: str | Remote | None = None,
    cache_after: int = 0,
) -> KVStore:
    """A store from what a user names it by, with all that can be said of a store.

    Args:
        store: a folder, made when it is not there; a URL, which is a remote behind a folder of its
            own in the user's cache folder; a store, returned as it is; None for one in memory.
        ram_bytes: of a folder: bytes of memory for copies of what was read last from it
            (:class:`RamTier`); 0 for none. Heeded for folders and URLs alone.
        codec: of a folder: what it keeps keys and values as, `raw`, `bf16`, `fp8`, `int8` or `int4`
            (:mod:`kvlink_rag.store.codec`); fixed when the folder is made. None takes the folder's,
            `int8` for a new one.
        budget: of a folder: most bytes of files that it may hold, or a :class:`Budget` with limits
            for documents and namespaces; what is worth least makes room. None leaves the folder's
            as it is, a new one without limit.
        encryption_key: of a folder: 16, 24 or 32 bytes, or what returns them, encrypts the chunk
            files of a new one and opens them later. None takes ``KVLINK_STORE_KEY`` of the
            environment for one that is encrypted, and encrypts no new one.
        remote: of a folder: what several machines share behind theirs (:class:`RemoteTier`): a URL
            such as `s3://bucket/kv`, whose credentials come from the environment, or an object made
            with credentials (:class:`FsspecRemote`, :class:`RedisRemote`).
        cache_after: of a folder, a URL or memory: 0 has caches stored when chunks are indexed, 1 by
            the first answer that retrieves a chunk, n by the n-th: a store for what is asked for.
            Said anew each time that the store is opened (:attr:`KVStore.cache_after`).

    Returns:
        the store; whoever opened it closes it.

    Raises:
        StoreError: the folder cannot be used.
        InputError: ``store`` is none of these; a number is no int >= 0; there is no such codec, or
            the store has another codec or key; something is said of a folder and ``store`` is none;
            the kind of URL is not known, or a package for it is missing.
    """
    if not isinstance(ram_bytes, int) or isinstance(ram_bytes, bool) or ram_bytes < 0:
        raise InputError(f"ram_bytes is {ram_bytes!r}: pass a number of bytes, or 0 for none")
    check_cache_after(cache_after)
    if codec == "auto":
        raise InputError(
            "codec 'auto' is measured with a model, and a store has none: "
            "KVIndex.open(..., codec='auto'), `kvlink index --codec auto`, or open_store(..., "
            "codec=choose_codec(engine).codec) with kvlink_rag.tuning.codec.choose_codec"
        )
    if isinstance(store, str) and not store.strip():
        raise InputError("store is an empty string: name a folder, or None for memory")
    if isinstance(store, str) and URL.match(store):
        if remote is not None:
            raise InputError(f"store is the URL {redacted(store)}: give a folder, and one remote")
        remote = open_remote(store)
        store = _folder_for(store)
    if isinstance(store, (str, os.PathLike)):
        found = None if remote is None else _behind(remote)  # before a folder is made
        folder = FolderStore(store, codec, budget, encryption_key, cache_after=cache_after)
        if folder.codec == "int8":
            available()  # compiled now, once a machine, and not within an answer
        tier: KVStore = folder if found is None else RemoteTier(folder, found)
        return RamTier(tier, ram_bytes) if ram_bytes else tier
    if store is None:
        store = MemoryStore(cache_after=cache_after)
    _check_has(store, KVStore, "store", "a folder, a KVStore or None")
    _check_said(store, codec, budget, encryption_key, remote, cache_after)
    return store


def _check_said(
    store: KVStore,
    codec: str | None,
    budget: Budget | int | None,
    encryption_key: EncryptionKey | None,
    remote: str | Remote | None,
    cache_after: int,
) -> None:
    """Refuse what is said of a folder when a store was given: it would be lost.

    Raises:
        InputError: something is, and the store does not have it already.
    """
    kind = type(store).__name__
    if budget is not None:
        raise InputError("budget is for a folder: name one as store, or set the store's own budget")
    if encryption_key is not None:
        raise InputError(f"encryption_key is for a folder, not for a {kind}: leave it out")
    if codec not in (None, store.codec):
        raise InputError(f"codec {codec!r} is for a folder: {kind} has {store.codec!r}")
    if remote is not None:
        raise InputError(f"remote is behind a folder, not a {kind}: name a folder as store")
    if cache_after not in (0, store.cache_after):
        raise InputError(
            f"cache_after {cache_after} is for a folder: this {kind} was opened with "
            f"{store.cache_after}; leave it out, or open the folder with it"
        )


def _behind(remote: str | Remote) -> Remote:
    if isinstance(remote, str):
        if not URL.match(remote):
            raise InputError(f"remote is {remote!r}: pass a URL such as s3://bucket/folder")
        return open_remote(remote)
    _check_has(remote, Remote, "remote", "a URL or a Remote")
    return remote


def _check_has(given: object, protocol: type, name: str, wanted: str) -> None:
    """Check that an object has all that a protocol asks for, by whatever way.

    ``isinstance`` looks no further than classes and ``__dict__`` since Python 3.12: an object that
    hands on what it is asked, by ``__getattr__``, would be refused.

    Raises:
        InputError: it has not.
    """
    members = [member for member in vars(protocol) if not member.startswith("_")]
    lacking = [member for member in members if not hasattr(given, member)]
    if lacking:
        lacks = "" if len(lacking) == len(members) else f" without {', '.join(lacking)}"
        raise InputError(f"{name} is a {type(given).__name__}{lacks}: pass {wanted}")


def _folder_for(url: str) -> Path:
    """The local folder of a URL: the same for all who may have other credentials."""
    name = hashlib.sha256(redacted(url).encode()).hexdigest()[:16]
    return cache_dir() / "remote" / name
