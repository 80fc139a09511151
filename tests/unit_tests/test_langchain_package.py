"""What the LangChain package shows, and what it imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import langchain_kvlink

import kvlink_rag

ROOT = Path(langchain_kvlink.__file__).parent


def test_all_is_pinned() -> None:
    assert langchain_kvlink.__all__ == [
        "ChatKVLink",
        "KVLinkVectorStore",
        "create_kvlink_documents_chain",
    ]
    assert all(hasattr(langchain_kvlink, name) for name in langchain_kvlink.__all__)


def test_only_public_names_of_the_core_and_of_langchain_core_are_imported() -> None:
    allowed = {*sys.stdlib_module_names, "langchain_core", "langchain_kvlink", "kvlink_rag"}
    allowed |= {"pydantic", "typing_extensions"}  # langchain-core's own
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
                if node.module == "kvlink_rag":
                    assert {alias.name for alias in node.names} <= set(kvlink_rag.__all__), path
            else:
                continue
            assert not [name for name in names if name.startswith("kvlink_rag.")], path
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_no_other_framework_is_needed() -> None:
    code = (
        "import sys, langchain_kvlink\n"
        "others = ('langchain', 'langchain_classic', 'langchain_community', 'llama_index')\n"
        "print([m for m in sys.modules if m.split('.')[0] in others])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
