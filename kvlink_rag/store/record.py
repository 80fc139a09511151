"""One chunk cache as one safetensors file, with a checksum over everything that gives it meaning.

Reading maps the file: the tensors are views of its pages (a private mapping: changing a tensor
never changes the file), and the checksum runs over the same pages, so a cache costs one pass over
its bytes and no copy.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, deserialize, safe_open

from kvlink_rag.chunk import FORMAT_VERSION, RAW, ChunkKV, CodedKV, chunk_key
from kvlink_rag.errors import InputError
from kvlink_rag.store.codec import (
    READABLE,
    channels,
    codec_for,
    decode,
    encode,
    tensor_names,
)
from kvlink_rag.store.encryption import Cipher, NotOpened
from kvlink_rag.store.layout import (
    FLOATS,
    IDS,
    KINDS,
    TYPES,
    Layout,
    check_layout,
    rope_of,
    rope_text,
)

METADATA = ("checksum", "fingerprint", "key", "version")
CODED = ("codec", "dtype", "rope")
"""Metadata that a cache has besides, where a codec has changed it; a raw one may have ``rope``."""
KNOWN = (METADATA, (*METADATA, "rope"), METADATA + CODED)

PIECE = 1 << 20
"""Bytes written at once. Larger writes make Linux look for huge pages to cache them in, which took
seven times the CPU time of the writing (ext4, Linux 6.18)."""


class CorruptRecord(Exception):
    """A file is no whole chunk cache: damaged, truncated, foreign, or not what its key says."""


def check_shapes(record: ChunkKV) -> None:
    """Refuse a cache whose tensors do not fit its tokens.

    Raises:
        InputError: keys and values are not ``[layers, kv_heads, tokens, dim]`` of the same layers,
            heads and tokens, or their tokens are not as many as the token ids.
    """
    keys, values = tuple(record.keys.shape), tuple(record.values.shape)
    if len(keys) != 4 or len(values) != 4 or keys[:3] != values[:3]:
        problem = "do not fit [layers, kv_heads, tokens, dim]"
    elif keys[2] != len(record.token_ids):
        problem = f"do not fit {len(record.token_ids)} token ids"
    elif 0 in keys or 0 in values:
        problem = "are empty"
    elif not record.keys.is_floating_point() or not record.values.is_floating_point():
        problem = f"of {record.dtype} and {record.values.dtype} are no floating point numbers"
    else:
        return
    raise InputError(f"chunk cache: keys {list(keys)} and values {list(values)} {problem}")


def write_record(
    path: Path, record: ChunkKV, codec: str = RAW, cipher: Cipher | None = None
) -> int:
    """Write a chunk cache to a new file of mode 0600 and sync it.

    Args:
        codec: see :mod:`kvlink_rag.store.codec`.
        cipher: seals the file.

    Returns:
        bytes written.

    Raises:
        InputError: the shapes do not fit the tokens, the cache went through a codec before, or it
            is too large to be sealed.
        StoreError: the codec cannot hold its numbers.
        OSError: as the operating system says; the file may then be there in part.
    """
    check_shapes(record)
    tensors, metadata = _contents(record, codec)
    metadata["checksum"] = _checksum(metadata, tensors)
    parts = [memoryview(_header(tensors, metadata)), *map(_raw, tensors.values())]
    if cipher is not None:
        parts = [memoryview(each) for each in cipher.seal(b"".join(parts), _bound(metadata["key"]))]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb", buffering=0) as file:
        for part in parts:
            left = part
            while left:  # a raw write may take less than it is given
                left = left[file.write(left[:PIECE]) :]
        os.fsync(descriptor)
    return sum(part.nbytes for part in parts)


def _contents(record: ChunkKV, codec: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What is written for a cache: tensors, and metadata but the checksum."""
    if record.codec not in (RAW, codec):
        raise InputError(
            f"chunk cache: it went through codec {record.codec} and cannot be stored as {codec}: "
            "compute it anew"
        )
    codec = codec_for(codec, record.dtype)
    tensors = {
        "behind": torch.tensor(record.behind, dtype=torch.int64),
        "token_ids": torch.tensor(record.token_ids, dtype=torch.int64),
        **encode(record, codec),
    }
    metadata = {
        "fingerprint": record.fingerprint,
        "key": record.key_as(codec),
        "version": str(FORMAT_VERSION),
    }
    if codec != RAW:
        metadata |= {"codec": codec, "dtype": KINDS[record.dtype]}
    if codec != RAW or record.rope:  # where it is not known, raw keys do as well
        metadata["rope"] = rope_text(record.rope)
    return dict(sorted(tensors.items())), metadata


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors in a safetensors file.

    Written here because the library's own writers copy every tensor first, which costs indexing as
    much as the writing itself. Format: https://huggingface.co/docs/safetensors/index#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        kind = KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes; as bytes, since numpy has no bfloat16. Nothing is copied."""
    raw: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return raw


@dataclass(frozen=True, eq=False)
class MappedRecord:
    """A chunk cache that was read, as long as somebody else holds it, and how to verify it again.

    The same file is not mapped anew for each of several prompts that read it at a time.
    """

    record: weakref.ref[ChunkKV]
    metadata: Mapping[str, str]
    ids: Mapping[str, torch.Tensor]
    is_view: bool
    """Whether its tensors are the mapped file's, which somebody may have changed."""

    def verified(self) -> ChunkKV | None:
        """The cache, if it is still held.

        Raises:
            CorruptRecord: its bytes were changed meanwhile.
        """
        record = self.record()
        if record is not None and self.is_view:
            _verify(self.metadata, {**self.ids, **record.tensors})
        return record


def read_record(path: Path, key: str | None = None, cipher: Cipher | None = None) -> ChunkKV:
    """Read a chunk cache and verify all of it; the tensors are views of the mapped file.

    Args:
        path: the file.
        key: the key that the cache must have; a sealed file does not open without it.
        cipher: of a sealed file, whose tensors are then in memory.

    Raises:
        CorruptRecord: with the reason, for anything that :func:`write_record` did not write.
        OSError: the file cannot be read at all.
    """
    return map_record(path, key, cipher)[0]


def map_record(
    path: Path, key: str | None = None, cipher: Cipher | None = None
) -> tuple[ChunkKV, MappedRecord]:
    """:func:`read_record`, and what is needed to share the mapping."""
    if cipher is None:
        metadata, tensors = _mapped(path)
    else:
        metadata, tensors = _unsealed(path, key or "", cipher)
    if key is not None and metadata["key"] != key:
        raise CorruptRecord("it holds the cache of another chunk")
    _verify(metadata, tensors)
    record = _record(metadata, tensors)
    ids = {name: tensors[name].clone() for name in IDS}
    is_view = cipher is None and (record.codec == RAW or isinstance(record, CodedKV))
    return record, MappedRecord(weakref.ref(record), metadata, ids, is_view)


def _mapped(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file, checked to be laid out as a chunk cache.

    The library checks the header; tensors are views of a mapping of ours: its own lose some 60
    bytes each (safetensors 0.8.0), which is memory without end in a process that answers.
    """
    with _explained(path):
        with safe_open(path, framework="np") as file:
            metadata = _metadata(file.metadata())
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        _check(metadata, layout)
        return metadata, _views(path, layout)


def _views(path: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of a file, in a private mapping that lives as long as they do."""
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        first = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:first]))
        views = {}
        for name, (kind, shape) in layout.items():
            start, stop = header[name]["data_offsets"]
            part = {"dtype": kind, "shape": shape, "data": data[first + start : first + stop]}
            views[name] = _tensor(part)
        return views
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptRecord(f"it was changed while it was opened: {error}") from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what safetensors raises into errors of the file or of the operating system."""
    try:
        yield
    except SafetensorError as error:
        # some of them are errors of the operating system, which opening raises as such
        with open(path, "rb"):
            raise CorruptRecord(f"it is no safetensors file: {error}") from error


def _unsealed(
    path: Path, key: str, cipher: Cipher
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """:func:`_mapped` for a sealed file."""
    try:
        data = cipher.open(path.read_bytes(), _bound(key))
        parts = dict(deserialize(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (NotOpened, SafetensorError) as error:
        raise CorruptRecord(str(error)) from error
    del data
    metadata = _metadata(header.get("__metadata__"))
    _check(metadata, {name: (part["dtype"], tuple(part["shape"])) for name, part in parts.items()})
    return metadata, {name: _tensor(part) for name, part in parts.items()}


def _tensor(part: Mapping[str, Any]) -> torch.Tensor:
    data, kind = part["data"], TYPES[part["dtype"]]
    flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
    return flat.reshape(tuple(part["shape"]))


def _bound(key: str) -> str:
    """What a sealed file is bound to."""
    return f"chunk {FORMAT_VERSION} {key}"


def _verify(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    if _checksum(metadata, tensors) != metadata["checksum"]:
        raise CorruptRecord("its checksum does not hold")


class Header(NamedTuple):
    """What the header of a file says of its cache."""

    key: str
    tokens: int
    fingerprint: str
    codec: str
    dtype: torch.dtype
    """Of keys and values as they are read."""
    has_rope: bool


def read_header(path: Path, key: str | None = None, cipher: Cipher | None = None) -> Header:
    """The header of a file, unverified; a sealed one (see :func:`read_record`) is opened for it.

    Raises:
        CorruptRecord: there is no such header.
        OSError: the file cannot be read at all.
    """
    if cipher is not None:
        metadata, tensors = _unsealed(path, key or "", cipher)
        return _header_of(metadata, len(tensors["token_ids"]), KINDS[tensors["keys"].dtype])
    with _explained(path), safe_open(path, framework="np") as file:
        metadata = _metadata(file.metadata())
        shape = file.get_slice("token_ids").get_shape()
        kind = file.get_slice("keys").get_dtype()
    if len(shape) != 1:
        raise CorruptRecord("token_ids is no list of token ids")
    return _header_of(metadata, int(shape[0]), kind)


def _header_of(metadata: Mapping[str, str], tokens: int, kind: str) -> Header:
    dtype = metadata.get("dtype", kind)
    if dtype not in FLOATS:
        raise CorruptRecord(f"it has dtype {dtype[:40]!r}")
    return Header(
        metadata["key"],
        tokens,
        metadata["fingerprint"],
        metadata.get("codec", RAW),
        TYPES[dtype],
        metadata.get("rope", "[]") != "[]",
    )


def _metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(metadata or {})
    if sorted(found) not in (sorted(names) for names in KNOWN):
        raise CorruptRecord("it is no chunk cache (other metadata)")
    if found["version"] != str(FORMAT_VERSION):
        raise CorruptRecord(f"it has format {found['version'][:40]!r}, not {FORMAT_VERSION}")
    return found


def _check(metadata: Mapping[str, str], layout: Layout) -> None:
    try:
        check_layout(layout, metadata.get("codec", RAW), metadata.get("dtype"))
    except ValueError as error:
        raise CorruptRecord(str(error)) from error


def _record(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> ChunkKV:
    """The cache in tensors that are laid out as :func:`check_layout` wants them."""
    behind, codec = tuple(tensors["behind"].tolist()), metadata.get("codec", RAW)
    layers, head_dim = tensors["keys"].shape[0], channels(codec, tensors["keys"].shape[3])
    try:
        rope = rope_of(metadata.get("rope", "[]"), layers, head_dim)
    except ValueError as error:
        raise CorruptRecord(str(error)) from error
    dtype = TYPES[metadata["dtype"]] if codec != RAW else tensors["keys"].dtype
    token_ids = tuple(tensors["token_ids"].tolist())
    if chunk_key(metadata["fingerprint"], behind, token_ids, codec) != metadata["key"]:
        raise CorruptRecord("its key is not the key of its contents")
    whose = (token_ids, behind, metadata["fingerprint"])
    made = partial(decode, codec=codec, dtype=dtype, position=len(behind), rope=rope)
    if codec in READABLE and rope:
        kept = {name: tensors[name] for name in tensor_names(codec)}
        return CodedKV(*whose, kept, rope, codec, dtype, made)
    return ChunkKV(*whose, *made(tensors), rope, codec)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3_128 (hex) over the metadata, dtypes and shapes, then the raw bytes of every tensor."""
    digest = xxhash.xxh3_128()
    meaning = [metadata[name] for name in ("version", "key", "fingerprint")]
    meaning += [metadata[name] for name in CODED if name in metadata]
    meaning += [
        f"{name} {tensors[name].dtype} {list(tensors[name].shape)}" for name in sorted(tensors)
    ]
    digest.update("\0".join(meaning).encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()
