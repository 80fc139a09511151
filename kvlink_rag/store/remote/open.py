"""Which remote a URL names."""

from __future__ import annotations

from urllib.parse import urlsplit

from kvlink_rag.store.remote.base import REDIS, Remote
from kvlink_rag.store.remote.object_store import FsspecRemote
from kvlink_rag.store.remote.redis_server import RedisRemote


def open_remote(url: str) -> Remote:
    """The remote that a URL names; credentials come from the environment or the URL.

    Nothing is connected to before the first call.

    Raises:
        InputError: no such kind of URL is known, or a package for it is missing.
    """
    scheme = urlsplit(url).scheme
    return RedisRemote(url) if scheme in REDIS else FsspecRemote(url)
