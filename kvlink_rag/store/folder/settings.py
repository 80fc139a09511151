"""What is fixed when a folder store is made: its codec, and whether it is encrypted.

``store.json`` has it: ``{"codec": ...}``, or ``{"encrypted": {"codec": ..., "check": ...}}``. A
plain folder of raw caches has none.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.chunk import RAW
from kvlink_rag.common.whole import write_whole
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.store.codec import check_codec
from kvlink_rag.store.encryption import Cipher, NotOpened, env_key
from kvlink_rag.store.folder.files import sync_folder

NAME = "store.json"


@dataclass(frozen=True)
class Settings:
    """The codec, and with encryption something sealed, to know the key by."""

    codec: str = RAW
    check: bytes | None = None

    @classmethod
    def made(cls, codec: str, cipher: Cipher | None) -> Settings:
        """For a folder with this codec, encrypted if there is a cipher."""
        check = None if cipher is None else b"".join(cipher.seal(b"", _bound(codec)))
        return cls(codec, check)

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Those of a folder.

        Raises:
            StoreError: the file is damaged.
            OSError: it cannot be read.
        """
        path = folder / NAME
        try:
            return _parsed(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f"cannot open the store {folder}: {path} names no codec ({error}); write what it "
                "was made with into it again, or use another folder"
            ) from error

    def write(self, folder: Path) -> None:
        """Make them a folder's, wholly and durably or not at all.

        Raises:
            OSError: as the operating system says.
        """
        told: dict[str, Any] = {"codec": self.codec}
        if self.check is not None:
            told = {"encrypted": {**told, "check": base64.b64encode(self.check).decode()}}
        write_whole(folder / NAME, json.dumps(told))
        sync_folder(folder)

    def cipher(self, folder: Path, given: Cipher | None) -> Cipher | None:
        """What opens the folder's files; None for a plain folder.

        Args:
            folder: named in errors.
            given: None takes ``KVLINK_STORE_KEY`` where the folder is encrypted.

        Raises:
            InputError: there is no key, it is the wrong one, or the folder is not encrypted.
        """
        if self.check is None:
            if given is not None:
                raise InputError(
                    f"the store {folder} was made without encryption: leave encryption_key out, or "
                    "use another folder"
                )
            return None
        try:
            cipher = Cipher(env_key) if given is None else given
        except InputError as error:
            raise InputError(f"the store {folder} is encrypted: {error}") from error
        try:
            cipher.open(self.check, _bound(self.codec))
        except NotOpened as error:
            raise InputError(
                f"the key is not that of the encrypted store {folder}: pass the one it was made "
                f"with (if it is, {folder / NAME} was changed)"
            ) from error
        return cipher


def _parsed(told: Any) -> Settings:
    if "encrypted" not in told:
        return Settings(check_codec(told["codec"]))
    sealed = told["encrypted"]
    return Settings(check_codec(sealed["codec"]), base64.b64decode(sealed["check"], validate=True))


def _bound(codec: str) -> str:
    return f"store {codec}"
