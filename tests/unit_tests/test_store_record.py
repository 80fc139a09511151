"""One chunk cache as one file: what is written is read, and nothing else ever is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store.record import CorruptRecord, read_header, read_record, write_record


def make_record(
    token_ids: Sequence[int] = (5, 6, 7),
    behind: Sequence[int] = (1,),
    fingerprint: str = "model-a",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, len(token_ids), 4)  # [layers, kv_heads, tokens, head_dim]
    keys = torch.randn(shape, generator=generator).to(dtype)
    values = torch.randn((*shape[:3], 6), generator=generator).to(dtype)
    return ChunkKV(tuple(token_ids), tuple(behind), fingerprint, keys, values)


def same(one: ChunkKV, other: ChunkKV) -> bool:
    return (
        other.is_for(one.fingerprint, one.behind, one.token_ids)
        and one.keys.dtype == other.keys.dtype
        and one.values.dtype == other.values.dtype
        and torch.equal(one.keys, other.keys)
        and torch.equal(one.values, other.values)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("behind", [(), (1, 2)])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, behind: tuple[int]) -> None:
    record = make_record(dtype=dtype, behind=behind, fingerprint="modèle-日本")
    nbytes = write_record(tmp_path / "a", record)

    assert (tmp_path / "a").stat().st_size == nbytes
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert same(record, read_record(tmp_path / "a"))
    assert read_header(tmp_path / "a") == (record.key, 3, "modèle-日本", "raw", dtype, False)


def test_views_of_other_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.randn(2, 9, 1, 4)
    keys = whole.transpose(1, 2)[:, :, 2:5]
    record = ChunkKV((5, 6, 7), (), "m", keys, keys + 1)
    write_record(tmp_path / "a", record)
    assert same(record, read_record(tmp_path / "a"))


def test_keys_and_values_may_share_memory(tmp_path: Path) -> None:
    both = torch.randn(2, 1, 3, 4)
    record = ChunkKV((5, 6, 7), (), "m", both, both)
    write_record(tmp_path / "a", record)
    assert same(record, read_record(tmp_path / "a"))


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    write_record(tmp_path / "a", make_record())
    record = read_record(tmp_path / "a")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [line[0].split("-") for line in maps if line[-1] == str(tmp_path / "a")]
    for tensor in (record.keys, record.values):
        assert any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in mapped)


def test_changing_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    record = make_record()
    write_record(tmp_path / "a", record)
    read_record(tmp_path / "a").keys.zero_()
    assert same(record, read_record(tmp_path / "a"))


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    record = make_record()
    write_record(tmp_path / "a", record)
    found = read_record(tmp_path / "a")
    (tmp_path / "a").unlink()
    assert same(record, found)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    record = make_record()
    write_record(tmp_path / "a", record)
    tensors = load_file(tmp_path / "a")
    assert torch.equal(tensors["keys"], record.keys)
    assert tensors["token_ids"].tolist() == [5, 6, 7]


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_no_flipped_byte_ever_serves_a_wrong_cache(tmp_path: Path, mask: int) -> None:
    record = make_record()
    write_record(tmp_path / "a", record)
    data = (tmp_path / "a").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    padding = data[:header].rstrip(b" ")
    harmless = []
    for place in range(len(data)):
        # a file of its own each time: a mapped file must not be written to
        file = tmp_path / f"flipped-{place}"
        file.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
        try:
            found = read_record(file)
        except CorruptRecord:
            continue
        finally:
            file.unlink()
        assert same(record, found), f"byte {place} changed the cache unnoticed"
        harmless.append(place)
    assert all(len(padding) <= place < header for place in harmless)


def test_no_truncated_or_longer_file_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / "a", make_record())
    data = (tmp_path / "a").read_bytes()
    for length in [0, 1, 7, 8, 9, 50, len(data) // 2, len(data) - 8, len(data) - 1]:
        (tmp_path / f"{length}").write_bytes(data[:length])
        with pytest.raises(CorruptRecord):
            read_record(tmp_path / f"{length}")
    (tmp_path / "longer").write_bytes(data + b"\0")
    with pytest.raises(CorruptRecord):
        read_record(tmp_path / "longer")


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff" * 200, b"PK\3\4" * 100, b"\0" * 64])
def test_foreign_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    for read in (read_record, read_header):
        with pytest.raises(CorruptRecord):
            read(tmp_path / "a")


def test_another_programs_safetensors_is_refused(tmp_path: Path) -> None:
    save_file({"keys": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(CorruptRecord, match="no chunk cache"):
        read_record(tmp_path / "a")


def test_a_file_that_is_not_there_is_not_corrupt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "a")


@pytest.mark.parametrize("change", ["shape", "dtype", "swap", "fingerprint"])
def test_the_same_bytes_with_another_meaning_are_refused(tmp_path: Path, change: str) -> None:
    write_record(tmp_path / "a", make_record())
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "a")
    if change == "shape":
        tensors |= {name: tensors[name].reshape(1, 2, 3, -1) for name in ("keys", "values")}
    elif change == "dtype":
        tensors["keys"] = tensors["keys"].view(torch.float16)
    elif change == "swap":
        tensors["keys"], tensors["values"] = tensors["values"], tensors["keys"]
    else:
        metadata["fingerprint"] = "model-b"
    save_file(tensors, tmp_path / "b", metadata)
    with pytest.raises(CorruptRecord, match="checksum"):
        read_record(tmp_path / "b")


class Liar(ChunkKV):
    """A cache that is stored under another one's key, with a checksum that holds."""

    def key_as(self, codec: str) -> str:
        return make_record(token_ids=(9, 9, 9)).key_as(codec)


def test_contents_that_do_not_match_their_key_are_refused(tmp_path: Path) -> None:
    record = make_record()
    write_record(
        tmp_path / "a", Liar(record.token_ids, record.behind, "m", record.keys, record.values)
    )
    with pytest.raises(CorruptRecord, match="key"):
        read_record(tmp_path / "a")


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((2, 1, 3), (2, 1, 3)),
        ((2, 1, 4, 4), (2, 1, 4, 4)),
        ((2, 1, 3, 4), (3, 1, 3, 4)),
        ((2, 1, 3, 0), (2, 1, 3, 0)),
    ],
)
def test_tensors_that_do_not_fit_are_not_written(
    tmp_path: Path, keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    record = replace(make_record(), keys=torch.zeros(keys), values=torch.zeros(values))
    with pytest.raises(InputError, match="chunk cache"):
        write_record(tmp_path / "a", record)
    assert not (tmp_path / "a").exists()


def test_reading_warns_of_nothing(tmp_path: Path) -> None:
    write_record(tmp_path / "a", make_record())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_record(tmp_path / "a")


def test_the_size_told_is_the_files_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "record"
    assert write_record(path, make_record((1, 2))) == path.stat().st_size > 0
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_files_of_before_are_read(codec: str) -> None:
    """Written when raw files did not say how their keys are rotated."""
    keys = torch.arange(24, dtype=torch.float32).reshape(2, 1, 3, 4)
    found = read_record(Path(__file__).with_name("old_records") / f"{codec}.safetensors")
    assert found.is_for("model-a", (1,), (5, 6, 7))
    assert len(found.rope) == (0 if codec == "raw" else 1)
    assert torch.allclose(found.keys, keys, atol=0 if codec == "raw" else 0.1)
    assert torch.allclose(found.values, keys + 1, atol=0 if codec == "raw" else 0.1)


def test_raw_files_say_how_their_keys_are_rotated(tmp_path: Path) -> None:
    rope = (RopeGroup(slice(0, 1), torch.tensor([0.1, 1e-7])), RopeGroup(slice(1, 2), None))
    write_record(tmp_path / "a", replace(make_record(), rope=rope))
    found = read_record(tmp_path / "a")
    assert [group.layers for group in found.rope] == [slice(0, 1), slice(1, 2)]
    assert torch.equal(found.rope[0].inv_freq, rope[0].inv_freq)
    assert found.rope[1].inv_freq is None
    assert read_header(tmp_path / "a").has_rope

    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    metadata["rope"] = metadata["rope"].replace("1,", "2,")
    save_file(load_file(tmp_path / "a"), tmp_path / "b", metadata)
    with pytest.raises(CorruptRecord, match="checksum"):
        read_record(tmp_path / "b")


def test_where_the_rotation_is_not_known_files_are_what_they_were(tmp_path: Path) -> None:
    write_record(tmp_path / "a", make_record())
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert sorted(file.metadata()) == ["checksum", "fingerprint", "key", "version"]


def test_whole_numbers_are_no_cache(tmp_path: Path) -> None:
    record = replace(make_record(), keys=torch.ones((2, 1, 3, 4), dtype=torch.int64))
    with pytest.raises(InputError, match="no floating point"):
        write_record(tmp_path / "a", record)
