"""Places that several machines share, as whole objects by chunk key: object stores, Redis."""

from __future__ import annotations

import errno
import importlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import unquote, urlsplit, urlunsplit

from kvlink_rag.errors import InputError, StoreError

T = TypeVar("T")

CONNECT_S = 5.0
"""Time to connect, and between two pieces of an answer."""
TRANSFER_S = 60.0
"""Time for one whole object."""
REDIS = ("redis", "rediss")
S3 = ("s3", "s3a")
READ_ONLY = ("http", "https")
BUCKETS = frozenset({*S3, "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"})
WHOLE_AT_ONCE = frozenset({*BUCKETS, "memory"})
"""Schemes of file systems where an object is never seen in part; elsewhere it is renamed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
SECRET = re.compile(r"secret|password|token|key|credential|auth", re.IGNORECASE)


class RemoteError(StoreError):
    """A remote cannot be reached, or does not answer in time."""


class RemoteRefused(RemoteError):
    """A remote answers, and will not do what it was asked for: no permission, no space."""


@runtime_checkable
class Remote(Protocol):
    """Whole objects by chunk key. Used by several threads; each call ends after some time.

    Raises:
        RemoteRefused: it is there, but will not do this.
        Exception: any other means that it cannot be reached.
    """

    @property
    def name(self) -> str:
        """What messages call it, without credentials."""

    @property
    def writable(self) -> bool:
        """False where nothing can ever be written."""

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


def open_remote(url: str) -> Remote:
    """The remote that a URL names; credentials come from the environment or the URL.

    Raises:
        InputError: no such kind of URL is known, or a package for it is missing.
    """
    scheme = urlsplit(url).scheme
    return RedisRemote(url) if scheme in REDIS else FsspecRemote(url)


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


class FsspecRemote:
    """A :class:`Remote` in any file system of fsspec: `s3://`, `gs://`, `file://`, `sftp://` ...

    Objects are ``<url>/<first 2 hex digits>/<key>.safetensors``. Over HTTP they can only be read.

    Args:
        url: of a folder, or of a bucket and the beginning of the objects' names.
        connect_s: for connecting, and between two pieces of an answer.
        transfer_s: for one whole object.
        options: what the file system takes: for S3 `key`, `secret`, `endpoint_url` ... (s3fs).

    Raises:
        InputError: no such kind of URL is known, or a package for it is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_s: float = CONNECT_S,
        transfer_s: float = TRANSFER_S,
        **options: Any,
    ) -> None:
        self._url, self._options = url, options
        self._connect_s, self._transfer_s = connect_s, transfer_s
        self._scheme = urlsplit(url).scheme
        self._messages = _Messages(url, options)
        self._opened: tuple[int, Any, str] | None = None  # process, file system, root
        self._check()

    @property
    def name(self) -> str:
        """The URL, without credentials."""
        return self._messages.name

    @property
    def writable(self) -> bool:
        """Not over HTTP."""
        return self._scheme not in READ_ONLY

    def read(self, key: str) -> bytes | None:
        """The object, or None when there is none.

        Raises:
            RemoteError, RemoteRefused
        """

        def read() -> bytes | None:
            files, path = self._path(key)
            try:
                data: bytes = files.cat_file(path)
                return data
            except FileNotFoundError:
                return None

        with self._messages.explained("read from"):
            return _within(self._transfer_s, read)

    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object, wholly or not at all.

        Raises:
            RemoteError, RemoteRefused
        """
        if not self.writable:
            raise RemoteRefused(f"cannot write to {self.name}: it can only be read")

        def write() -> None:
            files, path = self._path(key)
            if self._scheme in WHOLE_AT_ONCE:
                files.pipe_file(path, data)
                return
            files.makedirs(path.rpartition("/")[0], exist_ok=True)
            temporary = f"{path}.{secrets.token_hex(8)}.writing"
            try:
                files.pipe_file(temporary, data)
                files.mv(temporary, path)
            except BaseException:
                if files.exists(temporary):
                    files.rm_file(temporary)
                raise

        with self._messages.explained("write to", missing=RemoteRefused):
            _within(self._transfer_s, write)

    def delete(self, key: str) -> None:
        """Remove an object if it is there.

        Raises:
            RemoteError, RemoteRefused
        """

        def delete() -> None:
            files, path = self._path(key)
            try:
                files.rm_file(path)
            except FileNotFoundError:
                return

        with self._messages.explained("delete from"):
            _within(self._transfer_s, delete)

    def has(self, key: str) -> bool:
        """Whether there is such an object.

        Raises:
            RemoteError, RemoteRefused
        """

        def has() -> bool:
            files, path = self._path(key)
            return bool(files.exists(path))

        with self._messages.explained("ask"):
            return _within(2 * self._connect_s, has)

    def close(self) -> None:
        """Let go of the file system; fsspec closes its connections."""
        self._opened = None

    def _check(self) -> None:
        """Say now what no waiting mends; nothing is connected to."""
        fsspec = needed("fsspec", self.name)
        try:
            fsspec.get_filesystem_class(self._scheme)
        except ImportError as error:
            raise InputError(
                f"{self.name}: {self._scheme} needs a package that is not installed ({error}): "
                "pip install 'kvlink-rag[remote]' for s3, and what is named here for others"
            ) from error
        except ValueError as error:
            known = sorted({*fsspec.available_protocols(), *REDIS})
            raise InputError(
                f"{self.name}: no kind of URL is called {self._scheme!r}; known are "
                f"{', '.join(known)}"
            ) from error
        if self._scheme in BUCKETS | {*READ_ONLY} and not urlsplit(self._url).netloc:
            raise InputError(
                f"{self.name} names no bucket or host: write it as in s3://bucket/folder"
            )

    def _path(self, key: str) -> tuple[Any, str]:
        """The file system, as this process has it, and the object's path in it."""
        if self._opened is None or self._opened[0] != os.getpid():  # does not survive a fork
            fsspec = needed("fsspec", self.name)
            files, root = fsspec.url_to_fs(self._url, **self._all_options())
            if self._scheme in S3:
                files.retries = 1  # who calls tries again, and knows when not to
            self._opened = (os.getpid(), files, root.rstrip("/"))
        _, files, root = self._opened
        return files, f"{root}/{key[:2]}/{key}.safetensors"

    def _all_options(self) -> dict[str, Any]:
        options = {"use_listings_cache": False, **self._options}
        if self._scheme in S3:
            limits = {"connect_timeout": self._connect_s, "read_timeout": self._connect_s}
            config = {**limits, "retries": {"max_attempts": 0}, **options.get("config_kwargs", {})}
            options["config_kwargs"] = config
        elif self._scheme in READ_ONLY:
            timeout = importlib.import_module("aiohttp").ClientTimeout(
                total=self._transfer_s, sock_connect=self._connect_s, sock_read=self._connect_s
            )
            options["client_kwargs"] = {"timeout": timeout, **options.get("client_kwargs", {})}
        return options


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
        self._messages = _Messages(url, options)
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


class _Messages:
    """What is said of a remote: never its credentials.

    Args:
        url: may carry a user, a password and a query.
        options: may carry credentials under telling names.

    Raises:
        InputError: it is no URL.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.name = redacted(url)
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise InputError(
                f"{self.name} is no URL: write special characters of a password as %2F, and the "
                "port as a number"
            ) from None
        found = [parts.netloc.rpartition("@")[0], parts.query, *_values(options)]
        found += [part for user in found[:1] for part in user.split(":")]
        found += [part.partition("=")[2] for part in parts.query.split("&")]
        self._secrets = sorted({*found, *map(unquote, found)} - {""}, key=len, reverse=True)

    def told(self, error: BaseException) -> str:
        """An error in words."""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    @contextmanager
    def explained(
        self,
        doing: str,
        refusals: tuple[type[Exception], ...] = (PermissionError,),
        missing: type[RemoteError] = RemoteError,
    ) -> Iterator[None]:
        """Turn what the clients raise into RemoteError and RemoteRefused."""
        try:
            yield
        except Exception as error:  # each file system raises what its own client does
            kind = RemoteError
            if isinstance(error, refusals) or getattr(error, "errno", None) in FULL:
                kind = RemoteRefused
            elif isinstance(error, FileNotFoundError):
                kind = missing
            # without the cause, whose text may hold credentials
            raise kind(f"cannot {doing} {self.name}: {self.told(error)}") from None


def _values(options: Mapping[str, Any], secret: bool = False) -> Iterator[str]:
    """Strings in options whose name says that they are secret."""
    for name, value in options.items():
        hidden = secret or SECRET.search(str(name)) is not None
        if isinstance(value, Mapping):
            yield from _values(value, hidden)
        elif hidden and isinstance(value, (str, int)) and not isinstance(value, bool):
            yield str(value)


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


def _within(seconds: float, act: Callable[[], T]) -> T:
    """``act()`` in a thread of its own, which no caller and no end of the process waits for.

    Raises:
        TimeoutError: it takes longer; it is left to itself.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="kvlink-remote", daemon=True).start()
    return done.result(seconds)
