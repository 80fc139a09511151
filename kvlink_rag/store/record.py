"""One chunk cache as one safetensors file, with a checksum over everything that gives it meaning.

Reading maps the file: the tensors are views of its pages (a private mapping: changing a tensor
never changes the file), and the checksum runs over the same pages, so a cache costs one pass over
its bytes and no copy.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from kvlink_rag.chunk import FORMAT_VERSION, RAW, ChunkKV
from kvlink_rag.errors import InputError
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store.codec import codec_for, decode, encode, tensor_names

METADATA = ("checksum", "fingerprint", "key", "version")
CODED = ("codec", "dtype", "rope")
"""Metadata that a cache has besides, where a codec has changed it."""
KINDS = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""Names of types in safetensors."""
TYPES = {name: kind for kind, name in KINDS.items()}

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
    else:
        return
    raise InputError(f"chunk cache: keys {list(keys)} and values {list(values)} {problem}")


def write_record(path: Path, record: ChunkKV, codec: str = RAW) -> int:
    """Write a chunk cache to a new file of mode 0600 and sync it.

    Args:
        codec: see :mod:`kvlink_rag.store.codec`.

    Returns:
        bytes written.

    Raises:
        InputError: the shapes do not fit the tokens, or the cache went through a codec before.
        StoreError: the codec cannot hold its numbers.
        OSError: as the operating system says; the file may then be there in part.
    """
    check_shapes(record)
    tensors, metadata = _contents(record, codec)
    metadata["checksum"] = _checksum(metadata, tensors)
    parts = [memoryview(_header(tensors, metadata)), *map(_raw, tensors.values())]
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
    codec = codec_for(codec, record.keys.dtype)
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
        metadata |= {"codec": codec, "dtype": KINDS[record.keys.dtype], "rope": _told(record.rope)}
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

    def verified(self) -> ChunkKV | None:
        """The cache, if it is still held.

        Raises:
            CorruptRecord: its bytes were changed meanwhile.
        """
        record = self.record()
        if record is not None and record.codec == RAW:  # else it is no view of the file
            tensors = {**self.ids, "keys": record.keys, "values": record.values}
            _verify(self.metadata, tensors)
        return record


def read_record(path: Path, key: str | None = None) -> ChunkKV:
    """Read a chunk cache and verify all of it; the tensors are views of the mapped file.

    Args:
        path: the file.
        key: the key that the cache must have.

    Raises:
        CorruptRecord: with the reason, for anything that :func:`write_record` did not write.
        OSError: the file cannot be read at all.
    """
    return map_record(path, key)[0]


def map_record(path: Path, key: str | None = None) -> tuple[ChunkKV, MappedRecord]:
    """:func:`read_record`, and what is needed to share the mapping."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(file.metadata())
            if key is not None and metadata["key"] != key:
                raise CorruptRecord("it holds the cache of another chunk")
            names = sorted(file.keys())
            if names != sorted(("behind", "token_ids", *tensor_names(metadata.get("codec", RAW)))):
                raise CorruptRecord(f"it has the tensors {names}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, RuntimeError) as error:
        # safetensors turns some errors of the operating system into its own: tell them apart
        with open(path, "rb"):
            raise CorruptRecord(f"it is no safetensors file: {error}") from error
    _verify(metadata, tensors)
    record = _record(metadata, tensors)
    ids = {name: tensors[name].clone() for name in ("behind", "token_ids")}
    return record, MappedRecord(weakref.ref(record), metadata, ids)


def _verify(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    if _checksum(metadata, tensors) != metadata["checksum"]:
        raise CorruptRecord("its checksum does not hold")


def read_header(path: Path) -> tuple[str, int, str]:
    """Key, number of tokens and fingerprint as the header states them; nothing is verified.

    Raises:
        CorruptRecord: there is no such header.
        OSError: the file cannot be read at all.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(file.metadata())
            shape = file.get_slice("token_ids").get_shape()
            return metadata["key"], int(shape[0]), metadata["fingerprint"]
    except (SafetensorError, ValueError, RuntimeError, IndexError) as error:
        with open(path, "rb"):
            raise CorruptRecord(f"it is no safetensors file: {error}") from error


def _metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(metadata or {})
    if sorted(found) not in (sorted(METADATA), sorted(METADATA + CODED)):
        raise CorruptRecord("it is no chunk cache (other metadata)")
    if found["version"] != str(FORMAT_VERSION):
        raise CorruptRecord(f"it has format {found['version']!r}, not {FORMAT_VERSION}")
    return found


def _record(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> ChunkKV:
    for name in ("behind", "token_ids"):
        if tensors[name].dim() != 1 or tensors[name].dtype not in (torch.int32, torch.int64):
            raise CorruptRecord(f"{name} is no list of token ids")
    behind, codec = tuple(tensors["behind"].tolist()), metadata.get("codec", RAW)
    try:
        rope = _asked(metadata.get("rope", "[]"))
        dtype = TYPES[metadata["dtype"]] if codec != RAW else tensors["keys"].dtype
        keys, values = decode(tensors, codec, dtype, len(behind), rope)
        record = ChunkKV(
            token_ids=tuple(tensors["token_ids"].tolist()),
            behind=behind,
            fingerprint=metadata["fingerprint"],
            keys=keys,
            values=values,
            rope=rope,
            codec=codec,
        )
        check_shapes(record)
    except (InputError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise CorruptRecord(str(error)) from error
    if record.key != metadata["key"]:
        raise CorruptRecord("its key is not the key of its contents")
    return record


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


def _told(rope: Sequence[RopeGroup]) -> str:
    """How keys are rotated, as JSON: first layer, layer behind the last, frequencies or null."""
    groups = [
        [group.layers.start, group.layers.stop, None if f is None else f.float().tolist()]
        for group in rope
        for f in [group.inv_freq]
    ]
    return json.dumps(groups)


def _asked(text: str) -> tuple[RopeGroup, ...]:
    """:func:`_told`, the way back."""
    return tuple(
        RopeGroup(slice(int(start), int(stop)), None if f is None else torch.tensor(f))
        for start, stop, f in json.loads(text)
    )
