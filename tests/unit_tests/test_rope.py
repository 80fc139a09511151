from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvlink_rag.rope import group_layers, rotate, shift_groups

INV_FREQ = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)


def keys(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_rotate_is_the_rotation_of_transformers():
    given = keys(1, 2, 5, 16)
    positions = torch.tensor([0, 7, 8, 100, 4000])
    angles = torch.cat([positions[:, None] * INV_FREQ] * 2, -1)[None]
    expected, _ = apply_rotary_pos_emb(given, given, angles.cos(), angles.sin())
    torch.testing.assert_close(rotate(given, positions, INV_FREQ), expected, atol=1e-6, rtol=0)


def test_back_takes_the_rotation_off():
    given, positions = keys(3, 2, 6, 16), torch.arange(900, 906)
    there = rotate(given, positions, INV_FREQ)
    assert (there - given).abs().max() > 0.1
    back = rotate(there, -positions, INV_FREQ)
    torch.testing.assert_close(back, given, atol=1e-5, rtol=0)


def test_partial_rotary_leaves_the_rest_alone():
    given = keys(2, 5, 24)
    turned = rotate(given, torch.arange(5, 10), INV_FREQ)
    assert torch.equal(turned[..., 16:], given[..., 16:])
    assert not torch.equal(turned[..., :16], given[..., :16])


@pytest.mark.parametrize("head_dim", [16, 24])
def test_in_place_and_into_a_slice(head_dim):
    given, positions = keys(2, 5, head_dim), torch.arange(3, 8)
    expected = rotate(given, positions, INV_FREQ)
    target = torch.zeros(2, 9, head_dim)
    rotate(given, positions, INV_FREQ, out=target[:, 2:7])
    assert torch.equal(target[:, 2:7], expected)
    assert target[:, :2].abs().sum() == target[:, 7:].abs().sum() == 0
    rotate(given, positions, INV_FREQ, out=given)
    assert torch.equal(given, expected)


def test_angles_are_float32_for_bfloat16_keys():
    given = keys(1, 1, 16)
    far = torch.tensor([8191])
    exact = rotate(given.bfloat16().float(), far, INV_FREQ)
    assert (rotate(given.bfloat16(), far, INV_FREQ).float() - exact).abs().max() < 2e-2


def test_groups_are_runs_of_layers_with_the_same_frequencies():
    other = INV_FREQ / 2
    groups = group_layers([INV_FREQ, INV_FREQ, None, other, INV_FREQ])
    assert [(g.layers.start, g.layers.stop) for g in groups] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    given, positions = keys(5, 2, 3, 16), torch.arange(10, 13)
    shifted = shift_groups(given, positions, groups)
    assert torch.equal(shifted[2], given[2])
    assert torch.equal(shifted[3], rotate(given[3], positions, other))
    assert torch.equal(shifted[4], rotate(given[4], positions, INV_FREQ))
