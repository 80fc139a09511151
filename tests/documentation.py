"""Code in the README and in docs/: its blocks, and how tests run them."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from effort import times
from typer.testing import CliRunner

from kvlink_rag.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

RUN = ("python", "bash", "diff")
SHOWN = ("text",)
"""Output and pictures."""

CHARACTERS = times(full=4000, quick=800)
"""Of each article, at most."""

BLOCK = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^>]+?) -->\n\s*)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``reason`` says why it is not run, where it is marked with
    ``<!-- not run: ... -->`` in the line before."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block."""
        return [line for line in self.code.splitlines() if line.strip()]


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page that are run, in order; those of one language, or all."""
    return [
        block
        for block in all_blocks(page)
        if block.reason is None and block.language in ((language,) if language else RUN)
    ]


def all_blocks(page: Path) -> list[Block]:
    """Every block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            textwrap.dedent(found["code"]),
            found["reason"],
        )
        for found in BLOCK.finditer(text)
    ]


def commands(*pages: Path) -> list[str]:
    """Every shell command of pages that is to be run."""
    return [line for page in pages for block in blocks(page, "bash") for line in block.commands]


def anchor(heading: str) -> str:
    """What a heading is linked to by."""
    words = re.sub(r"[^\w\s-]", "", heading.strip().lower())
    return re.sub(r"\s+", "-", words)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block in a namespace; a failure names its place."""
    code = "\n" * block.line + block.code  # lines are counted as in the page
    exec(compile(code, str(block.page), "exec"), names)


def run_kvlink(command: str, *changed: str) -> str:
    """Run a command of `kvlink` in this process.

    Args:
        changed: arguments behind its own, which make it smaller.

    Returns:
        what it printed.
    """
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *changed])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def check_install(command: str) -> None:
    """The extras that `pip install '.[...]'` names are the package's."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]\n")[2].partition("\n[project")[0]
    named = re.search(r"\[(.*?)\]", command)
    for extra in named[1].split(",") if named else ():
        assert re.search(rf"^{re.escape(extra)} = \[", table, re.MULTILINE), command


def check_make(command: str) -> str:
    """A target of the Makefile is there; what it would do."""
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer from these documents.\\n\\n{context}"), ("human", "{input}")]
)
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


def framework_of(diff: Block) -> str:
    """Whose lines a diff changes."""
    (framework,) = [name for name in PIPELINES if f"from {name} import" in diff.code]
    return framework


def run_diff(block: Block, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a pipeline before and behind its change: one import, and three lines.

    Returns:
        the names that it has afterwards.
    """
    framework = framework_of(block)
    lines = block.code.splitlines()
    imports = [line for line in lines if line.startswith("+from")]
    assert len([line for line in lines if line.startswith("+")]) - len(imports) == 3
    assert NEEDS_A_SERVER[framework][0] in block.code
    names: dict[str, Any] = {}
    for dropped in "+-":
        code = "\n".join(line[1:] for line in lines if line[:1] != dropped)
        code = PIPELINES[framework] + code.replace(*NEEDS_A_SERVER[framework])
        names = {}
        exec(compile(code, f"{block.page}:{block.line}", "exec"), names)
        assert capsys.readouterr().out.strip()
    return names


def small_corpus(folder: Path) -> None:
    """The beginnings of the examples' articles, where the commands of the pages look for them."""
    corpus = folder / "examples" / "corpus"
    corpus.mkdir(parents=True)
    for path in (ROOT / "examples" / "corpus").iterdir():
        text = path.read_text(encoding="utf-8")[:CHARACTERS]
        (corpus / path.name).write_text(text, encoding="utf-8")
