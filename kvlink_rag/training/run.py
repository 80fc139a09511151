"""A training run: transformers' Trainer over lessons, from settings to an adapter on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kvlink_rag.adapters.adapter import Adapter
from kvlink_rag.adapters.base_model import BaseModel
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.adapters.load import load_adapter
from kvlink_rag.chunk import RAW
from kvlink_rag.common.whole import write_whole
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.layout import PromptTemplate
from kvlink_rag.store import KVStore, is_store, open_store
from kvlink_rag.training.data import Lessons
from kvlink_rag.training.held_out import held_out_losses
from kvlink_rag.training.lesson import Lesson
from kvlink_rag.training.model import LinkModel
from kvlink_rag.training.own_documents import is_documents, write_questions
from kvlink_rag.training.pack import Pack, Packer
from kvlink_rag.training.plot import plot_losses
from kvlink_rag.training.settings import TrainSettings

SETTINGS = "settings.json"
TRAINED = "trained.safetensors"
"""The weights in training, float32, in each checkpoint."""
HISTORY = "history.json"
BEFORE = "held-out-before.json"
QUESTIONS = "questions.jsonl"
STORE = "chunk-caches"


def train(settings: TrainSettings, out: Path, store: Path | None = None) -> Adapter:
    """Train an adapter, or go on where an earlier run with the same settings stopped.

    Args:
        out: folder for checkpoints, curves and in the end the adapter.
        store: where the base model's chunk caches are kept between epochs and runs; None keeps
            them in ``out`` until the adapter is done.

    Raises:
        InputError: ``out`` holds a run with other settings, the data cannot be read, or the adapter
            to go on from is of another make.
        AdapterError: there is no such adapter, or it is for another model.
    """
    asked = settings
    first = load_adapter(settings.start) if settings.start else None
    if first is not None:
        _check_first(settings, first)
    _claim(out, settings)
    set_seed(settings.seed)
    engine = KVLinkEngine.from_pretrained(
        settings.model,
        store=_opened(store or out / STORE),
        dtype=settings.dtype,
        encode_behind=settings.behind,
    )
    settings = _with_questions(settings, engine, out)
    links = first_links(settings, engine)
    if first is not None and links is not None:
        links = first.links or links
    model = LinkModel(engine.model, engine.architecture, lora_config(settings), links)
    if first is not None and settings.rank:
        first.load_lora(model.reader)
    packer = Packer(
        engine,
        settings.kind,
        links,
        teacher=None if first is None else engine.with_adapter(first),
        max_tokens=min(settings.max_tokens, engine.architecture.max_tokens),
        max_answer=settings.max_answer,
        distill=settings.distill,
    )
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, out, engine),
        train_dataset=cast(
            "Any", Lessons(settings, settings.steps * settings.batch * settings.accumulate)
        ),
        data_collator=_Collator(packer),
        callbacks=[_Curves(out)],
    )
    trainer.link_learning_rate = settings.link_learning_rate
    checkpoint = last_checkpoint(out)
    model.eval()  # nothing in it is random
    if checkpoint is None:
        _write_json(out / BEFORE, held_out_losses(model, packer, settings))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    before = json.loads((out / BEFORE).read_text(encoding="utf-8"))
    after = held_out_losses(model, packer, settings)
    plot_losses(history, before, after, out / "loss.png")
    notes = {"settings": asked.to_json(), "held_out": {"before": before, "after": after}}
    adapter = make_adapter(settings, engine, model, notes)
    adapter.save(out)
    if store is None:
        shutil.rmtree(out / STORE, ignore_errors=True)
    return adapter


def _opened(path: Path) -> KVStore:
    """A folder with the codec that it was made with; a new one keeps caches exactly."""
    return open_store(path, codec=None if is_store(path) else RAW)


def _with_questions(settings: TrainSettings, engine: KVLinkEngine, out: Path) -> TrainSettings:
    """Documents among the data are replaced by questions that the model writes to them, once."""
    shares = {p: share for p, share in settings.data.items() if is_documents(Path(p).expanduser())}
    if not shares:
        return settings
    questions = out / QUESTIONS
    if not questions.is_file():  # a run goes on with the documents that it began with
        write_questions(engine, [Path(path).expanduser() for path in shares], questions)
    rest = {path: share for path, share in settings.data.items() if path not in shares}
    return replace(settings, data={**rest, str(questions): sum(shares.values())})


def lora_config(settings: TrainSettings) -> dict[str, Any] | None:
    """peft's settings for a run."""
    if not settings.rank:
        return None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": "all-linear",
    }


def first_links(settings: TrainSettings, engine: KVLinkEngine) -> LinkTokens | None:
    """Untrained link tokens: embeddings of words drawn at random, so that their size is right."""
    if not settings.links:
        return None
    table: Any = engine.model.get_input_embeddings()
    words = table.weight.shape[0]
    slots = settings.slots if settings.layout == "slot" else None
    links = LinkTokens(settings.layout, settings.links, words, slots)
    draw = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(words, (links.size,), generator=draw).to(table.weight.device)
    with torch.no_grad():
        return replace(links, embeddings=table(ids))


def _check_first(settings: TrainSettings, first: Adapter) -> None:
    """An adapter to go on from has to be what the settings make."""
    links, lora = first.links, first.lora_config or {}
    has: dict[str, Any] = {
        "kind": first.kind,
        "encode_behind": first.encode_behind,
        "rank": lora.get("r", 0),
    }
    asked: dict[str, Any] = {
        "kind": settings.kind,
        "encode_behind": settings.behind,
        "rank": settings.rank,
    }
    if settings.rank:
        has["alpha"], asked["alpha"] = lora.get("lora_alpha"), settings.alpha
    if links is not None and settings.links:  # without, they are left out
        has |= {"layout": links.layout, "links": links.count, "slots": links.slots}
        slots = settings.slots if settings.layout == "slot" else None
        asked |= {"layout": settings.layout, "links": settings.links, "slots": slots}
    if wrong := [name for name in asked if asked[name] != has[name]]:
        raise InputError(
            f"start: adapter {settings.start!r} has {wrong[0]} {has[wrong[0]]!r}, and the settings "
            f"ask for {asked[wrong[0]]!r}: make them the same, or begin anew (without start)"
        )
    if links is not None and settings.links and links.embeddings is None:
        raise InputError(f"start: the link tokens of {settings.start!r} are its model's own")
    if any(first.around) or first.prompt != PromptTemplate():
        raise InputError(f"start: adapter {settings.start!r} has a prompt template of its own")


def make_adapter(
    settings: TrainSettings,
    engine: KVLinkEngine,
    model: LinkModel,
    notes: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of a model in training, in the base model's number type."""
    from peft import get_peft_model_state_dict

    dtype = engine.architecture.cache_dtype
    lora, weights = None, {}
    if settings.rank:
        lora = {**lora_config(settings), **_resolved(model)}  # type: ignore[dict-item]
        state: dict[str, torch.Tensor] = get_peft_model_state_dict(model.reader)
        weights = {name: weight.to(dtype) for name, weight in state.items()}
    links = model.links
    if links is not None and model.link_embeddings is not None:
        embeddings = model.link_embeddings.detach().to(dtype)
        links = LinkTokens(links.layout, links.count, links.first_id, links.slots, embeddings)
    return Adapter(
        kind=settings.kind,
        links=links,
        base=BaseModel.of(engine.model, engine.name),
        lora_config=lora,
        lora_weights=weights,
        encode_behind=settings.behind,
        prompt=engine.layout.template,
        notes=notes or {},
    )


def _resolved(model: LinkModel) -> dict[str, Any]:
    """The names of the layers that `all-linear` meant for this model."""
    config = cast("Any", model.reader).peft_config["default"]
    return {"target_modules": sorted(config.target_modules)}


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (path / "complete").is_file()
    ]
    return max(found)[1] if found else None


def _claim(out: Path, settings: TrainSettings) -> None:
    """Make the folder this run's; another run's is left alone."""
    path = out / SETTINGS
    text = json.dumps(settings.to_json(), indent=2, sort_keys=True) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{out} holds a run with other settings ({path}): choose another folder, or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _arguments(settings: TrainSettings, out: Path, engine: KVLinkEngine) -> TrainingArguments:
    device = engine.architecture.device.type
    return TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=0.0,
        bf16=engine.architecture.dtype == torch.bfloat16,
        fp16=engine.architecture.dtype == torch.float16,
        use_cpu=device == "cpu",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=max(1, settings.steps // 200),
        report_to=_loggers(),
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _loggers() -> list[str]:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]


class _Collator:
    """Lessons to what the model's forward takes."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, list[Pack]]:
        return {"packs": [self._packer.pack(lesson) for lesson in lessons]}


class _Trainer(Trainer):
    """transformers' Trainer that saves only what is trained, and knows two learning rates."""

    link_learning_rate = 1e-3

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model = cast("LinkModel", self.model)
        lora = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        groups: list[dict[str, Any]] = [{"params": lora, "lr": self.args.learning_rate}]
        if model.link_embeddings is not None:
            groups.append({"params": [model.link_embeddings], "lr": self.link_learning_rate})
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        weights = cast("LinkModel", self.model).trained()
        save_file({k: w.cpu().contiguous() for k, w in weights.items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / TRAINED)
        own = cast("LinkModel", self.model).trained()
        if weights.keys() != own.keys():
            raise InputError(f"checkpoint {resume_from_checkpoint} is of another run: remove it")
        for name, weight in own.items():
            weight.copy_(weights[name])


class _Curves(TrainerCallback):
    """Marks checkpoints as complete and keeps the losses."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write(state)
        folder = self._out / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / "complete").touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write(state)

    def _write(self, state: Any) -> None:
        entries = [entry for entry in state.log_history if "loss" in entry]
        _write_json(self._out / HISTORY, entries)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value) + "\n")
