"""Texts of others, made fit to be shown on a line."""

from __future__ import annotations

import unicodedata


def one_line(error: BaseException | str) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """A text as every terminal takes it.

    Control characters, which move the cursor, and surrogates, which stand for the bytes of a file's
    name that are no UTF-8, are written as in Python.
    """
    return "".join(
        each.encode("unicode_escape").decode()
        if unicodedata.category(each) in ("Cc", "Cs")
        else each
        for each in text
    )


def valid(text: str) -> str:
    """A text that can be tokenised and stored: surrogates that belong together as one character,
    and what stands for none, such as half of one, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
