"""What a training run is made of: one JSON file, or the options of ``kvlink train``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from kvlink_rag.adapters.adapter import AdapterKind
from kvlink_rag.adapters.links import LinkLayout
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.layout import EncodeBehind
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
from kvlink_rag.training.lesson import View

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

MOST_SEEDS = 2**32 - 1
"""Numpy's, less one for the held-out lessons' own."""


@dataclass(frozen=True)
class TrainSettings:
    """A training run; the same settings and data give the same adapter.

    Args:
        model: hub id or folder of the base model.
        data: share of the lessons that each file or folder gives, by path
            (:mod:`kvlink_rag.training.data` says what files may hold).
        views: share of the lessons with chunks that are read linked, reused, or in full.
        kind, layout, links: of the adapter; ``links`` 0 trains a LoRA alone.
        slots: most chunks in a prompt, for the layout `slot`.
        encode_behind: what chunks are encoded behind; None is `system` for `cache-preserving`, and
            `alone`, as in the paper, for `whole-model`.
        rank, alpha: of the LoRA, on all linear layers of the decoder; rank 0 trains link tokens
            alone.
        min_chunks, max_chunks: chunks in a lesson.
        turns: most questions behind one context.
        max_tokens: longest lesson.
        max_answer: most tokens of an answer that are learnt.
        steps: optimiser steps.
        batch: lessons in a forward pass.
        accumulate: forward passes in a step. Each weighs the same, and in each every question.
        learning_rate: of the LoRA, after warm-up, falling to 0 as a cosine.
        link_learning_rate: of the link tokens' embeddings.
        warmup: share of the steps.
        save_steps: steps between checkpoints.
        seed: of data order, chunk choice and first weights.
        distill: how much of the loss is the divergence from the base model's full prefill (0 to 1);
            lessons that are made for it (plain text, instructions, own documents) always have 1.
        held_out_lessons: that the loss is measured on before and after, in every view.
        start: an adapter to go on from (folder, or name of one that comes with the package). Its
            own full prefill, instead of the base model's, is then what `distill` learns.
        dtype: of the model: `auto` is the checkpoint's, or float32 where a CPU is faster in it.
    """

    model: str = DEFAULT_MODEL
    data: Mapping[str, float] = field(default_factory=dict)
    views: Mapping[View, float] = field(
        default_factory=lambda: {"link": 0.6, "reuse": 0.25, "full": 0.15}
    )
    kind: AdapterKind = "cache-preserving"
    layout: LinkLayout = "shared"
    links: int = 5
    slots: int = 20
    encode_behind: EncodeBehind | None = None
    rank: int = 16
    alpha: int = 32
    min_chunks: int = 2
    max_chunks: int = 10
    turns: int = 6
    max_tokens: int = 2048
    max_answer: int = 64
    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 5e-4
    link_learning_rate: float = 2e-3
    warmup: float = 0.05
    save_steps: int = 50
    seed: int = 0
    distill: float = 0.0
    held_out_lessons: int = 24
    start: str | None = None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_views()

    def _check_types(self) -> None:
        for name, choices in (
            ("kind", get_args(AdapterKind)),
            ("layout", get_args(LinkLayout)),
            ("encode_behind", (None, *get_args(EncodeBehind))),
            ("dtype", get_args(Dtype)),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(entry.default, int) and type(value) is not int:
                raise InputError(f"{entry.name} must be a whole number, not {value!r}")
            if isinstance(entry.default, float) and not _is_number(value):
                raise InputError(f"{entry.name} must be a number, not {value!r}")
        if not isinstance(self.model, str) or not self.model:
            raise InputError(f"model must be a hub id or a folder, not {self.model!r}")
        if self.start is not None and (not isinstance(self.start, str) or not self.start):
            raise InputError(f"start must be an adapter's folder or name, not {self.start!r}")
        for name in ("data", "views"):
            shares = getattr(self, name)
            if not isinstance(shares, Mapping) or not all(
                isinstance(key, str) and _is_number(share) for key, share in shares.items()
            ):
                raise InputError(f"{name} must have a number for each name, not {shares!r}")

    def _check_ranges(self) -> None:
        for name in (
            "slots",
            "alpha",
            "min_chunks",
            "turns",
            "max_tokens",
            "max_answer",
            "steps",
            "batch",
            "accumulate",
            "save_steps",
            "held_out_lessons",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "link_learning_rate"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("distill", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.seed < MOST_SEEDS:
            raise InputError(f"seed must be between 0 and {MOST_SEEDS - 1}, not {self.seed}")
        if self.links < 0 or self.rank < 0 or self.links + self.rank == 0:
            raise InputError(
                f"nothing to train with links {self.links} and rank {self.rank}: one of them has "
                "to be above 0"
            )
        if self.max_chunks < self.min_chunks:
            raise InputError(
                f"max_chunks {self.max_chunks} is less than min_chunks {self.min_chunks}"
            )
        if self.links and self.layout == "slot" and self.max_chunks > self.slots:
            raise InputError(f"max_chunks {self.max_chunks} needs as many slots, not {self.slots}")

    def _check_views(self) -> None:
        for name, shares in (("data", self.data), ("views", self.views)):
            if any(share < 0 for share in shares.values()) or not sum(shares.values()) > 0:
                raise InputError(f"{name} needs entries with shares above 0, not {dict(shares)}")
        if unknown := set(self.views) - set(get_args(View)):
            raise InputError(f"views are {get_args(View)}, not {sorted(unknown)}")
        if not self.links and self.views.get("link"):
            raise InputError(
                "views: without link tokens (links 0) nothing can be read linked; give views "
                "without link, in a file of settings (--config)"
            )
        if self.links and not self.views.get("link"):
            raise InputError(
                f"views: nothing is read linked, so the {self.links} link tokens would never be "
                "trained; give link a share, or links 0"
            )

    @property
    def behind(self) -> EncodeBehind:
        """What chunks are encoded behind."""
        if self.encode_behind is not None:
            return self.encode_behind
        return "alone" if self.kind == "whole-model" else "system"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        values = asdict(self)
        if self.dtype == "auto":  # as runs have it that began before there was a choice
            del values["dtype"]
        return values


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def parse_shares(paths: Sequence[str]) -> dict[str, float]:
    """``PATH`` or ``PATH=SHARE`` as shares by path; 1 where none is given."""
    shares = {}
    for text in paths:
        path, mark, share = text.rpartition("=")
        if not mark or Path(text).exists():
            path, share = text, "1"
        if not path:
            raise InputError(f"--data {text!r} names no file or folder: give PATH or PATH=SHARE")
        try:
            shares[path] = float(share)
        except ValueError as error:
            raise InputError(f"--data {text!r}: {share!r} is no share, give a number") from error
    return shares


def read_settings(path: Path, **changes: Any) -> TrainSettings:
    """Settings from a JSON file; ``changes`` replace what it says.

    Raises:
        InputError: no such file, no JSON, or an unknown or impossible setting.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"settings {path} cannot be read: {error}") from error
    known = TrainSettings.__dataclass_fields__
    if not isinstance(values, dict):
        raise InputError(f"settings {path} must be a JSON object, not {values!r:.40}")
    if unknown := sorted(set(values) - set(known)):
        raise InputError(
            f"settings {path}: unknown entries {unknown}; known are {', '.join(known)}"
        )
    return TrainSettings(**{**values, **changes})
