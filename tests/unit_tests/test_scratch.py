"""Scratch memory: the same again, never too small, never of another type, never much of it kept."""

from __future__ import annotations

import torch

from kvlink_rag.runners.transformers.scratch import KEPT, Scratch


def test_memory_is_used_again() -> None:
    scratch = Scratch()
    first = scratch.tensor("scores", (4, 6), torch.float32)
    again = scratch.tensor("scores", (3, 5), torch.float32)
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (3, 5)
    assert again.is_contiguous()


def test_names_do_not_share() -> None:
    scratch = Scratch()
    scores = scratch.tensor("scores", (8,), torch.float32).fill_(1)
    scratch.tensor("weights", (8,), torch.float32).fill_(2)
    assert scores.tolist() == [1] * 8


def test_more_and_other_types_get_new_memory() -> None:
    scratch = Scratch()
    small = scratch.tensor("scores", (2,), torch.float32).fill_(1)
    assert scratch.tensor("scores", (3,), torch.float32).fill_(2).shape == (3,)
    assert scratch.tensor("scores", (3,), torch.bfloat16).dtype == torch.bfloat16
    assert small.tolist() == [1, 1]


def test_much_is_not_kept() -> None:
    scratch = Scratch()
    small = scratch.tensor("scores", (2,), torch.float32)
    scratch.tensor("scores", (KEPT // 4 + 1,), torch.float32)
    assert scratch.tensor("scores", (2,), torch.float32).data_ptr() == small.data_ptr()
