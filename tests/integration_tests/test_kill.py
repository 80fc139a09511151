"""`kvlink index` killed at random instants, then run again: the index is as if undisturbed.

KVLINK_KILLS sets how many instants are tried (otherwise 12, or 3 of `make test`).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from effort import times
from tqdm import tqdm

KILLS = int(os.environ.get("KVLINK_KILLS", times(full=12, quick=3)))
WORDS = ["tower", "river", "stone", "light", "water", "north", "bridge", "built", "many", "old"]

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]


def write_files(folder: Path, names: range, seed: int) -> None:
    """Text files of a few chunks each; those with the same name and seed are the same."""
    folder.mkdir(exist_ok=True)
    for name in names:
        rng = random.Random(1000 * seed + name)
        text = " ".join(rng.choice(WORDS) + str(rng.randrange(99)) for _ in range(150))
        (folder / f"file-{name}.txt").write_text(text)


def run_index(documents: Path, out: Path, model: Path, kill_after_s: float | None = None) -> bool:
    """`kvlink index` in a fork of this process (which has done the slow imports already).

    Returns:
        whether it came to its end (False: killed before).
    """
    return forked(lambda: index_command(documents, out, model), kill_after_s)


def index_command(documents: Path, out: Path, model: Path) -> None:
    from kvlink_rag.cli import app

    arguments = ["index", str(documents), "--out", str(out), "--model", str(model)]
    app([*arguments, "--chunk-tokens", "120", "--overlap", "10"], standalone_mode=False)


def forked(work: Callable[[], None], kill_after_s: float | None = None) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            # tqdm's own is shared with all children of this process: one that is killed while it
            # holds it would stop every later one for good
            tqdm.set_lock(threading.RLock())
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status)


def contents(out: Path) -> tuple[dict, dict, dict]:
    """Rows, files and caches of an index, as they lie on disk."""
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.store import FolderStore

    catalog, store = IndexCatalog(out), FolderStore(out / "kv")
    ids = catalog.ids()
    rows = {chunk.document_id: (chunk.text, chunk.title) for chunk in catalog.get(ids)}
    sources = catalog.sources()
    caches = {}
    for document, key in store.references():
        record = store.get(key)
        assert record is not None, f"{document} refers to {key}, which cannot be read"
        caches[document, key] = record
    catalog.close()
    store.close()
    return rows, sources, caches


def verify(out: Path) -> None:
    from kvlink_rag.index.check import prune_index, verify_index

    assert not verify_index(out).corrupt
    prune_index(out)
    assert verify_index(out).clean


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first_index(tmp_path_factory, model_folder, default_embeddings_folder) -> tuple[Path, Path]:
    """Documents and their index, before a change."""
    import sentence_transformers  # noqa: F401  slow to import: done once, before the forks

    import kvlink_rag.cli
    import kvlink_rag.index.index  # noqa: F401

    folder = tmp_path_factory.mktemp("first")
    write_files(folder / "documents", range(6), seed=0)
    assert run_index(folder / "documents", folder / "index", model_folder)
    return folder / "documents", folder / "index"


def change(documents: Path) -> None:
    """Three files changed, two removed, six new."""
    write_files(documents, range(3), seed=1)
    for name in (4, 5):
        (documents / f"file-{name}.txt").unlink()
    write_files(documents, range(6, 12), seed=0)


def prepared(first_index: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """The first index and the changed documents, at the same place every time."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(first_index[0], folder / "documents")
    write_files(folder / "documents", range(6), seed=0)
    return folder / "documents", folder / "index"


def test_killed_and_run_again_is_as_if_undisturbed(first_index, model_folder, tmp_path):
    folder = tmp_path / "work"
    documents, out = prepared(first_index, folder)
    assert run_index(documents, out, model_folder)
    start_state = tmp_path / "start"
    shutil.copytree(folder, start_state)
    change(documents)
    started = time.monotonic()
    assert run_index(documents, out, model_folder)
    duration = time.monotonic() - started
    verify(out)
    expected = contents(out)
    rng, killed = random.Random(0), 0
    for _ in range(KILLS):
        shutil.rmtree(folder)
        shutil.copytree(start_state, folder)
        change(documents)
        killed += not run_index(documents, out, model_folder, rng.uniform(0, duration))
        assert run_index(documents, out, model_folder)
        verify(out)
        assert_same(contents(out), expected)
        assert forked(lambda: every_chunk_is_whole(out))
    assert killed >= KILLS // 2


def every_chunk_is_whole(out: Path) -> None:
    """The index opened as users do: vectors, texts and caches belong together."""
    from kvlink_rag import KVIndex, KVLinkEngine

    engine = KVLinkEngine.from_pretrained((tiny.model("llama"), tiny.tokenizer()))
    with KVIndex.open(out, engine) as index:
        chunks = index.get(index.ids())
        found = index.search(chunks[0].text, k=2 * len(chunks))
        assert sorted(chunk.document_id for chunk in found) == sorted(index.ids())
        for start in range(0, len(chunks), 10):
            assert index.engine.prefill("What?", chunks[start : start + 10]).report.misses == 0


def assert_same(actual: tuple[dict, dict, dict], expected: tuple[dict, dict, dict]) -> None:
    assert actual[0] == expected[0]
    assert actual[1] == expected[1]
    assert actual[2].keys() == expected[2].keys()
    for place, record in actual[2].items():
        # batches differ after a kill, so the last bits may; the tokens may not
        assert record.token_ids == expected[2][place].token_ids
        torch.testing.assert_close(record.keys, expected[2][place].keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(record.values, expected[2][place].values, atol=1e-5, rtol=1e-4)
