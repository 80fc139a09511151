"""The articles that come with the package: the demo's documents, and text to measure with."""

from __future__ import annotations

from pathlib import Path

from kvlink_rag.errors import InputError


def corpus_files() -> list[Path]:
    """The articles: in the repository's ``examples/corpus``, or inside the installed package.

    Raises:
        InputError: they are missing.
    """
    here = Path(__file__).resolve().parent.parent
    for folder in (here.parent / "examples" / "corpus", here / "_corpus"):
        if folder.is_dir():
            return [file for file in sorted(folder.glob("*.md")) if file.name != "ATTRIBUTION.md"]
    raise InputError(f"the articles are missing beside {here}: reinstall kvlink-rag")


def paragraphs(file: Path) -> list[str]:
    """An article's paragraphs, without its headings."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]
