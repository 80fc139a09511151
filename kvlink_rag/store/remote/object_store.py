"""Chunk caches in object storage, or in any other file system that fsspec knows."""

from __future__ import annotations

import importlib
import os
import secrets
import selectors
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kvlink_rag.errors import InputError
from kvlink_rag.store.remote.base import CONNECT_S, REDIS, RemoteRefused, needed
from kvlink_rag.store.remote.messages import Messages

T = TypeVar("T")

TRANSFER_S = 60.0
"""Time for one whole object."""
S3 = ("s3", "s3a")
READ_ONLY = ("http", "https")
BUCKETS = frozenset({*S3, "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"})
WHOLE_AT_ONCE = frozenset({*BUCKETS, "memory"})
"""Schemes of file systems where an object is never seen in part; elsewhere it is renamed."""


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
        self._messages = Messages(url, options)
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
            _opened.add(files)
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


_opened: weakref.WeakSet[Any] = weakref.WeakSet()
_of_parent: list[object] = []


def _leave_to_parent() -> None:
    """Keep a forked process off the connections that its parent has open.

    One epoll of both processes watches them. To close them here, as a garbage collection does or
    the end of the process, would make the parent deaf to what comes on them; so this process' copy
    of their event loop watches nothing, and they are kept from collection.
    """
    for files in list(_opened):
        _of_parent.append(files)
        loop: Any = getattr(files, "_loop", None)  # fsspec refuses `loop` after a fork
        if hasattr(loop, "_selector"):
            loop._selector = selectors.SelectSelector()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
