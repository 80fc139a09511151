"""Encrypted folders: what can be read with the key, and nothing without it."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from kvlink_rag import KVLinkEngine
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import InputError, KVLinkWarning, StoreError
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store import FolderStore, MemoryStore, env_key, open_store
from kvlink_rag.store import encryption as encryption_module
from kvlink_rag.store.encryption import MAGIC, NONCE, Cipher, NotOpened

pytestmark = pytest.mark.usefixtures("raw_folders")

KEY = bytes(range(32))
OTHER = bytes(32)
FINGERPRINT = "a-model-that-nobody-should-know"


def make_record(*token_ids: int) -> ChunkKV:
    generator = torch.Generator().manual_seed(len(token_ids))
    keys = torch.randn((2, 1, len(token_ids), 4), generator=generator)
    rope = (RopeGroup(slice(0, 2), torch.tensor([1.0, 0.1])),)
    return ChunkKV(token_ids, (9, 8), FINGERPRINT, keys, keys + 1, rope)


def files(path: Path) -> list[Path]:
    return sorted(each for each in (path / "chunks").rglob("*") if each.is_file())


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVLINK_STORE_KEY", raising=False)


@pytest.fixture
def made(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path / "kv", encryption_key=KEY)
    store.put(make_record(1, 2, 3), ["a"])
    store.close()
    return store


class TestFolder:
    @pytest.mark.parametrize("codec", ["raw", "bf16", "int8"])
    @pytest.mark.parametrize("size", [16, 24, 32])
    def test_what_is_put_is_got(self, tmp_path: Path, codec: str, size: int) -> None:
        record, plain = make_record(1, 2, 3), FolderStore(tmp_path / "plain", codec)
        plain.put(record)
        wanted = plain.get(record.key_as(codec))
        store = FolderStore(tmp_path / "kv", codec, encryption_key=KEY[:size])
        store.put(record, ["a"])
        store.close()
        store = FolderStore(tmp_path / "kv", encryption_key=lambda: KEY[:size])
        assert store.codec == codec
        found = store.get(record.key_as(codec))
        assert wanted is not None
        assert found is not None
        assert found.is_for(FINGERPRINT, (9, 8), (1, 2, 3))
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)
        assert [group.layers for group in found.rope] == [slice(0, 2)]
        assert store.get(found.key) is found
        assert store.verify().clean
        assert store.stat().nbytes == files(store.path)[0].stat().st_size
        found.keys.zero_()  # memory of its own

    def test_nothing_of_a_cache_is_to_be_read_on_disk(self, made: FolderStore) -> None:
        [file] = files(made.path)
        assert file.name == f"{make_record(1, 2, 3).key}.sealed"
        data = file.read_bytes()
        record = make_record(1, 2, 3)
        secret = [
            FINGERPRINT.encode(),
            b"metadata",
            record.key.encode(),
            torch.tensor(record.token_ids).numpy().tobytes(),
            record.keys[0, 0, 0].numpy().tobytes(),
        ]
        for each in secret:
            assert each not in data
        assert all(
            KEY not in path.read_bytes() for path in made.path.rglob("*.*") if path.is_file()
        )

    def test_the_same_cache_is_never_sealed_alike(self, tmp_path: Path) -> None:
        seen = set()
        store = FolderStore(tmp_path / "kv", encryption_key=KEY)
        for _ in range(20):
            store.put(make_record(1))
            seen.add(files(store.path)[0].read_bytes()[len(MAGIC) :][:NONCE])
        assert len(seen) == 20

    def test_files_that_changed_places_are_corrupt(self, tmp_path: Path) -> None:
        store = FolderStore(tmp_path / "kv", encryption_key=KEY)
        one, other = make_record(1), make_record(2, 3)
        store.put(one, ["a"])
        store.put(other, ["a"])
        os.replace(store._files.path(one.key), store._files.path(other.key))
        with pytest.warns(KVLinkWarning, match="key does not open it"):
            assert store.get(other.key) is None

    @pytest.mark.parametrize("place", [0, 10, 30, -1])
    def test_verify_and_prune_find_what_the_key_does_not_open(
        self, made: FolderStore, place: int
    ) -> None:
        [file] = files(made.path)
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
        store = FolderStore(made.path, encryption_key=KEY)
        assert store.verify().corrupt == [str(file)]
        assert store.prune().corrupt == [str(file)]
        assert files(made.path) == []

    def test_a_file_sealed_elsewhere_is_corrupt(self, tmp_path: Path, made: FolderStore) -> None:
        record = make_record(1, 2, 3)
        foreign = FolderStore(tmp_path / "other", encryption_key=OTHER)
        foreign.put(record)
        [file] = files(made.path)
        file.write_bytes(files(foreign.path)[0].read_bytes())
        store = FolderStore(made.path, encryption_key=KEY)
        with pytest.warns(KVLinkWarning, match="key does not open it"):
            assert store.get(record.key) is None
        store.put(record)
        assert store.get(record.key) is not None

    def test_a_lost_catalog_is_made_anew(self, made: FolderStore) -> None:
        (made.path / "catalog.sqlite").unlink()
        with pytest.warns(KVLinkWarning, match="made anew from 1 files"):
            store = FolderStore(made.path, encryption_key=KEY)
        assert store.stat().tokens == 3
        assert store.verify().clean

    def test_a_sealed_cache_in_a_plain_folder_is_no_cache(
        self, tmp_path: Path, made: FolderStore
    ) -> None:
        plain = FolderStore(tmp_path / "plain")
        plain.put(make_record(1, 2, 3))
        [file] = files(plain.path)
        file.write_bytes(files(made.path)[0].read_bytes())
        with pytest.warns(KVLinkWarning, match="no safetensors file"):
            assert plain.get(make_record(1, 2, 3).key) is None


class TestKeys:
    def test_the_wrong_key_is_told_at_opening(self, made: FolderStore) -> None:
        for key in (OTHER, KEY[:16]):
            with pytest.raises(InputError, match=r"not that of the encrypted store .*/kv: pass"):
                FolderStore(made.path, encryption_key=key)
        assert len(files(made.path)) == 1

    def test_no_key_is_told_at_opening(self, made: FolderStore) -> None:
        with pytest.raises(
            InputError, match=r"is encrypted: no encryption key: pass encryption_key.*KVLINK_STORE"
        ):
            FolderStore(made.path)

    def test_a_plain_folder_takes_no_key(self, tmp_path: Path) -> None:
        FolderStore(tmp_path).close()
        with pytest.raises(InputError, match="made without encryption"):
            FolderStore(tmp_path, encryption_key=KEY)
        (tmp_path / "catalog.sqlite").unlink()  # its files are still plain
        with pytest.raises(InputError, match="made without encryption"):
            FolderStore(tmp_path, encryption_key=KEY)

    @pytest.mark.parametrize(
        "told", [KEY.hex(), KEY.hex().upper(), base64.b64encode(KEY).decode() + "\n"]
    )
    def test_the_environment_opens_what_is_encrypted(
        self, made: FolderStore, monkeypatch: pytest.MonkeyPatch, told: str
    ) -> None:
        monkeypatch.setenv("KVLINK_STORE_KEY", told)
        assert FolderStore(made.path).get(make_record(1, 2, 3).key) is not None
        with pytest.raises(InputError, match="not that of"):  # what is passed comes first
            FolderStore(made.path, encryption_key=OTHER)

    def test_the_environment_encrypts_no_new_folder_unasked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVLINK_STORE_KEY", KEY.hex())
        store = FolderStore(tmp_path / "plain")
        store.put(make_record(1))
        assert files(store.path)[0].suffix == ".safetensors"
        assert FolderStore(store.path).get(make_record(1).key) is not None
        asked = FolderStore(tmp_path / "asked", encryption_key=env_key)
        asked.put(make_record(1))
        assert FolderStore(asked.path, encryption_key=KEY).get(make_record(1).key) is not None

    def test_url_safe_base64_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        key = b"\xff\xef" * 12
        monkeypatch.setenv("KVLINK_STORE_KEY", base64.urlsafe_b64encode(key).decode())
        assert env_key() == key

    @pytest.mark.parametrize(
        ("told", "reason"),
        [("", "set the environment"), ("secret!", "neither hex nor base64"), ("abcd", "3 bytes")],
    )
    def test_what_is_no_key_in_the_environment(
        self, made: FolderStore, monkeypatch: pytest.MonkeyPatch, told: str, reason: str
    ) -> None:
        monkeypatch.setenv("KVLINK_STORE_KEY", told)
        with pytest.raises(InputError, match=reason) as caught:
            FolderStore(made.path)
        assert not told or told not in str(caught.value)

    @pytest.mark.parametrize("key", [b"", b"letmein", "0" * 32, 3, lambda: None])
    def test_what_is_no_key_is_refused_and_not_shown(self, tmp_path: Path, key: object) -> None:
        with pytest.raises(InputError, match="16, 24 or 32 random bytes") as caught:
            FolderStore(tmp_path / "kv", encryption_key=key)  # type: ignore[arg-type]
        assert "letmein" not in str(caught.value)
        assert not (tmp_path / "kv").exists()

    def test_a_key_is_fetched_once(self, tmp_path: Path) -> None:
        asked = []

        def fetch() -> bytes:
            asked.append(1)
            return KEY

        FolderStore(tmp_path, encryption_key=fetch).close()
        assert asked == [1]

    @pytest.mark.parametrize("change", ["codec", "check", "damage"])
    def test_settings_that_were_changed_open_nothing(self, made: FolderStore, change: str) -> None:
        path = made.path / "store.json"
        told = json.loads(path.read_text())
        if change == "codec":
            told["encrypted"]["codec"] = "int8"
        else:
            told["encrypted"]["check"] = "AAAA" if change == "check" else 5
        path.write_text(json.dumps(told))
        with pytest.raises((InputError, StoreError), match=r"store\.json"):
            FolderStore(made.path, encryption_key=KEY)

    def test_an_older_version_refuses_it(self, made: FolderStore) -> None:
        """It read ``store.json`` so, and would else take every file for a stray."""
        with pytest.raises(KeyError):
            json.loads((made.path / "store.json").read_bytes())["codec"]


class TestCipher:
    def test_the_wrong_purpose_does_not_open(self) -> None:
        cipher = Cipher(secrets.token_bytes(16))
        sealed = b"".join(cipher.seal(b"text", "one"))
        assert cipher.open(sealed, "one") == b"text"
        for changed, bound in ((sealed, "two"), (sealed[:-1], "one"), (sealed + b"x", "one")):
            with pytest.raises(NotOpened):
                cipher.open(changed, bound)

    def test_what_is_too_large_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encryption_module, "LONGEST", 600)
        store = FolderStore(tmp_path, encryption_key=KEY)
        with pytest.raises(InputError, match="too large for an encrypted store"):
            store.put(make_record(1, 2, 3))
        assert files(tmp_path) == []

    def test_without_the_package(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['cryptography'] = None\n"
            "from kvlink_rag.store import FolderStore\n"
            "FolderStore(sys.argv[1] + '/plain').close()\n"
            "try:\n    FolderStore(sys.argv[1] + '/kv', encryption_key=bytes(32))\n"
            "except ValueError as error:\n    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert "pip install 'kvlink-rag[encryption]'" in done.stdout
        assert not (tmp_path / "kv").exists()


class TestPassedOn:
    def test_an_engine_answers_from_an_encrypted_folder(self, tmp_path: Path) -> None:
        chunks = ["one fox in the snow", "two dogs"]
        wanted = tiny.engine().prefill("How many?", chunks).logits
        tiny.engine(store=tmp_path, encryption_key=KEY).index(chunks, progress=False)
        prefill = tiny.engine(store=tmp_path, encryption_key=KEY).prefill("How many?", chunks)
        assert (prefill.report.hits, prefill.report.misses) == (2, 0)
        assert torch.allclose(prefill.logits, wanted, atol=1e-5)
        with pytest.raises(InputError, match="is encrypted"):
            KVLinkEngine.from_pretrained((tiny.model("llama"), tiny.tokenizer()), store=tmp_path)

    def test_a_tier_in_memory_lies_above_it(self, tmp_path: Path) -> None:
        tier = open_store(tmp_path, ram_bytes=1 << 20, encryption_key=KEY)
        tier.put(make_record(1))
        assert tier.get(make_record(1).key) is not None
        tier.close()

    def test_only_folders_are_encrypted(self) -> None:
        for store in (None, MemoryStore()):
            with pytest.raises(InputError, match="encryption_key is for a folder"):
                open_store(store, encryption_key=KEY)
