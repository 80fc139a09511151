"""Chunks (text) and chunk caches (token ids, keys, values), and the key that identifies a cache."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvlink_rag.common.text import valid
from kvlink_rag.errors import InputError
from kvlink_rag.rope import RopeGroup

FORMAT_VERSION = 2
"""Version of the chunk cache's meaning and layout; part of every key."""
RAW = "raw"
"""Name of the codec that keeps keys and values as they are."""


@dataclass(frozen=True)
class Chunk:
    """One retrievable text, as the model sees it.

    Args:
        text: the passage. Strings that look like special tokens stay text.
        id: who refers to the cache (a row of an index, a node, a file's part). Caches are released
            by this id; without one the text itself is the id.
        title: shown to the model before the text (see :mod:`kvlink_rag.prompt.layout`).
        metadata: carried along, never shown to the model, never part of the cache's key.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def document_id(self) -> str:
        """The id under which a store remembers this chunk's reference to its cache."""
        if self.id is not None:
            return self.id
        text = f"{self.title or ''}\0{self.text}"
        return "text-" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class ScoredChunk(Chunk):
    """A chunk found by a search; ``score`` is the cosine similarity to the question."""

    score: float = 0.0


def as_chunks(chunks: Iterable[str | Chunk]) -> list[Chunk]:
    """Strings and chunks as a list of chunks.

    Raises:
        InputError: a single string instead of a list, an item of another type, an empty text, or an
            id that is no valid Unicode. In texts U+FFFD stands for what is none.
    """
    if isinstance(chunks, (str, Chunk)):
        raise InputError("chunks must be a list of texts, not one text: pass [text]")
    result = []
    for place, item in enumerate(chunks):
        chunk = Chunk(item) if isinstance(item, str) else item
        if not isinstance(chunk, Chunk):
            raise InputError(
                f"chunk {place} is a {type(item).__name__}: chunks are str or kvlink_rag.Chunk"
            )
        if not isinstance(chunk.text, str):
            raise InputError(f"chunk {place}: text is a {type(chunk.text).__name__}, not a str")
        for name in ("title", "id"):
            value = getattr(chunk, name)
            if value is not None and not isinstance(value, str):
                kind = type(value).__name__
                raise InputError(f"chunk {place}: {name} {value!r} is a {kind}, not a str or None")
        if not chunk.text.strip():
            raise InputError(f"chunk {place} (id {chunk.id!r}) has no text: leave empty chunks out")
        result.append(_valid(chunk, place))
    return result


def _valid(chunk: Chunk, place: int) -> Chunk:
    """A chunk whose texts can be tokenised and stored, the same everywhere.

    Raises:
        InputError: its id cannot.
    """
    if chunk.id is not None and valid(chunk.id) != chunk.id:  # another one would be another's
        raise InputError(f"chunk {place}: id {chunk.id!r} is no valid Unicode: give it another")
    title = None if chunk.title is None else valid(chunk.title)
    text = valid(chunk.text)
    same = text is chunk.text and title is chunk.title
    return chunk if same else replace(chunk, text=text, title=title)


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """The KV cache of one chunk.

    Args:
        token_ids: the chunk's tokens, without what it was encoded behind.
        behind: tokens it was encoded behind, whose own keys are not part of the cache; empty when
            it was encoded alone.
        fingerprint: identity of the model that made it, as its runner says.
        keys: ``[layers, kv_heads, tokens, head_dim]`` at the positions where they were computed,
            ``position, position + 1, ...``, whatever prompt they become part of.
        values: ``[layers, kv_heads, tokens, value_dim]``.
        rope: how the keys are rotated; empty where that is not known, as after reading a file of
            raw keys that an older version wrote. A codec then takes them as they are.
        codec: what keys and values went through (:mod:`kvlink_rag.store.codec`).
    """

    token_ids: tuple[int, ...]
    behind: tuple[int, ...]
    fingerprint: str
    keys: torch.Tensor
    values: torch.Tensor
    rope: tuple[RopeGroup, ...] = ()
    codec: str = RAW

    @property
    def key(self) -> str:
        """Its identity."""
        return self.key_as(self.codec)

    def key_as(self, codec: str) -> str:
        """The key under which a store with a codec keeps it."""
        return chunk_key(self.fingerprint, self.behind, self.token_ids, codec)

    @property
    def position(self) -> int:
        """Of the first token, as the keys are rotated: right behind what it was encoded behind."""
        return len(self.behind)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys.dtype

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What it consists of, by name."""
        return {"keys": self.keys, "values": self.values}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, as they are kept."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def decoded(self) -> ChunkKV:
        """The same with its keys and values in memory: itself, unless it is a :class:`CodedKV`."""
        return self

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> ChunkKV:
        """The same made of copies of its tensors."""
        return replace(self, keys=copy(self.keys), values=copy(self.values))

    def is_for(self, fingerprint: str, behind: Sequence[int], token_ids: Sequence[int]) -> bool:
        """Whether this is the cache of exactly these tokens by exactly this model.

        A digest alone is never trusted: readers ask this before they use a cache.
        """
        tensors = self.tensors
        return (
            self.fingerprint == fingerprint
            and self.behind == tuple(behind)
            and self.token_ids == tuple(token_ids)
            and tensors["keys"].shape[2] == tensors["values"].shape[2] == len(self.token_ids)
        )


Tensors = Mapping[str, torch.Tensor]
Decode = Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]]


class CodedKV(ChunkKV):
    """The KV cache of one chunk, kept as a codec has written it.

    Attention that reads codes does so where they lie. Keys and values are made when they are asked
    for, and kept no longer than somebody holds what :meth:`decoded` gives.

    Args:
        token_ids, behind, fingerprint, rope, codec: as :class:`ChunkKV`.
        tensors: what the codec wrote, by name (:func:`kvlink_rag.store.codec.encode`).
        dtype: of keys and values.
        decode: gives keys and values for them.
    """

    def __init__(
        self,
        token_ids: tuple[int, ...],
        behind: tuple[int, ...],
        fingerprint: str,
        tensors: Tensors,
        rope: tuple[RopeGroup, ...],
        codec: str,
        dtype: torch.dtype,
        decode: Decode,
    ) -> None:
        own = {
            "token_ids": token_ids, "behind": behind, "fingerprint": fingerprint, "rope": rope,
            "codec": codec, "_tensors": tensors, "_dtype": dtype, "_decode": decode, "_made": None,
        }  # fmt: skip
        for name, value in own.items():
            object.__setattr__(self, name, value)  # it is frozen

    _tensors: Tensors
    _dtype: torch.dtype
    _decode: Decode
    _made: weakref.ref[ChunkKV] | None

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values when they are decoded."""
        return self._dtype

    @property
    def tensors(self) -> Tensors:
        """Codes, and what they are multiplied by and added to."""
        return self._tensors

    def decoded(self) -> ChunkKV:
        """With keys and values in memory; one for all who ask while somebody holds it."""
        made = self._made() if self._made is not None else None
        if made is None:
            keys, values = self._decode(self._tensors)
            made = ChunkKV(
                self.token_ids, self.behind, self.fingerprint, keys, values, self.rope, self.codec
            )
            object.__setattr__(self, "_made", weakref.ref(made))
        return made

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> CodedKV:
        """The same made of copies of its tensors."""
        return CodedKV(
            self.token_ids,
            self.behind,
            self.fingerprint,
            {name: copy(tensor) for name, tensor in self._tensors.items()},
            self.rope,
            self.codec,
            self._dtype,
            self._decode,
        )

    @property
    def keys(self) -> torch.Tensor:
        """As :class:`ChunkKV`, decoded now unless somebody holds them."""
        return self.decoded().keys

    @property
    def values(self) -> torch.Tensor:
        """As :attr:`keys`."""
        return self.decoded().values


def chunk_key(
    fingerprint: str, behind: Sequence[int], token_ids: Sequence[int], codec: str = RAW
) -> str:
    """SHA-256 (64 hex digits) over format, model, what the chunk is behind, its tokens, codec."""
    parts = [
        f"kvlink-rag {FORMAT_VERSION}",
        fingerprint,
        ",".join(map(str, behind)),
        ",".join(map(str, token_ids)),
    ]
    if codec != RAW:
        parts.append(codec)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
