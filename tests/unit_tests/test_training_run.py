from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kvlink_rag import (
    Adapter,
    AdapterError,
    AdapterRequiredError,
    Chunk,
    InputError,
    KVLinkEngine,
)
from kvlink_rag.cli import app
from kvlink_rag.store import FolderStore
from kvlink_rag.training import run
from kvlink_rag.training.data import Lessons
from kvlink_rag.training.held_out import NO_CHUNKS, held_out_losses
from kvlink_rag.training.model import LinkModel
from kvlink_rag.training.pack import Packer
from kvlink_rag.training.run import train
from kvlink_rag.training.settings import TrainSettings

WORD = "blue"
CHUNKS = [Chunk("Grass is wet."), Chunk("Seas are deep."), Chunk("Fire is hot.")]


def save(folder: Path, model: hf.PreTrainedModel) -> str:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny float32 model on disk."""
    return save(tmp_path_factory.mktemp("model"), tiny.model("llama"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions whose answer is always the same word."""
    rng, rows = random.Random(0), []
    for number in range(60):
        docs = [{"text": f"Thing {rng.randrange(99)}.", "gold": at == 0} for at in range(3)]
        rows.append({"question": f"Colour {number}?", "answers": [WORD], "docs": docs})
    return write(tmp_path_factory.mktemp("data") / "questions.jsonl", rows)


@pytest.fixture(autouse=True)
def _few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(model: LinkModel, packer: Packer, asked: TrainSettings) -> dict[str, float]:
        return held_out_losses(model, packer, replace(asked, held_out_lessons=2))

    monkeypatch.setattr(run, "held_out_losses", few)


def settings(model: str, data: str | dict[str, float], **changes: Any) -> TrainSettings:
    shares = {data: 1.0} if isinstance(data, str) else data
    quick = {"links": 2, "rank": 4, "max_chunks": 3, "batch": 2, "steps": 2, "max_answer": 8}
    rates = {"learning_rate": 1e-2, "link_learning_rate": 3e-2}
    return TrainSettings(**{"model": model, "data": shares, **quick, **rates, **changes})


class Engines:
    """The engines that runs load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[KVLinkEngine] = []
        load = KVLinkEngine.from_pretrained

        def remember(*arguments: Any, **options: Any) -> KVLinkEngine:
            self.made.append(load(*arguments, **options))
            return self.made[-1]

        monkeypatch.setattr(run.KVLinkEngine, "from_pretrained", remember)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    return Engines(monkeypatch)


def history(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "history.json").read_text())


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in history(out)]


# One whole run


class Trained:
    """A run of 30 steps and what it left."""

    def __init__(self, folder: Path, model: str, data: str) -> None:
        self.out, self.store = folder / "adapter", folder / "store"
        few = {"save_steps": 20, "held_out_lessons": 3}
        self.settings = settings(model, data, steps=30, batch=3, **few)
        with pytest.MonkeyPatch.context() as patch:
            engines = Engines(patch)
            self.adapter = train(self.settings, self.out, self.store)
            [self.engine] = engines.made
        self.model = model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: str, data: str) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), model_folder, data)


def test_loss_falls(trained):
    found = losses(trained.out)
    assert [entry["step"] for entry in history(trained.out)] == list(range(1, 31))
    assert all(map(math.isfinite, found))
    assert sum(found[-5:]) < 0.3 * sum(found[:5])


def test_held_out_losses_fall_in_every_view(trained):
    before, after = (trained.adapter.notes["held_out"][when] for when in ("before", "after"))
    assert before.keys() == after.keys() == {"link", "reuse", "full"}
    assert all(after[view] < 0.5 * before[view] for view in after)


@pytest.mark.parametrize("strategy", ["link", "reuse"])
def test_the_adapter_loads_and_answers_what_it_learnt(trained, strategy):
    base = KVLinkEngine.from_pretrained(trained.model)
    engine = KVLinkEngine.from_pretrained(trained.model, adapter=trained.out, strategy=strategy)
    question = "Colour of the sky?"
    assert base.answer(question, CHUNKS, max_new_tokens=8).text != WORD
    assert engine.answer(question, CHUNKS, max_new_tokens=8).text == WORD


def test_links_see_to_it_that_link_and_reuse_differ(trained):
    engine = KVLinkEngine.from_pretrained(trained.model, adapter=trained.out)
    link, reuse = (
        engine.prefill("Colour?", CHUNKS, strategy=strategy).logits
        for strategy in ("link", "reuse")
    )
    assert not torch.allclose(link, reuse, atol=1e-3)


def test_all_that_is_trained_changed_and_the_base_model_did_not(trained):
    untrained = run.first_links(trained.settings, trained.engine)
    links = trained.adapter.links
    assert links.embeddings.shape == (2, 64)
    assert (links.embeddings != untrained.embeddings).all()
    lora = {name: w for name, w in trained.adapter.lora_weights.items() if "lora_B" in name}
    assert len(lora) == 4 * 7  # layers, linear layers
    assert all(weight.any() for weight in lora.values())  # zero before training
    base = tiny.model("llama").state_dict()
    kept = trained.engine.model.state_dict()
    assert base.keys() == kept.keys()
    assert all(torch.equal(kept[name], weight) for name, weight in base.items())


def test_the_adapter_on_disk_is_the_one_returned(trained):
    loaded = KVLinkEngine.from_pretrained(trained.model, adapter=trained.out).adapter
    assert loaded.fingerprint == trained.adapter.fingerprint
    assert loaded.notes == json.loads(json.dumps(trained.adapter.notes))
    assert loaded.encode_behind == "system"


def test_everything_is_in_the_folder(trained):
    out = trained.out
    assert json.loads((out / "settings.json").read_text()) == trained.settings.to_json()
    assert json.loads((out / "kvlink.json").read_text())["kind"] == "cache-preserving"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    saved = load_file(out / "adapter_model.safetensors")
    prefix = "base_model.model."  # as peft has it
    assert {name.removeprefix(prefix) for name in saved} == trained.adapter.lora_weights.keys()
    assert load_file(out / "links.safetensors")["embeddings"].shape == (2, 64)
    picture = (out / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert not (out / "chunk-caches").exists()
    assert not list(out.glob("*.new"))


def test_tensorboard_shows_the_loss(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = trained.out.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events))
    shown.Reload()
    scalars = shown.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 31))
    assert [scalar.value for scalar in scalars] == pytest.approx(losses(trained.out))


def test_the_chunk_caches_are_the_base_models(trained):
    engine = KVLinkEngine.from_pretrained(trained.model, adapter=trained.out, store=trained.store)
    row = json.loads(Path(*trained.settings.data).read_text().splitlines()[1])
    chunks = [Chunk(doc["text"]) for doc in row["docs"]]
    report = engine.prefill("Colour?", chunks, strategy="link").report
    assert (report.hits, report.misses) == (3, 0)


def test_checkpoints_are_complete_and_hold_what_is_trained_alone(trained):
    folders = sorted(path.name for path in trained.out.glob("checkpoint-*"))
    assert folders == ["checkpoint-20", "checkpoint-30"]
    assert run.last_checkpoint(trained.out).name == "checkpoint-30"
    weights = load_file(trained.out / "checkpoint-30" / "trained.safetensors")
    assert all("lora_" in name or name == "link_embeddings" for name in weights)
    torch.testing.assert_close(weights["link_embeddings"], trained.adapter.links.embeddings)


def test_a_finished_run_that_is_run_again_changes_nothing(trained, tmp_path):
    out = tmp_path / "adapter"
    shutil.copytree(trained.out, out)
    again = train(trained.settings, out, trained.store)
    assert again.fingerprint == trained.adapter.fingerprint
    assert history(out) == history(trained.out)
    assert again.notes["held_out"]["before"] == trained.adapter.notes["held_out"]["before"]


def test_a_folder_of_another_run_is_left_alone(trained, data):
    other = settings(trained.model, data, steps=31, save_steps=20, batch=3)
    files = {path: path.stat().st_mtime_ns for path in trained.out.rglob("*")}
    with pytest.raises(
        InputError, match=r"holds a run with other settings .*choose another folder"
    ):
        train(other, trained.out)
    assert files == {path: path.stat().st_mtime_ns for path in trained.out.rglob("*")}


def test_another_base_model_is_a_clear_error(trained, tmp_path):
    torch.manual_seed(99)
    same_sizes = hf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]())
    with pytest.raises(AdapterError, match=r"trained for .*has other weights"):
        KVLinkEngine.from_pretrained(save(tmp_path / "a", same_sizes), adapter=trained.out)
    with pytest.raises(AdapterError, match=r"trained for .*model_type qwen2"):
        KVLinkEngine.from_pretrained(save(tmp_path / "b", tiny.model("qwen2")), adapter=trained.out)


# Kinds, layouts, and less than all of it


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"layout": "slot", "slots": 4}, 8),
        ({"layout": "tail"}, 2),
        ({"kind": "whole-model"}, 2),
        ({"kind": "whole-model", "layout": "tail", "encode_behind": "system"}, 2),
        ({"rank": 0}, 2),
        ({"distill": 0.5}, 2),
    ],
    ids=str,
)
def test_every_kind_and_layout_trains(model_folder, data, tmp_path, engines, changes, rows):
    chosen = settings(model_folder, data, min_chunks=3, views={"link": 1}, **changes)
    adapter = train(chosen, tmp_path)
    engine = KVLinkEngine.from_pretrained(model_folder, adapter=tmp_path, strategy="link")
    assert engine.adapter.fingerprint == adapter.fingerprint
    assert engine.adapter.kind == chosen.kind
    assert engine.adapter.encode_behind == chosen.behind
    links = engine.adapter.links
    assert (links.layout, len(links.embeddings)) == (chosen.layout, rows)
    assert links.slots == changes.get("slots")
    moved = (links.embeddings != run.first_links(chosen, engines.made[0]).embeddings).any(-1)
    assert moved[:6].all()  # of the three chunks of each lesson
    assert not moved[6:].any()
    assert (tmp_path / "adapter_config.json").exists() == bool(chosen.rank)
    assert engine.answer("Colour?", CHUNKS, max_new_tokens=2).report.computed_tokens
    base = tiny.model("llama").state_dict()
    kept = engines.made[0].model.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in base.items())


# Going on from an adapter


def small_steps(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-9, "link_learning_rate": 1e-9, "steps": 1, **changes}


def test_a_run_begins_with_the_adapter_it_is_given(trained, data, tmp_path):
    chosen = settings(trained.model, data, start=str(trained.out), **small_steps())
    adapter = train(chosen, tmp_path)
    before = {**trained.adapter.lora_weights, "links": trained.adapter.links.embeddings}
    after = {**adapter.lora_weights, "links": adapter.links.embeddings}
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    found = adapter.notes["held_out"]
    known = trained.adapter.notes["held_out"]["after"]
    assert found["before"] == pytest.approx(known, abs=1e-4)


def test_it_learns_its_own_full_prefill(trained, data, tmp_path):
    chosen = settings(trained.model, data, start=str(trained.out), views={"link": 1, "full": 1})
    adapter = train(TrainSettings(**{**vars(chosen), **small_steps(distill=1.0)}), tmp_path)
    found = adapter.notes["held_out"]["before"]
    assert abs(found["full"]) < 1e-6 < found["link"]


def test_a_lora_goes_on_without_the_link_tokens(trained, data, tmp_path):
    chosen = settings(
        trained.model, data, start=str(trained.out), links=0, views={"reuse": 1}, **small_steps()
    )
    adapter = train(chosen, tmp_path)
    assert adapter.links is None
    for name, weight in trained.adapter.lora_weights.items():
        torch.testing.assert_close(adapter.lora_weights[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"links": 3}, "has links 2, and the settings ask for 3"),
        ({"layout": "tail"}, "has layout 'shared', and the settings ask for 'tail'"),
        ({"kind": "whole-model"}, "has kind 'cache-preserving'"),
        ({"encode_behind": "alone"}, "has encode_behind 'system'"),
        ({"rank": 8}, "has rank 4, and the settings ask for 8"),
        ({"alpha": 1}, "has alpha 32, and the settings ask for 1"),
    ],
    ids=str,
)
def test_an_adapter_of_another_make_is_refused(trained, data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(settings(trained.model, data, start=str(trained.out), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there_is_a_clear_error(model_folder, data, tmp_path):
    with pytest.raises(AdapterError, match="nowhere"):
        train(settings(model_folder, data, start="nowhere"), tmp_path / "out")


def test_without_link_tokens_a_lora_is_trained_that_reads_reused_chunks(
    model_folder, data, tmp_path
):
    views = {"reuse": 0.7, "full": 0.3}
    adapter = train(settings(model_folder, data, links=0, views=views), tmp_path)
    assert adapter.links is None
    assert any(weight.any() for name, weight in adapter.lora_weights.items() if "lora_B" in name)
    engine = KVLinkEngine.from_pretrained(model_folder, adapter=tmp_path)
    base = KVLinkEngine.from_pretrained(model_folder)
    tuned, untuned = (e.prefill("Colour?", CHUNKS).logits for e in (engine, base))
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    with pytest.raises(AdapterRequiredError, match="'link' needs an adapter"):
        KVLinkEngine.from_pretrained(model_folder, adapter=tmp_path, strategy="link")


def test_link_tokens_alone_are_trained_also_where_no_lesson_of_a_batch_has_them(
    model_folder, data, tmp_path
):
    views = {"link": 0.3, "reuse": 0.7}
    chosen = settings(model_folder, data, rank=0, batch=1, steps=6, views=views)
    seen = {lesson.view for lesson in Lessons(chosen, 6)}
    assert seen == {"link", "reuse"}
    assert train(chosen, tmp_path).lora_config is None


@pytest.mark.parametrize(("kind", "hits"), [("cache-preserving", 3), ("whole-model", 0)])
def test_the_base_models_caches_serve_a_cache_preserving_adapter_alone(
    model_folder, data, tmp_path, kind, hits
):
    store = tmp_path / "store"
    KVLinkEngine.from_pretrained(model_folder, store=store, encode_behind="system").index(
        CHUNKS, progress=False
    )
    out = tmp_path / "adapter"
    train(settings(model_folder, data, kind=kind, encode_behind="system"), out)
    engine = KVLinkEngine.from_pretrained(model_folder, adapter=out, store=store)
    report = engine.prefill("Colour?", CHUNKS, strategy="link").report
    assert (report.hits, report.misses) == (hits, 3 - hits)


def test_a_bfloat16_model_trains(data, tmp_path):
    torch.manual_seed(0)
    half = hf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).bfloat16()
    folder = save(tmp_path / "model", half)
    adapter = train(
        settings(folder, data, steps=12, distill=0.1, dtype="bfloat16"), tmp_path / "adapter"
    )
    found = losses(tmp_path / "adapter")
    assert all(map(math.isfinite, found))
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    assert {weight.dtype for weight in adapter.lora_weights.values()} == {torch.bfloat16}
    assert adapter.links.embeddings.dtype == torch.bfloat16
    [checkpoint] = (tmp_path / "adapter").glob("checkpoint-12")
    weights = load_file(checkpoint / "trained.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    engine = KVLinkEngine.from_pretrained(folder, adapter=tmp_path / "adapter", strategy="link")
    assert engine.answer("Colour?", CHUNKS, max_new_tokens=2).token_ids


# Batches


def weights_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {**adapter.lora_weights, "links": adapter.links.embeddings}


def assert_same_weights(one: Adapter, other: Adapter) -> None:
    expected = weights_of(other)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_forward_passes_of_a_step_are_as_one_of_all_their_lessons(model_folder, data, tmp_path):
    # lessons of one question each
    two = train(settings(model_folder, data, batch=2, accumulate=2, steps=3), tmp_path / "two")
    one = train(settings(model_folder, data, batch=4, accumulate=1, steps=3), tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert_same_weights(two, one)


@pytest.fixture
def packs(model_folder: str, tmp_path: Path) -> tuple[LinkModel, list[Any]]:
    """A model, and two packs of one turn and two of four."""
    engine = KVLinkEngine.from_pretrained(model_folder)
    chosen = settings(model_folder, "none")
    links = run.first_links(chosen, engine)
    model = LinkModel(engine.model, engine.architecture, run.lora_config(chosen), links)
    packer = Packer(engine, "cache-preserving", links, max_tokens=2048, max_answer=64)
    made = []
    for at, count in enumerate((1, 1, 4, 4)):
        paragraph = {
            "text": f"{at} bees.",
            "qas": [{"question": f"How {q}?", "answers": ["so " * q]} for q in range(1, count + 1)],
        }
        path = write(tmp_path / f"{at}.jsonl", [{"paragraphs": [paragraph]}])
        lesson = Lessons(settings(model_folder, path), 1)[0]
        assert len(lesson.turns) == count
        made.append(packer.pack(lesson))
    return model, made


@torch.no_grad()
def test_in_a_forward_pass_every_question_weighs_the_same(packs):
    model, four = packs
    each = [float(model([pack])["loss"]) for pack in four]
    expected = sum(loss * turns for loss, turns in zip(each, (1, 1, 4, 4), strict=True)) / 10
    assert float(model(four)["loss"]) == pytest.approx(expected, rel=1e-5)


def test_in_a_step_every_forward_pass_weighs_the_same(model_folder, tmp_path, packs, monkeypatch):
    # as transformers' Trainer has it: with other numbers of questions not one pass of all lessons
    model, four = packs
    with torch.no_grad():
        passes = [float(model(four[at : at + 2])["loss"]) for at in (0, 2)]
        together = float(model(four)["loss"])
    assert sum(passes) / 2 != pytest.approx(together, rel=1e-3)  # or this proves nothing
    ready = iter([four[:2], four[2:]])
    monkeypatch.setattr(run._Collator, "__call__", lambda *_: {"packs": next(ready)})
    path = write(tmp_path / "any.jsonl", [{"text": "none of it is used"}] * 8)
    chosen = settings(model_folder, path, batch=2, accumulate=2, steps=1, seed=0)
    monkeypatch.setattr(run, "LinkModel", lambda *_: model)
    train(chosen, tmp_path / "out")
    assert losses(tmp_path / "out") == pytest.approx([sum(passes) / 2], rel=1e-4)


def test_the_same_settings_give_the_same_adapter(model_folder, data, tmp_path):
    first, again, other = (
        train(settings(model_folder, data, seed=seed), tmp_path / name)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert_same_weights(again, first)
    assert not torch.allclose(other.links.embeddings, first.links.embeddings)


# Going on


def make_checkpoint(out: Path, step: int, complete: bool = True) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "complete").touch()
    return folder


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert run.last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 5, complete=False)
    assert run.last_checkpoint(tmp_path) is None
    nine, ten = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    assert run.last_checkpoint(tmp_path) == ten  # numbers, not names
    (ten / "complete").unlink()
    assert run.last_checkpoint(tmp_path) == nine


def test_an_interrupted_run_goes_on_as_if_undisturbed(model_folder, data, tmp_path, monkeypatch):
    chosen = settings(model_folder, data, steps=6, save_steps=2)
    whole = train(chosen, tmp_path / "whole")
    pack, packed = Packer.pack, []

    def interrupted(self: Packer, lesson: Any) -> Any:
        packed.append(lesson)
        if len(packed) == 15:  # six of them held out; each step packs the next one's two
            raise KeyboardInterrupt
        return pack(self, lesson)

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, tmp_path / "cut")
    assert run.last_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    assert len(history(tmp_path / "cut")) == 2
    assert (tmp_path / "cut" / "chunk-caches").exists()
    resumed = train(chosen, tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert_same_weights(resumed, whole)
    assert not (tmp_path / "cut" / "chunk-caches").exists()


def test_a_checkpoint_of_other_weights_is_refused(model_folder, data, tmp_path):
    chosen = settings(model_folder, data)
    train(chosen, tmp_path)
    save_file(
        {"link_embeddings": torch.zeros(2, 64)}, tmp_path / "checkpoint-2/trained.safetensors"
    )
    with pytest.raises(InputError, match=r"checkpoint .*checkpoint-2 is of another run"):
        train(chosen, tmp_path)


def test_caches_of_a_store_that_is_given_are_kept(model_folder, data, tmp_path):
    chosen = settings(model_folder, data)
    train(chosen, tmp_path / "one", tmp_path / "store")
    store = FolderStore(tmp_path / "store")
    kept = store.stat().entries
    store.close()
    assert kept > 3
    assert not (tmp_path / "one" / "chunk-caches").exists()


# Held-out lessons


def test_held_out_losses_are_of_each_view_and_the_same_each_time(model_folder, data, tmp_path):
    text = write(tmp_path / "t.jsonl", [{"text": f"Words and words {n}."} for n in range(20)])
    chosen = settings(
        model_folder,
        {data: 1.0, text: 1.0},
        views={"link": 1, "full": 0.5, "reuse": 0},
        held_out_lessons=6,
    )
    engine = KVLinkEngine.from_pretrained(model_folder)
    links = run.first_links(chosen, engine)
    model = LinkModel(engine.model, engine.architecture, run.lora_config(chosen), links)
    packer = Packer(engine, chosen.kind, links, max_tokens=2048, max_answer=8)
    first, again = (held_out_losses(model, packer, chosen) for _ in range(2))
    assert first == again
    assert first.keys() == {"link", "full", NO_CHUNKS}
    assert first[NO_CHUNKS] == pytest.approx(0, abs=1e-5)  # an untrained adapter is the base model
    assert first["link"] > 1


# The command


def kvlink(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments])


def test_the_command_trains(model_folder, data, tmp_path):
    out = tmp_path / "adapter"
    done = kvlink(
        *("--model", model_folder, "--data", f"{data}=2", "--out", str(out), "--links", "3"),
        *("--layout", "tail", "--kind", "whole-model", "--rank", "2", "--steps", "2"),
        *("--batch", "1", "--learning-rate", "0.01", "--max-chunks", "3", "--save-steps", "1"),
        *("--seed", "5", "--store", str(tmp_path / "store")),
    )
    assert done.exit_code == 0, done.output
    assert "held-out lessons, loss before and after:" in done.output
    assert f"adapter={str(out)!r}" in done.output
    made = json.loads((out / "settings.json").read_text())
    expected = TrainSettings(
        model=model_folder, data={data: 2.0}, links=3, layout="tail", kind="whole-model", rank=2,
        steps=2, batch=1, learning_rate=0.01, max_chunks=3, save_steps=1, seed=5,
    )  # fmt: skip
    assert made == expected.to_json()
    assert KVLinkEngine.from_pretrained(model_folder, adapter=out, strategy="link").adapter


def test_options_replace_what_the_file_of_settings_says(model_folder, data, tmp_path):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings(model_folder, data, steps=50, seed=4).to_json()))
    done = kvlink("--config", str(config), "--steps", "1", "--out", str(tmp_path / "adapter"))
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "adapter" / "settings.json").read_text())
    assert (made["steps"], made["seed"], made["links"]) == (1, 4, 2)


def test_documents_alone_are_enough(model_folder, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("bees", "ants"):
        (docs / f"{name}.md").write_text(f"# All about {name}\n\n" + f"The {name} are busy. " * 5)
    out = tmp_path / "adapter"
    chosen = settings(model_folder, str(docs))
    adapter = train(chosen, out)
    questions = [json.loads(line) for line in (out / "questions.jsonl").open()]
    assert [row["article"] for row in questions] == ["All about ants", "All about bees"]
    assert adapter.notes["settings"]["data"] == {str(docs): 1.0}
    assert json.loads((out / "settings.json").read_text())["data"] == {str(docs): 1.0}
    assert train(chosen, out).fingerprint == adapter.fingerprint  # its questions are there


def test_documents_and_questions_together(model_folder, data, tmp_path):
    (tmp_path / "a.txt").write_text("Bees are busy.")
    engine = KVLinkEngine.from_pretrained(model_folder)
    chosen = settings(model_folder, {data: 2.0, str(tmp_path / "a.txt"): 3.0})
    made = run._with_questions(chosen, engine, tmp_path)
    assert made.data == {data: 2.0, str(tmp_path / "questions.jsonl"): 3.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: data needs entries with shares above 0"),
        (["--data", "none.jsonl"], "error: no training data at none.jsonl"),
        (["--data", "none.txt"], "error: no such file or folder"),
        (["--data", "a=b"], "error: --data 'a=b': 'b' is no share"),
        (["--data", "a", "--steps", "0"], "error: steps must be at least 1, not 0"),
        (["--config", "none.json"], "error: settings none.json cannot be read"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(model_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path))
    done = kvlink("--model", model_folder, "--out", str(tmp_path / "out"), *arguments)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]
