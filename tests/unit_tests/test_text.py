from __future__ import annotations

import os

import pytest

from kvlink_rag.common.text import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 元朝 👩‍🚀", "naïve 元朝 👩‍🚀"),
        (os.fsdecode(b"caf\xe9.txt"), "caf\\udce9.txt"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
    ],
)
def test_what_no_terminal_takes_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_an_error_on_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
