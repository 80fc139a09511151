"""The engine's attention is that of transformers, by a faster way."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvlink_rag.runners.transformers import attention
from kvlink_rag.runners.transformers.attention import NAME, attend, fast_attention, make_mask
from kvlink_rag.runners.transformers.encode import Encoder


def sizes(queries: int, tokens: int, **options: Any) -> dict[str, Any]:
    return {
        "batch_size": 1,
        "q_length": queries,
        "kv_length": tokens,
        "q_offset": tokens - queries,
        "mask_function": causal_mask_function,
        **options,
    }


def made(queries: int, tokens: int) -> list[torch.Tensor]:
    """Queries, and keys and values that are part of a longer cache."""
    torch.manual_seed(0)
    shapes = (4, queries, 8), (2, tokens + 3, 8), (2, tokens + 3, 6)
    query, key, value = (torch.randn(2, *shape) for shape in shapes)
    return [query, key[:, :, :tokens], value[:, :, :tokens]]


class Module(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("block_rows", [1, 4, 384])
@pytest.mark.parametrize("tokens", [5, 6, 9, 10, 40])
def test_without_a_mask_the_last_query_sees_the_last_key(
    tokens: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", block_rows)
    query, key, value = made(5, tokens)
    mask = sdpa_mask(**sizes(5, tokens, allow_is_causal_skip=False))
    assert mask is not None
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask, scaling=0.3)
    found, _ = attend(Module(), query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block_rows", [1, 4, 384])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("rows", [1, 2])
def test_masks_are_kept(
    rows: int, kind: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", block_rows)
    query, key, value = made(5, 12)
    mask = torch.rand(rows, 1, 5, 12) < 0.5
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask)
    found, _ = attend(Module(), query, key, value, mask)
    torch.testing.assert_close(found, expected)


def test_a_query_that_sees_nothing_gives_numbers() -> None:
    query, key, value = made(2, 3)
    mask = torch.tensor([[[[False, False, False], [True, True, True]]]])
    found, _ = attend(Module(), query, key, value, mask)
    assert found.isfinite().all()


def test_where_the_folded_way_does_not_serve_torch_does_it() -> None:
    query, key, value = (each.half() for each in made(5, 9))
    mask = sdpa_mask(**sizes(5, 9, allow_is_causal_skip=False))
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask)
    found, _ = attend(Module(), query, key, value, None)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="softcap"):
        attend(Module(), query.float(), key.float(), value.float(), None, softcap=3.0)


def test_one_query_sees_everything() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    found, _ = attend(Module(), query, key, value, None, scaling=1.0)
    weights = (query.view(1, 2, 2, 8) @ key.transpose(2, 3)).softmax(-1)
    torch.testing.assert_close(found[:, 0], (weights @ value).reshape(1, 4, 8))


def test_masks_are_made_where_they_are_needed() -> None:
    assert make_mask(**sizes(5, 7)) is None
    assert make_mask(**sizes(5, 7, local_size=8)) is None
    # a window that ends inside, padding, a pattern on top, many more keys than queries
    padding = torch.tensor([[False] + [True] * 6])
    for options in (
        {"local_size": 7},
        {"attention_mask": padding},
        {"allow_is_causal_skip": False},
    ):
        assert make_mask(**sizes(5, 7, **options)) is not None
    assert make_mask(**sizes(5, 11)) is None
    # where queries are padded, that has to pay
    assert make_mask(**sizes(5, 10, device="meta")) is None
    assert make_mask(**sizes(5, 11, device="meta")) is not None


def test_encoding_takes_it_and_gives_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine("llama")
    shapes: list[tuple[int, int]] = []

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        assert mask is None
        shapes.append((query.shape[2], key.shape[2]))
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "attend", watched)
    attention.AttentionInterface.register(NAME, watched)
    try:
        encoder = Encoder(engine.model, engine.architecture)
        list(encoder.encode([range(5, 25)], range(3, 10), max_batch_tokens=100))
    finally:
        attention.AttentionInterface.register(NAME, attend)
    assert (20, 27) in shapes
    assert engine.model.config._attn_implementation == "sdpa"


def test_a_model_with_another_attention_keeps_it() -> None:
    config = tiny.CONFIGS["llama"]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with fast_attention(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_the_setting_is_given_back_after_an_error() -> None:
    engine = tiny.engine("llama")
    with pytest.raises(ZeroDivisionError), fast_attention(engine.model):
        raise ZeroDivisionError
    assert engine.model.config._attn_implementation == "sdpa"
