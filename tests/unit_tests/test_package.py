"""The package's public names, and which part may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import kvlink_rag

ROOT = Path(kvlink_rag.__file__).parent

# From the ground up: a module imports only from its own floor and those below.
FLOORS = [
    {
        "errors",
        "corpus",
        "chunk",
        "rope",
        "fidelity",
        "report",
        "progress",
        "scratch",
        "threads",
        "model_lock",
        "whole",
    },
    {
        "architecture",
        "identity",
        "attention",
        "conversation",
        "link",
        "models",
        "prompt",
        "generate",
        "store",
    },
    {"prefetch"},
    {"adapter", "presets", "encode", "forward", "in_place", "relevance", "prefill", "load"},
    {"embeddings", "request", "answer", "batch"},
    {"prefiller"},
    {"indexing"},
    {"engine", "calibration", "trial"},
    {"index_catalog", "index_vectors", "index_check", "index"},
    {"estimate", "metrics", "tracing"},
    {"evaluation", "training", "documents", "ingest", "bench", "demo", "archive"},
    {"cli", "__main__"},
]
FRAMEWORKS = {"langchain", "langchain_core", "langchain_text_splitters", "llama_index"}


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports when it runs, wherever in it."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            block.body = [ast.Pass()]  # types are not imports
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "kvlink_rag":  # a module of the package, or one of its names
                names |= {f"kvlink_rag.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_all_is_pinned():
    assert kvlink_rag.__all__ == [
        "CHUNKS",
        "Adapter",
        "AdapterError",
        "AdapterRequiredError",
        "Answer",
        "AnswerStream",
        "Chunk",
        "IndexMismatchError",
        "IndexReport",
        "InputError",
        "KVIndex",
        "KVLinkEngine",
        "KVLinkError",
        "KVLinkWarning",
        "Message",
        "ModelNotFoundError",
        "PromptTemplate",
        "Report",
        "ScoredChunk",
        "StoreError",
        "UnsupportedModelError",
    ]
    assert all(hasattr(kvlink_rag, name) for name in kvlink_rag.__all__)


def test_every_part_is_on_a_floor():
    parts = {part(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert parts == set().union(*FLOORS)


def test_imports_go_down():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in ROOT.rglob("*.py"):
        if part(path) == "__init__":
            continue
        for name in imported(path):
            if name.startswith("kvlink_rag."):
                other = name.split(".")[1]
                other = kvlink_rag._MODULES.get(other, other)
                if floor[other] > floor[part(path)]:
                    wrong.append(f"{path.name} imports {name}")
    assert wrong == []


def test_the_core_imports_no_framework():
    for path in ROOT.rglob("*.py"):
        used = {name.split(".")[0] for name in imported(path)}
        assert not used & FRAMEWORKS, path
    code = (
        "import sys\nfrom kvlink_rag import *\n"
        "print([m for m in sys.modules if m.startswith(('langchain', 'llama_index'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom kvlink_rag.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\nprint('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
