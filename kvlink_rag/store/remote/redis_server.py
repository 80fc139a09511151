"""Chunk caches in Redis."""

from __future__ import annotations

import importlib
from typing import Any

from kvlink_rag.errors import InputError
from kvlink_rag.store.remote.base import CONNECT_S, needed
from kvlink_rag.store.remote.messages import Messages


class RedisRemote:
    """A :class:`Remote` in Redis: strings under ``kvlink:<key>``.

    Args:
        url: `redis://user:password@host:port/database`, or `rediss://` for TLS.
        ttl_s: objects are removed this long after they were written; None keeps them.
        connect_s: for connecting, and between two pieces of an answer.
        options: what ``redis.Redis.from_url`` takes.

    Raises:
        InputError: the URL is none of Redis, ``ttl_s`` is no int >= 1, or redis is not installed.
    """

    writable = True

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int | None = None,
        connect_s: float = CONNECT_S,
        **options: Any,
    ) -> None:
        if ttl_s is not None and (not isinstance(ttl_s, int) or ttl_s < 1):
            raise InputError(f"ttl_s is {ttl_s!r}: pass a whole number of seconds, or None")
        self._ttl_s = ttl_s
        self._messages = Messages(url, options)
        self._redis = redis = needed("redis", self.name)
        self._refusals = (redis.ResponseError, redis.DataError)
        retry = importlib.import_module("redis.retry").Retry(
            importlib.import_module("redis.backoff").NoBackoff(),
            1,  # a connection that was kept may have been closed since
            supported_errors=(redis.ConnectionError,),
        )
        limits = {"socket_timeout": connect_s, "socket_connect_timeout": connect_s, "retry": retry}
        try:
            self._client = redis.Redis.from_url(url, **{**limits, **options})
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self.name} cannot be used as a remote: {self._messages.told(error)}; write "
                "redis://host:port/database"
            ) from None

    @property
    def name(self) -> str:
        """The URL, without credentials."""
        return self._messages.name

    def read(self, key: str) -> bytes | None:
        """The object, or None when there is none.

        Raises:
            RemoteError, RemoteRefused
        """
        with self._messages.explained("read from", self._refusals):
            data: bytes | None = self._client.get(_name(key))
            return data

    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object.

        Raises:
            RemoteError, RemoteRefused
        """
        with self._messages.explained("write to", self._refusals):
            self._client.set(_name(key), data, ex=self._ttl_s)

    def delete(self, key: str) -> None:
        """Remove an object if it is there.

        Raises:
            RemoteError, RemoteRefused
        """
        with self._messages.explained("delete from", self._refusals):
            self._client.unlink(_name(key))

    def has(self, key: str) -> bool:
        """Whether there is such an object.

        Raises:
            RemoteError, RemoteRefused
        """
        with self._messages.explained("ask", self._refusals):
            return bool(self._client.exists(_name(key)))

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _name(key: str) -> str:
    return f"kvlink:{key}"
