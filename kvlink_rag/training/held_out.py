"""What an adapter does to lessons that it was not trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvlink_rag.training.data import Lessons
from kvlink_rag.training.lesson import Lesson
from kvlink_rag.training.model import LinkModel
from kvlink_rag.training.pack import Packer
from kvlink_rag.training.settings import TrainSettings

NO_CHUNKS = "no chunks"


@torch.no_grad()
def held_out_losses(model: LinkModel, packer: Packer, settings: TrainSettings) -> dict[str, float]:
    """Mean loss over lessons of held-out rows, for each way of reading their chunks.

    Every lesson with chunks is read in every view of the settings, so that the numbers compare.

    Returns:
        nats per label by view, and under :data:`NO_CHUNKS` for plain text and instructions.
    """
    other = replace(settings, seed=settings.seed + 1)
    lessons = Lessons(other, settings.held_out_lessons, held_out=True)
    losses: dict[str, list[float]] = {}
    for place in range(len(lessons)):
        for name, lesson in _views(lessons[place], settings):
            with model.autocast():
                loss = model([packer.pack(lesson)])["loss"]
            losses.setdefault(name, []).append(float(loss))
    return {name: sum(values) / len(values) for name, values in sorted(losses.items())}


def _views(lesson: Lesson, settings: TrainSettings) -> list[tuple[str, Lesson]]:
    if not lesson.chunks:
        return [(NO_CHUNKS, lesson)]
    return [(view, replace(lesson, view=view)) for view, share in settings.views.items() if share]
