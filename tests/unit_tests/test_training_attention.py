"""Flex attention, which a GPU takes, is the attention that the CPU takes pack by pack."""

from __future__ import annotations

import pytest
import torch

from kvlink_rag.training.attention import Batch, attend_flex, attend_packs
from kvlink_rag.training.pack import Pack

HEADS, KV_HEADS, DIM = 4, 2, 16


def make_pack(frozen: int) -> Pack:
    """A context of ``frozen`` tokens, link tokens, a chunk that sees only itself, two turns."""
    keys, values = torch.randn(2, 1, KV_HEADS, frozen, DIM)
    pack = Pack(keys, values, context=list(range(frozen)))
    pack.add([1, 2], frozen)
    pack.add([3, 4, 5], frozen + 2, -2, open=False)
    pack.add_turn([6, 7], [8, 9], frozen + 5, 0)
    pack.add_turn([10], [11, 12, 13], frozen + 5, 1)
    return pack


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 6])
def test_flex_is_pack_by_pack(window, softcap):
    torch.manual_seed(0)
    batch = Batch([make_pack(size).for_attention() for size in (20, 0, 37)], [window])
    tokens = sum(pack.tokens for pack in batch.packs)
    query = torch.randn(1, HEADS, tokens, DIM)
    key, value = torch.randn(2, 1, KV_HEADS, tokens, DIM)
    expected = attend_packs(query, key, value, batch, 0, 0.3, softcap)
    mixed = attend_flex(query, key, value, batch, 0, 0.3, softcap)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    other = Batch(batch.packs, [6 if window is None else None])
    assert (attend_flex(query, key, value, other, 0, 0.3, softcap) - expected).abs().max() > 0.1
