"""What the README tells people to type works: every command and every block of code is run."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import documentation
import pytest
from documentation import README, ROOT
from effort import times

from kvlink_rag.tuning import codec
from kvlink_rag.tuning.codec import built_in_cases

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]

COMMANDS = documentation.commands(README)
KVLINK = [command for command in COMMANDS if command.startswith("kvlink ")]
BY_MAKE = {"make demo": "kvlink demo", "make test": "pytest"}
INSTALL = "pip install ."
MOST = times(full=100, quick=1)
"""Questions, and chunks of each, that the codec of a new index is chosen by."""
LONGEST = 150
"""Lines: what is longer belongs into docs/."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples' articles, where the commands run in turn."""
    made = tmp_path_factory.mktemp("readme")
    documentation.small_corpus(made)
    return made


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(codec, "built_in_cases", few_cases)


def few_cases() -> list[codec.Case]:
    return [(question, chunks[:MOST]) for question, chunks in built_in_cases()[:MOST]]


def test_every_command_is_run_by_a_test_below():
    assert {*COMMANDS} == {*KVLINK, *BY_MAKE, INSTALL}


def test_every_block_is_run():
    for block in documentation.all_blocks(README):
        known = documentation.RUN + documentation.SHOWN
        assert block.language in known, f"README.md, line {block.line}"
        assert block.reason is None, f"README.md, line {block.line}"


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_what_it_links_to_is_there():
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 10
    for link in links:
        name, _, anchor = link.partition("#")
        assert (ROOT / name).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.M)
            assert anchor in {documentation.anchor(heading) for heading in headings}, link


@pytest.mark.parametrize("command", KVLINK)
def test_commands(command: str):
    output = documentation.run_kvlink(command)
    if command.startswith("kvlink ask"):
        assert "apollo_program" in output
        assert "4 hits, 0 misses" in output


@pytest.mark.parametrize("command", sorted(BY_MAKE))
def test_make_targets_exist(command: str):
    assert BY_MAKE[command] in documentation.check_make(command)


def test_pip_install_gives_package_corpus_and_command(tmp_path: Path):
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
    assert not any(name.startswith(("tests", "benchmarks", "docs")) for name in names)


@pytest.mark.parametrize("block", documentation.blocks(README, "python"), ids=lambda b: b.line)
def test_python_blocks(block: documentation.Block, capsys: pytest.CaptureFixture[str]):
    documentation.run_python(block, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "block", documentation.blocks(README, "diff"), ids=documentation.framework_of
)
def test_stock_pipelines_and_their_three_changed_lines(
    block: documentation.Block, capsys: pytest.CaptureFixture[str]
):
    names = documentation.run_diff(block, capsys)
    assert names["llm"].engine.store.stat().documents == 2
