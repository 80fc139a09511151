"""Damaged and forged files: refused, or read as what was written, in little memory and time."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from effort import times

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store import record as record_module
from kvlink_rag.store.codec import CODECS
from kvlink_rag.store.encryption import Cipher
from kvlink_rag.store.record import (
    CorruptRecord,
    check_shapes,
    read_header,
    read_record,
    write_record,
)

DAMAGED = times(full=1500, quick=300)
"""Files of each kind: 10,500 in all."""
FORGED = times(full=400, quick=80)
MEMORY = 256 << 20
SIZES = [0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1]
ROPE = (RopeGroup(slice(0, 1), torch.tensor([1.0, 0.1])), RopeGroup(slice(1, 2), None))

every_codec = pytest.mark.parametrize("codec", CODECS)
every_kind = pytest.mark.parametrize(
    ("codec", "cipher"),
    [
        *((codec, None) for codec in CODECS),
        *((codec, Cipher(bytes(16))) for codec in ("raw", "int4")),
    ],
    ids=lambda value: value if isinstance(value, str) else "sealed" if value else "plain",
)


def make_record(seed: int) -> ChunkKV:
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn((2, 1, 3, 4), generator=rng)
    values = torch.randn((2, 1, 3, 6), generator=rng)
    return ChunkKV((5, 6, seed), (1, 2), "model-a", keys, values, ROPE)


class File(NamedTuple):
    """What was written, as bytes and as it is read."""

    data: bytes
    record: ChunkKV


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """What is allocated beyond fails, whether it is used or not, with another error than ours."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def new_path(tmp_path: Path) -> Callable[[], Path]:
    """A new name each time: what is mapped must not be written to."""
    names = count()
    return lambda: tmp_path / f"{next(names)}"


def written(path: Path, seed: int, codec: str, cipher: Cipher | None = None) -> File:
    record = make_record(seed)
    write_record(path, record, codec, cipher)
    return File(path.read_bytes(), read_record(path, record.key_as(codec), cipher))


def read(path: Path, data: bytes, key: str, cipher: Cipher | None = None) -> ChunkKV | None:
    """What a folder would serve for a file with these bytes."""
    path.write_bytes(data)
    try:
        found = read_record(path, key, cipher)
    except CorruptRecord:
        found = None
    try:
        read_header(path, key, cipher)
    except CorruptRecord:
        assert found is None
    path.unlink()
    return found


def same(one: ChunkKV, other: ChunkKV) -> bool:
    return (
        one.is_for(other.fingerprint, other.behind, other.token_ids)
        and one.keys.dtype == other.keys.dtype
        and torch.equal(one.keys, other.keys)
        and torch.equal(one.values, other.values)
    )


# Damage: what disks, copies and killed programs do.


def flip_bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_header_bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(min(len(data), 40))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def append(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data + rng.choice([b"\0", rng.randbytes(9), data, other])


def overwrite(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data))
    stop = rng.randint(start + 1, len(data))
    size = stop - start
    middle = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])
    return data[:start] + middle + data[stop:]


def move(rng: random.Random, data: bytes, other: bytes) -> bytes:
    a, b, c = sorted(rng.randrange(len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def mix_files(rng: random.Random, data: bytes, other: bytes) -> bytes:
    place = rng.randrange(len(data))
    return rng.choice([data[:place] + other[place:], other[:place] + data[place:], other])


def another_length(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Of the header."""
    return (rng.choice(SIZES) % 2**64).to_bytes(8, "little") + data[8:]


DAMAGES = [
    flip_bits,
    flip_header_bits,
    cut,
    append,
    overwrite,
    move,
    mix_files,
    another_length,
]


@every_kind
def test_no_damaged_file_is_served(
    new_path: Callable[[], Path], codec: str, cipher: Cipher | None
) -> None:
    rng = random.Random(f"damaged {codec}")
    file, other = (written(new_path(), seed, codec, cipher) for seed in (1, 2))
    refused = 0
    for number in range(DAMAGED):
        damage = DAMAGES[number % len(DAMAGES)]
        data = damage(rng, file.data, other.data)
        found = read(new_path(), data, file.record.key, cipher)
        assert found is None or same(found, file.record), damage
        refused += found is None
        # only blanks behind the header mean nothing, and some damage changes nothing
        assert found is None or cipher is None or data == file.data
    assert refused > 0.9 * DAMAGED


# Forgeries: what somebody writes on purpose, headers that lie and checksums that hold.


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def lie(rng: random.Random, header: dict[str, Any]) -> None:
    """Change one thing that a header says."""
    metadata = header["__metadata__"]
    names = [name for name in header if name != "__metadata__"]
    one, other = (header[name] for name in rng.sample(names, 2))
    what = rng.randrange(8)
    if what == 0 and one["shape"]:
        one["shape"][rng.randrange(len(one["shape"]))] = rng.choice(SIZES)
    elif what == 1:
        one["shape"] = rng.choices(SIZES, k=rng.randrange(9))
    elif what == 2:
        one["dtype"] = rng.choice(["F64", "F32", "F16", "I8", "BOOL", "F4", "E8M0", "X", 7, None])
    elif what == 3:
        one["data_offsets"] = rng.choices(SIZES, k=2)
    elif what == 4:
        one["shape"], other["shape"] = other["shape"], one["shape"]
    elif what == 5:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif what == 6:
        name = rng.choice(sorted(metadata))
        metadata[name] = rng.choice(["", "0", "[]", "raw", "int4", "F64", 7, None, [], {}, "é"])
    else:
        del header[rng.choice(names)]


@every_kind
def test_no_lying_header_is_believed(
    new_path: Callable[[], Path], codec: str, cipher: Cipher | None
) -> None:
    rng = random.Random(f"lies {codec}")
    path = new_path()
    file = written(path, 1, codec)
    for _ in range(FORGED):
        header, body = parts(file.data)
        for _ in range(rng.choice([1, 1, 2, 3])):
            with_names = [name for name in header if name != "__metadata__"]
            if len(with_names) > 1:
                lie(rng, header)
        data = joined(json.dumps(header).encode(), body)
        if cipher is not None:  # by somebody who has the key
            data = b"".join(cipher.seal(data, record_module._bound(file.record.key)))
        found = read(new_path(), data, file.record.key, cipher)
        assert found is None or same(found, file.record)


def forged(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file whose checksum holds."""
    tensors = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    metadata = {**metadata, "checksum": record_module._checksum(metadata, tensors)}
    return record_module._header(tensors, metadata) + b"".join(
        record_module._raw(tensor) for tensor in tensors.values()
    )


def distort(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    what = rng.randrange(6)
    dim = rng.randrange(tensor.dim())
    if what == 0:
        tensors[name] = torch.cat([tensor.view(torch.uint8)] * 2, dim).view(tensor.dtype)
    elif what == 1 and tensor.shape[dim] > 0:
        tensors[name] = tensor.narrow(dim, 0, rng.randrange(tensor.shape[dim]))
    elif what == 2:
        tensors[name] = tensor.unsqueeze(dim)
    elif what == 3 and tensor.dim() > 1:
        tensors[name] = tensor.transpose(dim, dim - 1)
    elif what == 4:
        tensors[name] = tensor.float()
    else:
        tensors[name] = tensor.reshape(-1)


@every_codec
def test_forged_tensors_are_refused_or_fit(new_path: Callable[[], Path], codec: str) -> None:
    """Whose checksum holds may hold any numbers: but they fit the tokens."""
    rng = random.Random(f"forged {codec}")
    path = new_path()
    key = written(path, 1, codec).record.key
    refused = 0
    for _ in range(FORGED):
        tensors, metadata = record_module._contents(make_record(1), codec)
        for _ in range(rng.choice([1, 1, 2])):
            distort(rng, tensors)
        found = read(new_path(), forged(tensors, metadata), key)
        if found is not None:
            check_shapes(found)
        refused += found is None
    assert refused > 0.7 * FORGED


ROPES = {
    "deep": "[" * 100_000,
    "deep and closed": "[" * 50_000 + "]" * 50_000,
    "no JSON": "[[0, 2, nul",
    "no list": '{"0": 1}',
    "a number": "7",
    "a group of two": "[[0, 2]]",
    "layers beyond": "[[0, 3, null]]",
    "many layers": f"[[0, {2**60}, null]]",
    "layers below": "[[-1, 2, null]]",
    "no layers": "[[1, 1, null]]",
    "layers twice": "[[0, 2, null], [1, 2, null]]",
    "layers that are true": "[[false, true, null]]",
    "no frequencies": "[[0, 2, []]]",
    "too many frequencies": "[[0, 2, [1.0, 1.0, 1.0]]]",
    "frequencies of no number": "[[0, 2, [NaN, 1.0]]]",
    "frequencies without end": "[[0, 2, [Infinity, 1.0]]]",
    "too large": "[[0, 2, [1e300, 1.0]]]",
    "words": '[[0, 2, ["a", "b"]]]',
    "lists": "[[0, 2, [[1.0], [1.0]]]]",
    "a number of many digits": f"[[0, {'9' * 10_000}, null]]",
    "long": "[" + "[0, 2, null]," * 100_000 + "[0, 2, null]]",
}


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_a_rotation_that_cannot_be_is_refused(tmp_path: Path, codec: str, rope: str) -> None:
    tensors, metadata = record_module._contents(make_record(1), codec)
    (tmp_path / "a").write_bytes(forged(tensors, {**metadata, "rope": rope}))
    with pytest.raises(CorruptRecord, match="its rope"):
        read_record(tmp_path / "a")


HEADERS = {
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep metadata": b'{"__metadata__":{"key":' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
    "no UTF-8": b'{"__metadata__":{"key":"\xff\xfe"}}',
    "half a character": b'{"__metadata__":{"key":"\\ud800"}}',
    "metadata that are no strings": b'{"__metadata__":{"key":5}}',
    "metadata twice": b'{"__metadata__":{"key":"a"},"__metadata__":{"key":"b"}}',
    "no metadata": b"{}",
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: bytes) -> None:
    data, cipher = joined(header, b""), Cipher(bytes(16))
    assert read(tmp_path / "a", data, "0" * 64) is None
    sealed = b"".join(cipher.seal(data, record_module._bound("0" * 64)))
    assert read(tmp_path / "a", sealed, "0" * 64, cipher) is None


@every_codec
def test_many_tokens_of_no_size_are_refused(tmp_path: Path, codec: str) -> None:
    """Nothing of a tensor without numbers is missing, however many tokens it has."""
    header, _ = parts(written(tmp_path / "a", 1, codec).data)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"] = [2**60, 0] if len(entry["shape"]) == 1 else [1, 1, 2**60, 0]
            entry["data_offsets"] = [0, 0]
    data = joined(json.dumps(header).encode(), b"")
    assert read(tmp_path / "b", data, header["__metadata__"]["key"]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "I64"), ("dtype", "F4"), ("codec", "raw"), ("codec", "zip"), ("version", "3")],
)
def test_metadata_that_cannot_be_are_refused(tmp_path: Path, name: str, value: str) -> None:
    tensors, metadata = record_module._contents(make_record(1), "int8")
    assert name in metadata
    data = forged(tensors, {**metadata, name: value})
    assert read(tmp_path / "a", data, metadata["key"]) is None
