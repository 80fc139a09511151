"""What docs/ tells people to type works: every command and every block of code is run.

The blocks of a page go on from each other, as they are read: one after the other, in one namespace
and one folder. `make docs` checks the pages' links.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documentation
import pytest
import typer
from documentation import PAGES, ROOT

from kvlink_rag.cli import app

INDEX = "kvlink index examples/corpus --out my-index"
BENCH = "kvlink bench"
TRAIN = "kvlink train --data examples/corpus --out my-adapter --steps 200"
EVAL = "kvlink eval --config benchmarks/eval_link5.json"
EVAL_AUTO = "kvlink eval --config benchmarks/eval_auto.json --out benchmarks/results/eval_auto"
TUNE = "kvlink tune my-index"
COMPARE = "python benchmarks/encode_behind.py --questions 200"

BY_ITSELF = {BENCH, TRAIN, EVAL, EVAL_AUTO, TUNE, COMPARE}
"""They take hours as they stand: a test each runs them smaller."""

NOT_RUN: dict[str, int] = {}
"""How many blocks of a page are marked with a reason why they are not run."""

EXPECTED = {"kvlink ask": "4 hits, 0 misses", "kvlink store verify": "clean"}
"""What a command's output has in it, by how it begins."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples' articles and an index of them, where the pages' code runs."""
    made = tmp_path_factory.mktemp("docs")
    documentation.small_corpus(made)
    (made / "benchmarks").symlink_to(ROOT / "benchmarks")
    before = Path.cwd()
    os.chdir(made)
    try:
        documentation.run_kvlink(INDEX)
    finally:
        os.chdir(before)
    return made


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_every_block_is_run_or_says_why_not():
    for page in PAGES:
        blocks = documentation.all_blocks(page)
        for block in blocks:
            known = documentation.RUN + documentation.SHOWN
            assert block.language in known, f"{page.name}, line {block.line}: {block.language!r}"
        marked = [block for block in blocks if block.reason]
        assert len(marked) == NOT_RUN.get(page.name, 0), f"{page.name}: {marked}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_rooms_import_from_those_below_them_in_the_table():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)` \|", text.partition("## Rooms")[2], re.MULTILINE)
    package = ROOT / "kvlink_rag"
    there = {
        path.stem
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {*rooms} == there - {"__init__", "__main__"}
    rank = {room: place for place, room in enumerate(rooms)}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).with_suffix("").parts[0]
        if room in rank:
            for other in imported_rooms(path) & rank.keys() - {room}:
                assert rank[other] > rank[room], f"{path} imports from {other}, which is above it"


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, wherever in it, types included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kvlink_rag":
            names += [f"kvlink_rag.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("kvlink_rag.")}


def test_the_page_of_the_command_line_has_every_command_and_option():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = {text.partition("\n")[0]: text for text in page.split("\n## ")[1:]}
    known = {"--help"}
    for name, command in walk(typer.main.get_command(app), "kvlink"):
        options = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("-") and option != "--help"
        }
        known |= options
        section = sections.get(" ".join(name.split()[:2]), page)
        assert name in page or f"`{name.split()[-1]}" in section, name
        for option in options:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", section), f"{name} {option}"
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert said <= known, f"the page has options that no command has: {said - known}"


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and those below it, by what is typed."""
    yield name, command
    for child, its in getattr(command, "commands", {}).items():
        yield from walk(its, f"{name} {child}")


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "page", [p for p in PAGES if documentation.blocks(p)], ids=lambda p: p.stem
)
def test_page(page: Path, inside: Path, capsys: pytest.CaptureFixture[str]):
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in documentation.blocks(page):
        if block.language == "python":
            documentation.run_python(block, names)
        elif block.language == "diff":
            documentation.run_diff(block, capsys)
        else:
            for command in block.commands:
                run(command)


def run(command: str) -> None:
    """A command of a page."""
    if command in BY_ITSELF:
        return
    if command.startswith("kvlink "):
        output = documentation.run_kvlink(command)
        for begins, expected in EXPECTED.items():
            if command.startswith(begins):
                assert expected in output, f"{command}\n{output}"
    elif command.startswith("pip install "):
        documentation.check_install(command)
    elif command.startswith("make "):
        documentation.check_make(command)
    else:
        pytest.fail(f"no test knows how to run this: {command}")


def test_extras_that_pages_name_are_the_packages():
    for page in (*PAGES, documentation.README):
        for command in re.findall(r"pip install '[^']+'", page.read_text(encoding="utf-8")):
            documentation.check_install(command)


def test_what_takes_hours_is_in_the_pages():
    assert {*documentation.commands(*PAGES)} >= BY_ITSELF


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1200)
def test_tune(inside: Path):
    output = documentation.run_kvlink(TUNE, "--count", "3")
    assert "3 questions" in output
    assert "full prefill's" in output
    assert "where auto finds it" in output
    (inside / "my-index" / "kv" / "tuned.json").unlink()  # other tests ask as a newcomer does


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1200)
def test_bench(inside: Path):
    documentation.run_kvlink(BENCH, "--length", "300", "--repeats", "1")
    written = {path.name for path in (inside / "bench-results").iterdir()}
    assert written == {"bench.json", "bench.md", "bench.png"}


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1200)
def test_train(inside: Path):
    text = (ROOT / "examples" / "corpus" / "1973_oil_crisis.md").read_text(encoding="utf-8")
    (inside / "small.md").write_text(text[:1200], encoding="utf-8")
    (inside / "small.json").write_text('{"held_out_lessons": 2}')
    command = TRAIN.replace("examples/corpus", "small.md")
    output = documentation.run_kvlink(
        command, "--steps", "2", "--batch", "1", "--config", "small.json"
    )
    assert "adapter='my-adapter'" in output
    question = "When did the crisis begin?"
    output = documentation.run_kvlink(f"kvlink ask my-index '{question}' --adapter my-adapter")
    assert "recompute 15 %: TTFT" in output
    assert "4 hits, 0 misses" in output


@pytest.fixture
def question_sets(monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of question sets, which are not part of the repository."""
    folder = os.environ.get("KVLINK_DATA") or str(ROOT / "../shared/data")
    if not Path(folder).is_dir():
        pytest.skip("the question sets are absent: set KVLINK_DATA to their folder")
    monkeypatch.setenv("KVLINK_DATA", folder)
    return folder


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1200)
def test_eval(inside: Path, question_sets: str):
    documentation.run_kvlink(EVAL, "--questions", "1", "--max-new-tokens", "2")
    assert "link, smollm2-135m-link5" in (inside / "eval-results" / "results.md").read_text()
    smaller = ("--questions", "1", "--max-new-tokens", "2", "--out", "auto-results")
    documentation.run_kvlink(EVAL_AUTO, *smaller)
    assert "recompute 15 %, untuned" in (inside / "auto-results" / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1200)
def test_comparison_of_prefixes(inside: Path, question_sets: str):
    script, *_ = shlex.split(COMPARE)[1:]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--questions", "1", "--max-new-tokens", "2",
         "--out", str(inside / "rows.jsonl")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| all | 10 | 3 |" in done.stdout
    assert len((inside / "rows.jsonl").read_text().splitlines()) == 6
