"""The package's public names, and which part may import which."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kvlink_rag

ROOT = Path(kvlink_rag.__file__).parent

# From the ground up: what is in a room imports from its own room and those above it in this list.
ROOMS = [
    "errors",
    "common",
    "rope",
    "chunk",
    "prompt",
    "store",
    "adapters",
    "runners",
    "engine",
    "tuning",
    "index",
    "bench",
    "evaluation",
    "training",
    "demo",
    "cli",
    "__main__",
]
FRAMEWORKS = {"langchain", "langchain_core", "langchain_text_splitters", "llama_index"}


def imported(path: Path, types: bool = True) -> set[str]:
    """Full names of the modules that a file imports, wherever in it.

    Args:
        types: also those that only type checkers import.
    """
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        if not types and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            block.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(path: Path) -> str:
    """Its dotted name."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, set[str]]:
    """Which module of the package imports which, types and late imports included.

    The package itself is left out: what it offers is imported when it is first used.
    """
    files = {module(path): path for path in ROOT.rglob("*.py")}
    del files["kvlink_rag"]
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        public = {f"kvlink_rag.{n}": f"kvlink_rag.{m}" for n, m in kvlink_rag._MODULES.items()}
        found = {public.get(other, other) for other in imported(path)}
        edges[name] = {other for other in found if other in files and other != name}
    return edges


def room(name: str) -> str:
    return name.split(".")[1]


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


def test_every_module_is_in_a_room():
    assert {room(name) for name in graph()} == set(ROOMS)
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_rooms_import_from_rooms_below():
    floor = {name: level for level, name in enumerate(ROOMS)}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if floor[room(other)] > floor[room(name)]
    ]
    assert wrong == []


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """What imports itself through others, each once."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_through_others():
    assert circles(graph()) == []


def test_no_module_is_longer_than_one_noun_needs():
    long = {
        str(path.relative_to(ROOT)): count
        for path in ROOT.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}


@pytest.mark.parametrize("name", ["answer", "stream", "prefill", "answer_batch", "fidelity"])
def test_what_answers_takes_its_options_in_one_piece(name):
    method = inspect.signature(getattr(kvlink_rag.KVLinkEngine, name))
    assert "options" in method.parameters
    assert len(method.parameters) <= 4


def test_no_function_of_the_engine_takes_more_than_nine_arguments():
    for name, method in inspect.getmembers(kvlink_rag.KVLinkEngine, callable):
        if not name.startswith("_"):
            parameters = inspect.signature(method).parameters
            assert len([p for p in parameters if p != "options"]) <= 9, name


def test_the_core_imports_no_framework():
    for path in ROOT.rglob("*.py"):
        used = {name.split(".")[0] for name in imported(path, types=False)}
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
