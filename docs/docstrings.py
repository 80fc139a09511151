"""For the API reference: the package's docstrings, whose references are Sphinx's, as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
ARXIV = re.compile(r"\barXiv (\d{4}\.\d{5})")
RAISES = re.compile(r"^Raises:\n((?:[ ]+.*\n?)+)", re.MULTILINE)


class Markdown(Extension):
    """Rewrites every docstring that is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """References as code, papers as links."""
    text = ROLE.sub(r"`\1`", text)
    text = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return RAISES.sub(_errors, text)


def _errors(section: re.Match[str]) -> str:
    """Names alone are not read as `Raises`: they become a box of their own."""
    items = textwrap.dedent(section[1]).splitlines()
    names_alone = any(item and not item.startswith(" ") and ": " not in item for item in items)
    return f"Errors:\n{section[1]}" if names_alone else section[0]
