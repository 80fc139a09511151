"""Chunk caches sealed with a key (AES-GCM): who has the files but not the key reads nothing.

What is sealed: the whole of each chunk file, that is keys, values, token ids, the model's
fingerprint and how it is written. What is not: the catalog, which holds document ids, cache keys
(a digest over model and tokens: who guesses a text can confirm it), sizes, times and fingerprints;
and the codec. A file is bound to its cache's key: one that was changed, cut or given the name of
another does not open. On a remote a file's name is derived with the encryption key, so that those
who share one without sharing a key never meet. AES-GCM allows about four thousand million files
for one key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
from collections.abc import Callable

from kvlink_rag.errors import InputError

EncryptionKey = bytes | Callable[[], bytes]
"""16, 24 or 32 random bytes, or what fetches them (from a vault, say)."""

VARIABLE = "KVLINK_STORE_KEY"
SIZES = (16, 24, 32)
MAGIC = b"kvlseal1"
NONCE = 12
TAG = 16
LONGEST = 2**31 - 1 - TAG
"""Bytes that can be sealed at once."""


class NotOpened(ValueError):
    """Sealed data that a key does not open."""


class Cipher:
    """Seals and opens with one key.

    Raises:
        InputError: it is no key, or the package ``cryptography`` is not there.
    """

    def __init__(self, key: EncryptionKey) -> None:
        given = key() if callable(key) else key
        if not isinstance(given, bytes) or len(given) not in SIZES:  # never show the key itself
            size = f" of {len(given)} bytes" if isinstance(given, bytes) else ""
            raise InputError(
                f"encryption_key is a {type(given).__name__}{size}: pass 16, 24 or 32 random "
                "bytes, such as secrets.token_bytes(32), or a function that returns them"
            )
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise InputError(
                "an encrypted store needs the package cryptography: "
                "pip install 'kvlink-rag[encryption]'"
            ) from error
        self._aes = AESGCM(given)
        # another key than for sealing: what is told by names says nothing of it
        self._naming = hmac.digest(given, MAGIC + b"names", "sha256")

    def name(self, key: str) -> str:
        """What a cache is called where others may be that do not have the encryption key.

        As many hex digits, different for each encryption key: nobody takes it for his own, and who
        guesses a text cannot confirm it.
        """
        return hmac.digest(self._naming, key.encode(), "sha256").hex()

    def seal(self, data: bytes, bound: str) -> list[bytes]:
        """The parts of sealed data, one after the other.

        Args:
            data: what is sealed.
            bound: what it is; :meth:`open` needs the same.

        Raises:
            InputError: it is too long.
        """
        if len(data) > LONGEST:
            raise InputError(
                f"a chunk cache of {len(data)} bytes is too large for an encrypted store, which "
                f"takes {LONGEST}: use smaller chunks or a codec"
            )
        nonce = os.urandom(NONCE)
        return [MAGIC + nonce, self._aes.encrypt(nonce, data, _told(bound))]

    def open(self, sealed: bytes, bound: str) -> bytes:
        """What was sealed.

        Raises:
            NotOpened: another key or ``bound``, or changed since.
        """
        from cryptography.exceptions import InvalidTag

        head = len(MAGIC) + NONCE
        if not sealed.startswith(MAGIC) or not head + TAG <= len(sealed) <= head + LONGEST + TAG:
            raise NotOpened("it is no sealed file")
        nonce, body = sealed[len(MAGIC) : head], memoryview(sealed)[head:]
        try:
            return self._aes.decrypt(nonce, body, _told(bound))
        except InvalidTag as error:
            raise NotOpened(
                "the key does not open it: it was changed, or sealed as another file"
            ) from error


def _told(bound: str) -> bytes:
    return MAGIC + bound.encode("utf-8", "surrogatepass")


def env_key() -> bytes:
    """The key in the environment variable ``KVLINK_STORE_KEY``, in hex or base64.

    An encrypted folder is opened with it where no other is given. A new folder is encrypted with
    it only when asked to: ``FolderStore(path, encryption_key=env_key)``.

    Raises:
        InputError: it is not set, or holds no key.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        raise InputError(
            f"no encryption key: pass encryption_key, or set the environment variable {VARIABLE} "
            "to the key in hex or base64"
        )
    try:
        if re.fullmatch(r"[0-9a-fA-F]+", text) and len(text) // 2 in SIZES:
            return bytes.fromhex(text)
        key = base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{VARIABLE} holds no key: it is neither hex nor base64") from error
    if len(key) not in SIZES:
        raise InputError(f"{VARIABLE} holds {len(key)} bytes: a key has 16, 24 or 32")
    return key
