"""`kvlink train` killed twice, once in the middle of a checkpoint: the run is as if undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file

from kvlink_rag import AdapterError, Chunk, KVLinkEngine
from kvlink_rag.training.run import last_checkpoint

STEPS, SAVE_STEPS = 48, 12
WORD = "blue"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IN_THE_MIDDLE = """
import os, signal
from kvlink_rag.cli import main
from kvlink_rag.training.run import _Trainer

# what is trained is written by now, and the optimiser's state is not
_Trainer._save_optimizer_and_scheduler = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""
"""`kvlink` that dies while it writes its next checkpoint."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that all have the same answer, and some text."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = []
    for number in range(200):
        docs = [{"text": f"Thing {rng.randrange(999)}.", "gold": at == 0} for at in range(4)]
        rows.append({"question": f"Colour {number}?", "answers": [WORD], "docs": docs})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"Words and {rng.randrange(999)} words."} for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


class Command:
    """`kvlink train` with the same options each time."""

    def __init__(self, model: Path, data: Path, out: Path) -> None:
        self.out = out
        self._arguments = [
            *("train", "--model", str(model), "--out", str(out)),
            *("--data", f"{data / 'questions.jsonl'}=0.9", "--data", f"{data / 'text.jsonl'}=0.1"),
            *("--links", "2", "--rank", "4", "--max-chunks", "4", "--batch", "4"),
            *("--learning-rate", "0.005", "--steps", str(STEPS), "--save-steps", str(SAVE_STEPS)),
        ]

    def start(self, *python: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        log = (self.out.parent / f"{self.out.name}.log").open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, *(python or ("-m", "kvlink_rag")), *self._arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> None:
        status = self.start().wait()
        assert status == 0, (self.out.parent / f"{self.out.name}.log").read_text()[-3000:]

    def kill_after_a_checkpoint(self) -> None:
        process = self.start()
        while process.poll() is None and last_checkpoint(self.out) is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def die_in_a_checkpoint(self) -> None:
        assert self.start("-c", IN_THE_MIDDLE).wait() == -signal.SIGKILL


def losses(out: Path) -> dict[int, float]:
    return {
        entry["step"]: entry["loss"] for entry in json.loads((out / "history.json").read_text())
    }


def test_killed_and_run_again_is_as_if_undisturbed(model_folder, data, tmp_path):
    whole = Command(model_folder, data, tmp_path / "whole")
    whole.finish()
    expected = losses(whole.out)
    assert list(expected) == list(range(1, STEPS + 1))
    assert sum(list(expected.values())[-5:]) < 0.3 * sum(list(expected.values())[:5])

    cut = Command(model_folder, data, tmp_path / "cut")
    cut.kill_after_a_checkpoint()
    first = last_checkpoint(cut.out)
    assert first is not None
    assert not (cut.out / "kvlink.json").exists()
    cut.die_in_a_checkpoint()
    [half] = [f for f in cut.out.glob("checkpoint-*") if not (f / "complete").exists()]
    assert (half / "trained.safetensors").exists()
    assert not (half / "optimizer.pt").exists()
    assert last_checkpoint(cut.out) == first
    cut.finish()

    assert losses(cut.out) == pytest.approx(expected, rel=1e-5)
    assert (half / "complete").exists() or not half.exists()
    for name in ("adapter_model.safetensors", "links.safetensors"):
        mine, theirs = load_file(cut.out / name), load_file(whole.out / name)
        assert mine.keys() == theirs.keys()
        for weight in mine:
            torch.testing.assert_close(mine[weight], theirs[weight], rtol=1e-5, atol=1e-5)
    assert (cut.out / "loss.png").read_bytes().startswith(b"\x89PNG")

    chunks = [Chunk("Grass is wet."), Chunk("Seas are deep.")]
    engine = KVLinkEngine.from_pretrained(str(model_folder), adapter=cut.out, strategy="link")
    assert engine.answer("Colour of the sky?", chunks, max_new_tokens=8).text == WORD
    torch.manual_seed(99)
    other = hf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]())
    with pytest.raises(AdapterError, match=r"was trained for .*, and the model has other weights"):
        KVLinkEngine.from_pretrained((other, tiny.tokenizer()), adapter=cut.out)
