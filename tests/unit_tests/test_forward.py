from __future__ import annotations

import pytest
import tiny
import torch

from kvlink_rag import UnsupportedModelError
from kvlink_rag.runners.transformers.forward import run_at, run_behind


def test_decoding_beyond_the_capacity_grows_the_cache():
    engine = tiny.engine()
    roomy = engine.runner.encoder.new_cache(64)
    tight = engine.runner.encoder.new_cache(4)
    for token in range(20):
        expected = run_behind(engine.model, roomy, [token])
        torch.testing.assert_close(run_behind(engine.model, tight, [token]), expected)
    assert tight.get_seq_length() == roomy.get_seq_length() == 20
    assert roomy.capacity == 64


def test_crop_forgets_the_last_tokens():
    engine = tiny.engine()
    cache = engine.runner.encoder.new_cache(16)
    run_behind(engine.model, cache, [1, 2, 3])
    expected = run_behind(engine.model, cache, [4])
    cache.crop(-1)
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(run_behind(engine.model, cache, [4]), expected)


def test_hooks_and_scatter_are_gone_after_a_failure():
    engine = tiny.engine()
    cache = engine.runner.encoder.new_cache(16)
    run_behind(engine.model, cache, [1, 2, 3, 4])
    broken = engine.model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_at(engine.model, engine.architecture, cache, [9, 4], [1, 3])
    broken.remove()
    assert not any(layer._forward_pre_hooks for layer in engine.model.model.layers)
    assert all(layer.scatter is None for layer in cache.layers)


def test_attention_without_masks_is_refused_for_recompute():
    engine = tiny.engine()
    object.__setattr__(engine.architecture, "maskable", False)
    engine.runner.in_place = False
    chunks = ["More text than is recomputed."]
    engine.answer("q", chunks, max_new_tokens=1)
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        engine.answer("q", chunks, strategy="recompute", max_new_tokens=1)
