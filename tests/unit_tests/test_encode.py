from __future__ import annotations

import pytest
import tiny
import torch

from kvlink_rag.rope import rotate, shift_groups
from kvlink_rag.runners.transformers.architecture import inspect_model
from kvlink_rag.runners.transformers.encode import Encoder, plan_batches


def encoder(name: str) -> Encoder:
    return Encoder(tiny.model(name), inspect_model(tiny.model(name), name))


def encode_one(made: Encoder, text: list[int], behind: list[int]):
    ((_, record),) = next(made.encode([text], behind, max_batch_tokens=1))
    return record


def test_batches_hold_every_text_once_within_the_budget():
    lengths = [5, 80, 7, 5, 30, 31, 200, 1]
    batches = plan_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= 100 or len(batch) == 1
    assert len(batches) < 8
    assert plan_batches([], 100) == []


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen2-sliding", "stablelm", "gemma3"])
def test_neighbours_and_padding_in_a_batch_do_not_matter(name):
    made = encoder(name)
    texts = [list(range(5, 5 + n)) for n in (3, 50, 17, 1)]
    behind = [7, 8, 9]
    together = {i: r for b in made.encode(texts, behind, max_batch_tokens=10**6) for i, r in b}
    for place, text in enumerate(texts):
        alone = encode_one(made, text, behind)
        assert together[place].token_ids == tuple(text)
        assert together[place].behind == (7, 8, 9)
        torch.testing.assert_close(together[place].keys, alone.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(together[place].values, alone.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "mistral", "qwen2"])
def test_keys_are_where_they_were_computed(name):
    """They are the key projection's output, rotated from the chunk's own beginning."""
    made = encoder(name)
    text = list(range(40, 60))
    projected: list[torch.Tensor] = []
    hook = (
        tiny.model(name)
        .model.layers[0]
        .self_attn.k_proj.register_forward_hook(lambda module, args, out: projected.append(out))
    )
    try:
        record = encode_one(made, text, [])
    finally:
        hook.remove()
    expected = projected[0].view(20, 2, 16).transpose(0, 1)
    expected = rotate(expected, torch.arange(20), made.architecture.groups[0].inv_freq)
    scaling = getattr(tiny.model(name).model.rotary_emb, "attention_scaling", 1.0)
    assert (scaling != 1.0) == (name == "llama-yarn")
    torch.testing.assert_close(record.keys[0], expected * scaling, atol=2e-6, rtol=0)


def test_what_a_chunk_is_behind_changes_its_cache_and_is_not_in_it():
    made = encoder("llama")
    text = list(range(40, 50))
    alone, behind = encode_one(made, text, []), encode_one(made, text, [1, 2, 3])
    assert alone.keys.shape == behind.keys.shape == (4, 2, 10, 16)
    assert (alone.position, behind.position) == (0, 3)
    moved = torch.empty_like(alone.keys)
    shift_groups(alone.keys, torch.tensor([3]), made.architecture.groups, out=moved)
    torch.testing.assert_close(moved[0], behind.keys[0], atol=1e-5, rtol=0)
    assert (moved[1] - behind.keys[1]).abs().max() > 1e-2
    assert alone.key != behind.key


def test_records_own_their_memory():
    made = encoder("llama")
    (batch,) = made.encode([[1, 2, 3], [4, 5, 6]], [], max_batch_tokens=100)
    for _, record in batch:
        assert record.keys.untyped_storage().nbytes() == record.keys.nbytes
        assert record.values.untyped_storage().nbytes() == record.values.nbytes
