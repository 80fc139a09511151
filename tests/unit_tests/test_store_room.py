"""The store's room: what it needs, what it shows, and that it stands without a model."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import kvlink_rag.store

ROOM = Path(kvlink_rag.store.__file__).parent
PACKAGE = ROOM.parent
BELOW = ("kvlink_rag.store", "kvlink_rag.chunk", "kvlink_rag.rope", "kvlink_rag.errors")

WITHOUT_A_MODEL = """
import importlib, importlib.abc, pkgutil, sys

BLOCKED = {"transformers", "faiss", "sentence_transformers"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())

import kvlink_rag.common, kvlink_rag.store

names = ["kvlink_rag.chunk", "kvlink_rag.rope", "kvlink_rag.errors"]
for room in (kvlink_rag.common, kvlink_rag.store):
    names += [found.name for found in pkgutil.walk_packages(room.__path__, room.__name__ + ".")]
for name in names:
    importlib.import_module(name)
    print(name)

import torch
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.store import FolderStore, MemoryStore

tensor = torch.rand(2, 1, 3, 4)
record = ChunkKV((1, 2, 3), (), "a model", tensor, tensor + 1)
for store in (FolderStore(sys.argv[1], "raw"), MemoryStore()):
    store.put(record, ["a document"])
    found = store.get(record.key)
    assert found is not None and found.is_for("a model", (), (1, 2, 3))
    assert torch.equal(found.keys, record.keys) and torch.equal(found.values, record.values)
    assert store.verify().clean
    store.close()

allowed = {"kvlink_rag", *names, "kvlink_rag.common", "kvlink_rag.store"}
loaded = {name for name in sys.modules if name.partition(".")[0] == "kvlink_rag"}
assert loaded <= allowed, loaded - allowed
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""


def imported(path: Path) -> set[str]:
    """Modules of this package that a file names in an import, wherever in it, types included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if is_module(name) else node.module for name in full}
    return {name for name in names if name.startswith("kvlink_rag")}


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or place.is_dir()


def modules() -> dict[str, Path]:
    """The files of the room by their dotted names, without the rooms' own ``__init__``."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in ROOM.rglob("*.py")
        if path.name != "__init__.py"
    }


def test_it_stands_where_no_model_library_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_A_MODEL, str(tmp_path / "kv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert set(modules()) <= set(done.stdout.split())


def test_it_imports_only_from_below() -> None:
    for name, path in modules().items():
        for other in imported(path):
            assert other.startswith((*BELOW, "kvlink_rag.common")), f"{name} imports {other}"


def test_all_is_pinned() -> None:
    assert kvlink_rag.store.__all__ == [
        "Budget",
        "EncryptionKey",
        "FolderStore",
        "FsspecRemote",
        "KVStore",
        "MemoryStore",
        "ModelUsage",
        "RamTier",
        "RedisRemote",
        "Remote",
        "RemoteError",
        "RemoteRefused",
        "RemoteTier",
        "StoreCheck",
        "StoreStat",
        "StoreUsage",
        "env_key",
        "is_store",
        "open_remote",
        "open_store",
        "redacted",
    ]
    assert all(hasattr(kvlink_rag.store, name) for name in kvlink_rag.store.__all__)
