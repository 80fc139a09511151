"""What the LlamaIndex integration imports, exports and leaves alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import llama_index.llms.kvlink as integration
import pytest

import kvlink_rag

ROOT = Path(integration.__file__).parent
PUBLIC = [
    "KVLinkContextChatEngine",
    "KVLinkLLM",
    "KVLinkQueryEngine",
    "KVLinkSynthesizer",
    "KVLinkTransform",
    "KVLinkVectorStore",
    "prune",
]


def test_all_is_pinned() -> None:
    assert integration.__all__ == PUBLIC
    assert all(getattr(integration, name).__doc__ for name in PUBLIC)


def test_it_is_part_of_a_namespace() -> None:
    for folder in (ROOT.parent, ROOT.parent.parent):
        assert not (folder / "__init__.py").exists()
    assert (ROOT / "py.typed").exists()


def test_it_imports_the_frameworks_core_and_public_names_only() -> None:
    for path in ROOT.glob("*.py"):
        for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(found, ast.Import):
                modules = [alias.name for alias in found.names]
                assert all(name in sys.stdlib_module_names for name in modules), path
            elif isinstance(found, ast.ImportFrom):
                module = found.module or ""
                if module.split(".")[0] == "kvlink_rag":
                    assert module == "kvlink_rag", path
                    assert {alias.name for alias in found.names} <= set(kvlink_rag.__all__)
                elif module.split(".")[0] == "llama_index":
                    assert module.startswith(("llama_index.core.", "llama_index.llms.kvlink.")), (
                        path
                    )
                else:
                    assert module.split(".")[0] in sys.stdlib_module_names, path


@pytest.mark.slow
def test_nothing_is_fetched_and_no_default_model_is_resolved() -> None:
    out = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["False", "None", "None", "2"]


OFFLINE = """
import socket, sys
def refuse(*arguments, **options): raise AssertionError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import tiny_llama_index as lib
from llama_index.core import Settings
from llama_index.core.node_parser import SentenceSplitter
from llama_index.llms.kvlink import *
llm = lib.llm()
index = lib.index(lib.documents(), SentenceSplitter(), KVLinkTransform(engine=llm.engine))
chat = KVLinkContextChatEngine.from_defaults(index.as_retriever(), llm=llm)
chat.chat("Hm?")
response = index.as_query_engine(llm=llm, response_synthesizer=KVLinkSynthesizer(llm)).query("Hm?")
openai = any(name in sys.modules for name in ("openai", "llama_index.llms.openai"))
print(openai, Settings._llm, Settings._embed_model, response.metadata["kvlink"]["hits"])
"""
