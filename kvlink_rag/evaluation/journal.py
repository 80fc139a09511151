"""JSON lines that are only ever added to, so that a run can be interrupted at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvlink_rag.errors import InputError

Line = dict[str, Any]


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` as two numbers.

    Raises:
        InputError: it is not of that form, or i is not below n.
    """
    try:
        shard, shards = map(int, text.split("/"))
    except ValueError:
        shard, shards = -1, 0
    if not 0 <= shard < shards:
        raise InputError(f"shard {text!r}: give i/n with i from 0 to n-1, such as 0/2 and 1/2")
    return shard, shards


class Journal:
    """The lines of one kind in a folder; each shard of a run adds to a file of its own.

    Args:
        stem: the files are ``stem.jsonl``, or ``stem-i-of-n.jsonl`` of shard i of n.
    """

    def __init__(self, folder: Path, stem: str, shard: tuple[int, int] = (0, 1)) -> None:
        self._folder, self._stem = folder, stem
        part = "" if shard == (0, 1) else f"-{shard[0]}-of-{shard[1]}"
        self.path = folder / f"{stem}{part}.jsonl"

    def read(self) -> dict[str, Line]:
        """The lines of all shards by their ``digest``; those cut by a kill are left out."""
        found: dict[str, Line] = {}
        files = {self._folder / f"{self._stem}.jsonl"}
        files.update(self._folder.glob(f"{self._stem}-*-of-*.jsonl"))
        for path in sorted(file for file in files if file.exists()):
            with path.open(encoding="utf-8", errors="replace") as lines:
                for text in lines:
                    try:
                        line = json.loads(text)
                        found[line["digest"]] = line
                    except (ValueError, TypeError, KeyError):
                        continue
        return found

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines; they are on disk when this returns."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as out:
            if _is_cut(self.path):
                out.write(b"\n")
            out.write(text.encode("utf-8", "backslashreplace"))
            out.flush()
            os.fsync(out.fileno())


def _is_cut(path: Path) -> bool:
    """Whether a file's last line has no end."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
