"""What every place that several machines share can do, and how its trouble is called.

A remote holds whole objects by chunk key: the files of a folder store as they are, encrypted or
not. Two come with the package: :class:`~kvlink_rag.store.remote.object_store.FsspecRemote` (object
storage, and any file system of fsspec) and
:class:`~kvlink_rag.store.remote.redis_server.RedisRemote`. Anybody's own needs the methods of
:class:`Remote` and nothing else.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from kvlink_rag.errors import InputError, StoreError

CONNECT_S = 5.0
"""Time to connect, and between two pieces of an answer."""
REDIS = ("redis", "rediss")
"""Schemes of URLs that name a Redis server."""
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
"""How a URL begins; what begins otherwise is a folder."""


class RemoteError(StoreError):
    """A remote cannot be reached, or does not answer in time."""


class RemoteRefused(RemoteError):
    """A remote answers, and will not do what it was asked for: no permission, no space."""


@runtime_checkable
class Remote(Protocol):
    """Whole objects by chunk key, as several machines see them.

    `read` and `has` change nothing. `write` and `delete` change the object under their key and no
    other. `close` changes no object, and no other call comes after it.

    Every call may be made again after any error: a key stands for its contents, so writing them
    twice does no harm, nor does deleting what is not there. After :class:`RemoteRefused` that is of
    no use until somebody has changed the permissions or made space. A `write` or `delete` that has
    failed may have been done all the same, or be done yet; no reader ever sees part of an object.

    Calls come from several threads at once, and from processes forked off the one that made the
    remote: it shares no connection with those. Each call ends after some time, successful or not.

    Nobody trusts an object: it is verified by the folder that takes it in.

    Raises:
        RemoteRefused: it is there, but will not do this.
        Exception: any other means that it cannot be reached.
    """

    @property
    def name(self) -> str:
        """What messages call it, without credentials. Asks nobody."""

    @property
    def writable(self) -> bool:
        """False where nothing can ever be written, nor deleted. Asks nobody."""

    def read(self, key: str) -> bytes | None:
        """The object, or None when there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object; readers see all of it or nothing."""

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""

    def has(self, key: str) -> bool:
        """Whether there is such an object, without reading it."""

    def close(self) -> None:
        """Let go of connections."""


def redacted(url: str) -> str:
    """A URL without user, password and query."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number: it may be a piece of a password
    except ValueError:
        return f"{url.partition('://')[0]}://***"
    host = parts.netloc.rpartition("@")[2]
    netloc = f"***@{host}" if "@" in parts.netloc else host
    return urlunsplit((parts.scheme, netloc, parts.path, "***" if parts.query else "", ""))


def needed(module: str, user: str) -> Any:
    """A module of the extra ``remote``.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{user} needs the package {module}: pip install 'kvlink-rag[remote]'"
        ) from error
