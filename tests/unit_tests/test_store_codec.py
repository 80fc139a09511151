from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import tiny
import torch

from kvlink_rag import InputError, StoreError
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.rope import RopeGroup, shift_groups
from kvlink_rag.store import FolderStore, MemoryStore, RamTier, open_store
from kvlink_rag.store.codec import CODECS, codec_for, coded_layout, decode, encode, tensor_names
from kvlink_rag.store.one_pass import available

LOSSY = [codec for codec in CODECS if codec not in ("raw", "bf16")]
CHUNKS = ["one fox in the snow", "two dogs, and a cat that is not theirs", "three bees"]
INV_FREQ = 10000.0 ** (-torch.arange(8) / 8)

lossy = pytest.mark.parametrize("codec", LOSSY)
every = pytest.mark.parametrize("codec", CODECS)


def record(
    tokens: int = 150, position: int = 5, dtype: torch.dtype = torch.float32, dim: int = 16
) -> ChunkKV:
    """Keys with one large channel, as models have them, before their rotation."""
    rng = torch.Generator().manual_seed(tokens)
    keys = torch.randn(4, 2, tokens, dim, generator=rng)
    keys[..., 3] += 30
    rope = (RopeGroup(slice(0, 3), INV_FREQ), RopeGroup(slice(3, 4), None))
    where = torch.arange(position, position + tokens)
    return ChunkKV(
        tuple(range(tokens)),
        tuple(range(position)),
        "model-a",
        shift_groups(keys, where, rope).to(dtype),
        torch.randn(4, 2, tokens, dim, generator=rng).to(dtype),
        rope,
    )


def around(its: ChunkKV, codec: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = encode(its, codec)
    assert sorted(tensors) == sorted(tensor_names(codec))
    return decode(tensors, codec, its.keys.dtype, its.position, its.rope)


class TestCodes:
    @pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
    @pytest.mark.parametrize(
        ("codec", "of_keys", "of_values"),
        # half a step of a range of 8 standard deviations; floating point has 3 bits of mantissa
        [("int4", 0.3, 0.3), ("int8", 0.02, 0.02), ("fp8", 2.0, 0.3), ("bf16", 0.13, 0.02)],
    )
    def test_no_number_is_further_off_than_a_step(self, codec, of_keys, of_values, tokens):
        its = record(tokens)
        keys, values = around(its, codec)
        # two channels turn together, so that both errors may meet in one
        assert (keys - its.keys).abs().max() < 2 * of_keys
        assert (values - its.values).abs().max() < of_values
        assert not torch.equal(values, its.values)

    def test_raw_is_as_it_is(self):
        its = record()
        keys, values = around(its, "raw")
        assert torch.equal(keys, its.keys)
        assert torch.equal(values, its.values)
        assert codec_for("bf16", torch.bfloat16) == "raw"
        assert codec_for("bf16", torch.float32) == "bf16"

    @lossy
    def test_keys_are_coded_free_of_their_position(self, codec):
        its = record()
        moved = shift_groups(its.keys, torch.full((150,), 1000), its.rope)
        there = replace(its, keys=moved, behind=tuple(range(1005)))
        here, far = encode(its, codec), encode(there, codec)
        same = here["keys"].float() == far["keys"].float()
        assert same.float().mean() > 0.98  # float32 rounds angles

    def test_position_free_keys_need_fewer_bits(self):
        """Rotated, the large channel would take up the range of two."""
        its = record(300)
        keys, _ = around(its, "int4")
        as_they_are, _ = around(replace(its, rope=()), "int4")
        turning = slice(0, 3)
        error = (keys - its.keys)[turning].norm()
        assert error < 0.5 * (as_they_are - its.keys)[turning].norm()

    @pytest.mark.parametrize(("codec", "most"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.30)])
    def test_bytes(self, codec, most):
        its = record(500, dtype=torch.bfloat16, dim=64)
        nbytes = sum(tensor.nbytes for tensor in encode(its, codec).values())
        assert 0.9 * most < nbytes / its.nbytes <= most

    @lossy
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
    def test_what_cannot_be_coded_is_refused(self, codec, number):
        its = record(10)
        its.values[1, 0, 3, 2] = number
        with pytest.raises(StoreError, match=f"codec {codec} .*use codec"):
            encode(its, codec)

    def test_half_a_byte_needs_even_heads(self):
        its = record(3)
        its = replace(its, values=its.values[..., :15])
        with pytest.raises(StoreError, match="even size"):
            encode(its, "int4")
        assert encode(its, "int8")["values"].shape[3] == 15

    @every
    @pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3, 1e3])
    def test_any_size_of_numbers(self, codec, size):
        its = record(70)
        its = replace(its, keys=its.keys * size, values=its.values * size)
        for found, wanted in zip(around(its, codec), (its.keys, its.values), strict=True):
            assert (found - wanted).norm() <= 0.2 * wanted.norm() + 1e-3


class TestFolder:
    @every
    def test_round_trip(self, tmp_path, codec):
        its = record(dtype=torch.bfloat16)
        store = FolderStore(tmp_path, codec)
        store.put(its, ["d"])
        key = its.key_as(codec_for(codec, torch.bfloat16))
        found = store.get(key)
        assert found.is_for("model-a", its.behind, its.token_ids)
        assert found.key == key
        assert found.keys.dtype == found.values.dtype == torch.bfloat16
        wanted = around(its, codec)
        assert torch.equal(found.keys, wanted[0])
        assert torch.equal(found.values, wanted[1])
        assert store.get(key) is found  # held: not decoded anew
        assert store.verify().clean
        assert store.stat().entries == 1
        store.close()
        again = FolderStore(tmp_path)
        assert again.codec == codec
        assert torch.equal(again.get(key).keys, wanted[0])
        assert again.references() == [("d", key)]

    def test_every_codec_has_keys_of_its_own(self):
        its = record()
        assert len({its.key_as(codec) for codec in CODECS}) == len(CODECS)

    def test_a_folder_keeps_its_codec(self, tmp_path):
        FolderStore(tmp_path / "a", "int4").close()
        with pytest.raises(InputError, match=r"made with codec 'int4', not 'int8'"):
            FolderStore(tmp_path / "a", "int8")
        FolderStore(tmp_path / "b", "raw").close()
        with pytest.raises(InputError, match="made with codec 'raw', not 'int8'"):
            FolderStore(tmp_path / "b", "int8")
        assert FolderStore(tmp_path / "b").codec == "raw"

    def test_a_new_folder_is_int8_and_one_of_before_stays_what_it_was(self, tmp_path):
        its = record(70)
        FolderStore(tmp_path / "new").put(its)
        again = FolderStore(tmp_path / "new")
        assert again.codec == open_store(tmp_path / "newer").codec == "int8"
        assert again.get(its.key_as("int8")) is not None
        FolderStore(tmp_path / "old", "raw").put(its)
        assert not (tmp_path / "old" / "store.json").exists()  # as before codecs were written down
        found = FolderStore(tmp_path / "old")
        assert found.codec == "raw"
        assert torch.equal(found.get(its.key).keys, its.keys)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"codec": "zip"}'])
    def test_damaged_settings(self, tmp_path, text):
        FolderStore(tmp_path, "int4").close()
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(StoreError, match=r"store\.json names no codec"):
            FolderStore(tmp_path)

    def test_an_unknown_codec(self, tmp_path):
        with pytest.raises(InputError, match="'zip' is unknown: choose one of raw, bf16"):
            FolderStore(tmp_path / "new", "zip")
        assert not (tmp_path / "new").exists()

    @lossy
    def test_a_flipped_bit_anywhere_is_found(self, tmp_path, codec):
        its = record(4)
        store = FolderStore(tmp_path, codec)
        store.put(its)
        path = next(tmp_path.rglob("*.safetensors"))
        whole = path.read_bytes()
        for place in range(0, len(whole), 37):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.warns(match="dropped the chunk cache"):
                assert store.get(its.key_as(codec)) is None
        path.write_bytes(whole)
        assert store.get(its.key_as(codec)) is not None

    def test_what_went_through_a_codec_is_not_coded_again(self, tmp_path):
        store = FolderStore(tmp_path / "int4", "int4")
        store.put(record(4))
        found = store.get(record(4).key_as("int4"))
        store.put(found)  # the same codec
        for codec in ("raw", "int8"):
            with pytest.raises(InputError, match="went through codec int4"):
                FolderStore(tmp_path / codec, codec).put(found)

    def test_a_refused_cache_leaves_nothing(self, tmp_path):
        store = FolderStore(tmp_path, "int8")
        with pytest.raises(StoreError):
            store.put(replace(record(4), values=record(4).values * float("inf")))
        assert list(tmp_path.rglob("*.safetensors")) == []
        assert store.verify().checked == 0


class TestEngine:
    @lossy
    @pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
    def test_answers_from_coded_caches(self, tmp_path, name, codec):
        exact = tiny.engine(name)
        wanted = exact.prefill("How many?", CHUNKS).logits
        engine = tiny.engine(name, store=tmp_path, codec=codec)
        assert engine.index(CHUNKS, progress=False).misses == 3
        again = tiny.engine(name, store=tmp_path)
        for _ in range(2):  # the prefix is computed and stored, then read
            prefill = again.prefill("How many?", CHUNKS[::-1])
            assert (prefill.report.hits, prefill.report.misses) == (3, 0)
        near = again.prefill("How many?", CHUNKS).logits
        assert not torch.equal(near, wanted)
        assert torch.cosine_similarity(near, wanted, 0) > (0.97 if codec == "int4" else 0.99)

    def test_memory_has_no_codec(self):
        with pytest.raises(InputError, match="'int8' is for a folder: MemoryStore has 'raw'"):
            open_store(None, codec="int8")
        assert MemoryStore().codec == "raw"

    def test_a_ram_tier_keeps_what_is_decoded(self, tmp_path):
        tier = RamTier(FolderStore(tmp_path, "int8"), 1 << 20)
        its = record(10)
        tier.put(its)
        assert tier.codec == "int8"
        key = its.key_as("int8")
        first = tier.get(key)
        tier.flush()
        assert torch.equal(tier.get(key).keys, first.keys)
        assert tier.hits == 1
        tier.put(its)  # what is kept may be what its reader refused
        tier.get(key)
        assert tier.hits == 1


def test_what_is_written_is_laid_out_as_readers_expect(tmp_path):
    for codec in LOSSY:
        for tokens in (1, 64, 129):
            for dim in (16, 64, 48):
                tensors = encode(record(tokens, dim=dim), codec)
                shapes = [tuple(tensors[name].shape) for name in ("keys", "values")]
                found = {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}
                assert found == coded_layout(codec, *shapes)


def test_raw_caches_that_were_read_can_be_coded(tmp_path):
    """Their file says how their keys are rotated."""
    its = record(70)
    FolderStore(tmp_path / "raw", "raw").put(its)
    found = FolderStore(tmp_path / "raw").get(its.key)
    for name, wanted in encode(its, "int4").items():
        assert torch.equal(encode(found, "int4")[name], wanted)
    assert not (tmp_path / "raw" / "store.json").exists()


class TestOnePass:
    """`int8` by the compiled function and by torch: the same numbers, but for rounding."""

    @pytest.fixture
    def by_torch(self, monkeypatch):
        def decoded(tensors, *rest):
            with monkeypatch.context() as patch:
                patch.setattr("kvlink_rag.store.codec.available", lambda: False)
                return decode(tensors, "int8", *rest)

        return decoded

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dim", [16, 24, 64, 128])
    @pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
    def test_by_one_pass_and_by_torch(self, by_torch, tokens, dim, dtype):
        its = record(tokens, dim=dim, dtype=dtype)  # partial rotary from 24 on, one layer without
        tensors = encode(its, "int8")
        found = decode(tensors, "int8", dtype, its.position, its.rope)
        expected = by_torch(tensors, dtype, its.position, its.rope)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype == dtype
            assert one.shape == other.shape
            assert one.is_contiguous()
            # in bfloat16 a last bit of its 8, where the angle's rounding decides
            rtol = 1e-5 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(one, other, atol=1e-4, rtol=rtol)
            assert (one != other).float().mean() < (1.0 if dtype == torch.float32 else 1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dim", [16, 24, 64, 128])
    @pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
    def test_coded_at_once_and_by_torch(self, monkeypatch, tokens, dim, dtype):
        its = record(tokens, dim=dim, dtype=dtype)
        found = encode(its, "int8")
        with monkeypatch.context() as patch:
            patch.setattr("kvlink_rag.store.codec.available", lambda: False)
            expected = encode(its, "int8")
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            one = found[name]
            assert (one.dtype, one.shape) == (wanted.dtype, wanted.shape)
            assert one.is_contiguous()
            if one.dtype == torch.uint8:  # where the angle's rounding decides, or the scale's
                assert (one.int() - wanted.int()).abs().max() <= 2
                assert (one != wanted).float().mean() < 1e-3
            else:  # a last bit of float16, of keys that were turned back by other roundings
                torch.testing.assert_close(one, wanted, atol=2e-5, rtol=2**-10)
                assert (one != wanted).float().mean() < 0.01
        wrong = decode(found, "int8", torch.float32, its.position, its.rope)[0] - its.keys.float()
        assert wrong.abs().max() < 0.1

    @pytest.mark.parametrize("what", ["keys", "values"])
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e8])
    @pytest.mark.parametrize("codec", LOSSY)
    def test_what_it_cannot_hold_is_refused(self, codec, number, what):
        its = record(130)
        getattr(its, what)[1, 1, 77, 5] = number
        with pytest.raises(StoreError, match="not finite, or beyond 65504"):
            encode(its, codec)

    def test_bfloat16_is_rounded_to_the_nearest_and_to_even(self):
        its = record(300)
        tensors = encode(its, "int8")
        exact = decode(tensors, "int8", torch.float32, its.position, its.rope)
        found = decode(tensors, "int8", torch.bfloat16, its.position, its.rope)
        for one, other in zip(found, exact, strict=True):
            assert torch.equal(one, other.bfloat16())

    def test_keys_whose_rotation_is_not_known(self, by_torch):
        its = replace(record(), rope=())
        tensors = encode(its, "int8")
        found = decode(tensors, "int8", torch.float32, 5, ())
        for one, other in zip(found, by_torch(tensors, torch.float32, 5, ()), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    def test_other_types_are_left_to_torch(self):
        its = record(dtype=torch.float16)
        keys, _ = decode(encode(its, "int8"), "int8", torch.float16, its.position, its.rope)
        assert keys.dtype == torch.float16
        assert (keys - its.keys).abs().max() < 0.1

    def test_it_is_in_use_here(self):
        assert available() == (find_spec("numba") is not None)
