from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from kvlink_rag import InputError
from kvlink_rag.engine.text import TextStream
from kvlink_rag.runners.base import GenerateSettings
from kvlink_rag.runners.transformers.sampling import Sampler, stop_ids

TOKENIZER = tiny.tokenizer()


def push(text: str, *stops: str) -> tuple[list[str], TextStream]:
    """The pieces that come out, byte token by byte token."""
    stream = TextStream(TOKENIZER, stops)
    pieces = []
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.finish()], stream


def test_pieces_add_up_to_the_text():
    pieces, stream = push("Zürich 湖 🙂!")
    assert "".join(pieces) == stream.text == "Zürich 湖 🙂!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) == len("Zürich 湖 🙂!")


def test_text_ends_before_the_first_stop_string():
    pieces, stream = push("one. two", ". ", "tw")
    assert "".join(pieces) == stream.text == "one"
    assert stream.stopped


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    pieces, stream = push("a END b EN", "ENDE")
    assert "".join(pieces) == stream.text == "a END b EN"
    assert not any("EN" in piece[:-1] and piece.endswith("N") for piece in pieces[:-1])
    assert pieces[2:5] == ["", "", ""]  # E, N, D may yet become ENDE


def test_a_stop_string_inside_a_character_boundary():
    pieces, stream = push("ja湖nein", "湖")
    assert "".join(pieces) == stream.text == "ja"


def test_special_tokens_are_no_text():
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    stream = TextStream(TOKENIZER, ())
    assert stream.push(end) + stream.finish() == ""


def test_an_unfinished_character_comes_out_at_the_end():
    ids = TOKENIZER("湖", add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER, ())
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_greedy_takes_the_best_and_sampling_follows_the_seed():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    assert Sampler(GenerateSettings(), cpu).choose(logits) == int(logits.argmax())

    def draw(**settings) -> list[int]:
        sampler = Sampler(GenerateSettings(**settings), cpu)
        return [sampler.choose(logits) for _ in range(40)]

    assert draw(temperature=1.0, seed=3) == draw(temperature=1.0, seed=3)
    assert draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert len(set(draw(temperature=1.0, seed=3))) > 5
    assert set(draw(temperature=1.0, seed=3, top_p=1e-6)) == {int(logits.argmax())}
    assert set(draw(temperature=1e-4, seed=3)) == {int(logits.argmax())}


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"max_new_tokens": 0}, "0"),
        ({"temperature": -0.5}, "-0.5"),
        ({"top_p": 0.0}, "0.0"),
        ({"top_p": 1.5}, "1.5"),
        ({"stop": ["a", ""]}, "empty"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer, not 1.5"),
        ({"max_new_tokens": True}, "not True"),
        ({"max_new_tokens": "4"}, "not '4'"),
        ({"temperature": float("nan")}, "temperature must be a finite number, not nan"),
        ({"temperature": float("inf")}, "not inf"),
        ({"temperature": "hot"}, "'hot'"),
        ({"top_p": float("nan")}, "top_p must be a finite number"),
        ({"top_p": None}, "None"),
        ({"seed": 1.0}, "seed must be an integer, not 1.0"),
        ({"seed": 2**64}, "64 bits, not 18446744073709551616"),
        ({"stop": ["a", 5]}, r"strings, not \['a', 5\]"),
        ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
    ],
)
def test_settings_out_of_range_are_named(settings, value):
    with pytest.raises(InputError, match=value):
        GenerateSettings(**settings)


def test_numbers_that_mean_the_same_are_taken():
    given = GenerateSettings(np.int64(3), 1, np.float32(0.5), (), np.int32(7))
    assert given == GenerateSettings(3, 1.0, 0.5, (), 7)
    assert [type(each) for each in (given.temperature, given.seed)] == [float, int]
    assert tiny.engine().answer("Why?", ["Because."], temperature=1, max_new_tokens=2).token_ids


def test_stop_ids_come_from_the_generation_config_then_the_tokenizer():
    model = tiny.model("llama")
    assert stop_ids(model, TOKENIZER) == {TOKENIZER.eos_token_id}
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [5, 6]
    try:
        assert stop_ids(model, TOKENIZER) == {5, 6}
    finally:
        model.generation_config.eos_token_id = before
