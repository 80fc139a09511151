from __future__ import annotations

import logging

import pytest

from kvlink_rag.common.once import say_once_that_memory_ends


def test_that_memory_ends_is_said_once_and_on_no_output(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    say_once_that_memory_ends.cache_clear()
    say_once_that_memory_ends()
    say_once_that_memory_ends()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("kvlink_rag", logging.WARNING)
    assert "end with this process" in record.getMessage()
    assert capsys.readouterr().out == ""
