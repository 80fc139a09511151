"""Fixtures shared by all tests, and what ``--quick`` leaves out."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported: the tests' tiny models run slower on many threads than on few.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import effort
import pytest

LONGEST_FIRST = (
    "test_notebooks.py",
    "test_docs.py",
    "test_readme.py",
    "test_default_model.py",
    "test_llama_index_default_model.py",
    "test_cli.py",
    "test_adapter_exactness.py",
    "test_training_run.py",
    "test_evaluation_run.py",
    "test_bench.py",
    "test_exactness.py",
    "test_in_place.py",
    "test_training_pack.py",
)
"""Files that take longest: a worker that begins one last works on alone at the end."""

left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="what `make test` runs: no test marked slow, a covering choice of each matrix, and "
        "fewer tries where faults are sought by trying often",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[left_out] = 0
    if config.getoption("quick"):
        os.environ[effort.ENVIRONMENT] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))
    if not config.getoption("quick"):
        return
    dropped = {item for item in items if item.get_closest_marker("slow")}
    dropped |= not_chosen([item for item in items if item not in dropped])
    config.stash[left_out] = len(dropped)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def not_chosen(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests marked `matrix` that are not of the covering choice."""
    matrices: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("matrix") and hasattr(item, "callspec"):
            matrices.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped: set[pytest.Item] = set()
    for matrix in matrices.values():
        rows = [{k: repr(v) for k, v in item.callspec.params.items()} for item in matrix]
        together = matrix[0].get_closest_marker("matrix").kwargs.get("together", 2)
        chosen = {matrix[index] for index in effort.covering(rows, together)}
        dropped |= set(matrix) - chosen
    return dropped


# With pytest-xdist only the workers collect: one of them tells how many it left out.


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash[left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[left_out] = max(node.config.stash[left_out], told)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[left_out]:
        terminalreporter.write_line(
            f"{config.stash[left_out]} tests of the full matrix were left out, and other tests try "
            "less often than they can: `make test-all` runs everything"
        )


@pytest.fixture
def raw_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """New folders keep caches as they are: for tests of what a store does with any of them."""
    monkeypatch.setattr("kvlink_rag.store.folder.store.DEFAULT_CODEC", "raw")


@pytest.fixture
def short_preamble(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few made-up documents to encode chunks behind: a tiny tokenizer's tokens are bytes."""
    from kvlink_rag import Chunk
    from kvlink_rag.prompt import layout

    made_up = (Chunk("Bees dance.", title="Bees"), Chunk("Rope is long."))
    monkeypatch.setattr(layout, "PREAMBLE", made_up)


@pytest.fixture(scope="session")
def default_model_folder() -> str:
    """The default model's folder, fetched and converted on first use."""
    from kvlink_rag.runners.transformers import models

    return models.resolve(models.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def default_embeddings_folder() -> str:
    """The default embedding model's folder, fetched on first use."""
    from kvlink_rag.runners.transformers import models

    return models.resolve(models.DEFAULT_EMBEDDINGS)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)
