"""What the README tells people to type works: every command and every Python block is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from effort import times
from typer.testing import CliRunner

from kvlink_rag.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]

# How each command is run here: as it stands, or smaller where it would take minutes.
AS_IT_STANDS = [
    command
    for command in COMMANDS
    if command.startswith(("kvlink index", "kvlink ask", "kvlink store"))
]
SMALLER = {
    "kvlink bench": "kvlink bench --length 300 --repeats 1",
    "python benchmarks/encode_behind.py --questions 200": "--questions 1 --max-new-tokens 2",
    "kvlink train --data examples/corpus --out my-adapter --steps 200": (
        "--steps 2 --batch 1 --config small.json"
    ),
    "kvlink eval --config benchmarks/eval_link5.json": "--questions 1 --max-new-tokens 2",
}
BY_MAKE = {command for command in COMMANDS if command.startswith("make ")}
INSTALL = "pip install ."
CHARACTERS = times(full=10**9, quick=1200)
"""Of each article, at most."""

# What a reader has around the lines of each framework's diff.
PIPELINES = {
    "langchain_kvlink": """
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
documents = [Document("Bees dance to tell others where flowers are."), Document("Ants smell.")]
embeddings = DeterministicFakeEmbedding(size=8)
question = "How do bees tell where flowers are?"
""",
    "llama_index.llms.kvlink": """
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
documents = [Document(text="Bees dance to tell others where flowers are."), Document(text="Ants.")]
embed_model = MockEmbedding(embed_dim=8)
question = "How do bees tell where flowers are?"
""",
}
NEEDS_A_SERVER = {
    "langchain_kvlink": (
        'init_chat_model("ollama:smollm2:135m")',
        'FakeListChatModel(responses=["They dance."])',
    ),
    "llama_index.llms.kvlink": ('Ollama("smollm2:135m")', "MockLLM(max_tokens=2)"),
}
"""The stock models, and what runs in their place here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the examples' articles in it alone, where the commands run in turn."""
    made = tmp_path_factory.mktemp("readme")
    corpus = made / "examples" / "corpus"
    corpus.mkdir(parents=True)
    for path in (ROOT / "examples" / "corpus").iterdir():
        text = path.read_text(encoding="utf-8")[:CHARACTERS]
        (corpus / path.name).write_text(text, encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_every_command_is_run_by_a_test_below():
    assert set(COMMANDS) == {*AS_IT_STANDS, *SMALLER, *BY_MAKE, INSTALL}
    assert {"make demo", "make test"} <= BY_MAKE


MEASURES = "kvlink store estimate"
"""It times prefills by every codec."""


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if command.startswith(MEASURES) else ())
        for command in AS_IT_STANDS
    ],
)
def test_commands(command):
    result = CliRunner().invoke(app, split(command))
    assert result.exit_code == 0, result.output
    if command.startswith("kvlink ask"):
        assert "apollo_program" in result.output
        assert "4 hits, 0 misses" in result.output


@pytest.mark.slow
def test_bench(folder):
    result = CliRunner().invoke(app, split(SMALLER["kvlink bench"]))
    assert result.exit_code == 0, result.output
    assert {path.name for path in (folder / "bench-results").iterdir()} == {
        "bench.json",
        "bench.md",
        "bench.png",
    }


@pytest.mark.slow
def test_train(folder):
    command = "kvlink train --data examples/corpus --out my-adapter --steps 200"
    text = (ROOT / "examples" / "corpus" / "1973_oil_crisis.md").read_text(encoding="utf-8")
    (folder / "small.md").write_text(text[:1200], encoding="utf-8")
    (folder / "small.json").write_text('{"held_out_lessons": 2}')
    smaller = [*split(command.replace("examples/corpus", "small.md")), *SMALLER[command].split()]
    result = CliRunner().invoke(app, smaller)
    assert result.exit_code == 0, result.output
    assert "adapter='my-adapter'" in result.output
    result = CliRunner().invoke(
        app, ["ask", "my-index", "When did the crisis begin?", "--adapter", "my-adapter"]
    )
    assert result.exit_code == 0, result.output
    assert "link: TTFT" in result.output
    assert "4 hits, 0 misses" in result.output


def needs_question_sets() -> None:
    if "KVLINK_DATA" not in os.environ and not (ROOT / "../shared/data").is_dir():
        pytest.skip("the question sets are absent: set KVLINK_DATA to their folder")


@pytest.mark.slow
def test_eval(folder, monkeypatch):
    needs_question_sets()
    if "KVLINK_DATA" not in os.environ:
        monkeypatch.setenv("KVLINK_DATA", str(ROOT / "../shared/data"))
    command = "kvlink eval --config benchmarks/eval_link5.json"
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    result = CliRunner().invoke(app, [*split(command), *SMALLER[command].split()])
    assert result.exit_code == 0, result.output
    assert "link, smollm2-135m-link5" in (folder / "eval-results" / "results.md").read_text()


@pytest.mark.slow
def test_comparison_of_prefixes(folder):
    needs_question_sets()
    script = ROOT / "benchmarks" / "encode_behind.py"
    out = folder / "rows.jsonl"
    arguments = SMALLER["python benchmarks/encode_behind.py --questions 200"].split()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.setdefault("KVLINK_DATA", str(ROOT / "../shared/data"))
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--out", str(out)],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| all | 10 | 3 |" in done.stdout
    assert len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize("command", sorted(BY_MAKE))
def test_make_targets_exist(command):
    done = subprocess.run(
        [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = "kvlink demo" if command == "make demo" else "pytest"
    assert wanted in done.stdout


def test_pip_install_gives_package_corpus_and_command(tmp_path):
    assert INSTALL in COMMANDS
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("kvlink_rag-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kvlink_rag/engine/engine.py" in names
    assert "kvlink_rag/py.typed" in names
    assert "kvlink_rag/_corpus/apollo_program.md" in names
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("framework", PIPELINES)
def test_stock_pipelines_and_their_three_changed_lines(framework, capsys):
    (diff,) = [block for block in blocks("diff") if framework in block]
    imports = [line for line in diff.splitlines() if line.startswith("+from")]
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) - len(imports) == 3
    assert NEEDS_A_SERVER[framework][0] in diff
    for dropped in "+-":
        code = "\n".join(line[1:] for line in diff.splitlines() if line[:1] != dropped)
        code = PIPELINES[framework] + code.replace(*NEEDS_A_SERVER[framework])
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        assert capsys.readouterr().out.strip()
    assert names["llm"].engine.store.stat().documents == 2


def split(command: str) -> list[str]:
    return shlex.split(command)[1:]
