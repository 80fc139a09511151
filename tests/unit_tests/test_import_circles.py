"""No module of a room imports itself by way of others, not even in a function or for types only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kvlink_rag

PACKAGE = Path(kvlink_rag.__file__).parent


def imports(path: Path, names: set[str]) -> set[str]:
    """Those of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & names


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in turn; empty if none do."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := follow(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := follow(name, []))), [])


@pytest.mark.parametrize("room", ["cli", "index"])
def test_no_circles(room: str) -> None:
    files = {
        f"kvlink_rag.{room}.{path.stem}": path
        for path in (PACKAGE / room).glob("*.py")
        if path.stem != "__init__"
    }
    assert len(files) > 5
    assert circle({name: imports(path, set(files)) for name, path in files.items()}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_what_the_index_may_know() -> None:
    allowed = {"index", "tuning", "engine", "runners", "adapters", "store", "prompt", "common"}
    allowed |= {"chunk", "rope", "errors"}
    for path in (PACKAGE / "index").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvlink_rag."):
                assert node.module.split(".")[1] in allowed, f"{path.name}: {node.module}"
