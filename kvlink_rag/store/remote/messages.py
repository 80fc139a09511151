"""What is said of a remote: where it is and what went wrong, never its credentials."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from kvlink_rag.errors import InputError
from kvlink_rag.store.remote.base import RemoteError, RemoteRefused, redacted

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
SECRET = re.compile(r"secret|password|token|key|credential|auth", re.IGNORECASE)


class Messages:
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
