"""Chunks and the identity of their caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvlink_rag.chunk import Chunk, ChunkKV, ScoredChunk, as_chunks, chunk_key
from kvlink_rag.errors import InputError


def make_record() -> ChunkKV:
    tensor = torch.zeros(1, 1, 3, 2)
    return ChunkKV((1, 2, 3), (7, 8), "model-a", tensor, tensor)


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": (1, 2, 4)},
        {"token_ids": (1, 23)},
        {"token_ids": (12, 3)},
        {"behind": ()},
        {"behind": (7,)},
        {"behind": (78,)},
        {"fingerprint": "model-b"},
        {"behind": (7, 8, 1), "token_ids": (2, 3)},
    ],
)
def test_whatever_the_model_sees_differently_has_another_key(change: dict[str, object]) -> None:
    record = make_record()
    other = replace(record, **change)  # type: ignore[arg-type]
    assert other.key != record.key
    assert not other.is_for(record.fingerprint, record.behind, record.token_ids)


def test_the_same_has_the_same_key_in_every_process() -> None:
    # written down: a key that changes without FORMAT_VERSION (2) makes every store useless
    assert chunk_key("f", (1,), (2, 3)) == (
        "0673fba838483b8c7150721d451a5190c2cfd1b766b0a50ffa8164f0051110d8"
    )


def test_a_cache_of_other_length_is_not_for_its_tokens() -> None:
    record = replace(make_record(), keys=torch.zeros(1, 1, 2, 2))
    assert not record.is_for("model-a", (7, 8), (1, 2, 3))


def test_metadata_is_not_part_of_identity() -> None:
    assert Chunk("a", metadata={"x": 1}) == Chunk("a", metadata={"x": 2})
    assert Chunk("a", metadata={"x": 1}).document_id == Chunk("a").document_id


def test_document_id_is_the_id_or_the_text() -> None:
    assert Chunk("a", id="é").document_id == "é"
    assert Chunk("a").document_id == Chunk("a").document_id
    assert (
        len({Chunk("a").document_id, Chunk("b").document_id, Chunk("a", title="t").document_id})
        == 3
    )
    assert Chunk("\ud800").document_id.startswith("text-")


def test_texts_become_chunks() -> None:
    assert as_chunks(["a", Chunk("b", id="1")]) == [Chunk("a"), Chunk("b", id="1")]
    assert as_chunks(iter(["a"])) == [Chunk("a")]


def test_what_is_no_unicode_is_the_same_everywhere() -> None:
    (found,) = as_chunks([ScoredChunk("a \ud800 b \ud83d\ude00", "1", "\udfff", score=0.5)])
    assert found == ScoredChunk("a \ufffd b \N{GRINNING FACE}", "1", "\ufffd", score=0.5)
    same = Chunk("湖", title="Zürich")
    assert as_chunks([same])[0] is same


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ("one text", "not one text"),
        (Chunk("one"), "not one text"),
        ([1], "chunk 0 is a int"),
        (["a", " \n"], "chunk 1 .* has no text"),
        ([Chunk(b"bytes")], "text is a bytes"),  # type: ignore[arg-type]
        (["a", Chunk("b", title=5)], "chunk 1: title 5 is a int, not a str"),  # type: ignore[arg-type]
        (["a", Chunk("b", id="\ud800")], r"chunk 1: id '\\ud800' is no valid Unicode"),
        ([Chunk("b", id=7)], "chunk 0: id 7 is a int, not a str"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_chunk_is_refused(chunks: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_chunks(chunks)  # type: ignore[arg-type]
