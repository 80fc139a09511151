"""Files as chunks: finding them, reading text, Markdown and PDF, splitting by tokens."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlink_rag.chunk import Chunk
from kvlink_rag.common.text import one_line
from kvlink_rag.errors import InputError

MARKDOWN = (".md", ".markdown")
SUFFIXES = (".txt", ".rst", ".pdf", *MARKDOWN)

BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)

PIECE_CHARS = 50_000
"""Longest text given to the splitter at once: its time grows faster than the text's length."""


@dataclass(frozen=True)
class Document:
    """A file's text.

    Attributes:
        path: the file.
        title: first Markdown heading, the PDF's own title, or the file's name.
        text: everything in it, line ends as ``\\n``.
        note: something the user should know about the reading, or None.
    """

    path: Path
    title: str
    text: str
    note: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A file that cannot be indexed, and why.

    Attributes:
        unreadable: the file could not be opened at all, so what was indexed of it before may still
            be right; False when it was read and holds no text.
    """

    path: Path
    reason: str
    unreadable: bool = False


@dataclass
class Found:
    """Files in folders.

    Attributes:
        files: those to read: absolute paths, sorted, each once.
        left_out: hidden ones, links to folders and those of unknown kinds, sorted. A hidden folder
            is one of them, what is in it is not looked at.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[Skipped] = field(default_factory=list)


def look(paths: Iterable[str | os.PathLike[str]]) -> Found:
    """The files to index: those named, and in folders, recursively, those of known kinds.

    A folder that cannot be listed is one of the files, so that reading it says why.

    Raises:
        InputError: a path does not exist.
    """
    files: set[Path] = set()
    left_out: dict[Path, Skipped] = {}
    for given in paths:
        path = Path(os.path.abspath(Path(given).expanduser()))
        if path.is_dir():
            for each in _walk(path):
                if isinstance(each, Skipped):
                    left_out[each.path] = each
                else:
                    files.add(each)
        elif path.exists():
            files.add(path)
        else:
            raise InputError(f"no such file or folder: {path}")
    return Found(sorted(files), [left_out[path] for path in sorted(left_out.keys() - files)])


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of :func:`look`."""
    return look(paths).files


def _walk(folder: Path) -> Iterable[Path | Skipped]:
    """Files to read, and what is left out."""
    unlisted: list[Path] = []
    for directory, folders, names in os.walk(
        folder, onerror=lambda error: unlisted.append(Path(error.filename))
    ):
        for name in folders:
            path = Path(directory, name)
            if name.startswith("."):
                yield Skipped(path, "hidden folder")
            elif os.path.islink(path):
                yield Skipped(path, "link to a folder")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(directory, name)
            if name.startswith("."):
                yield Skipped(path, "hidden")
            elif path.suffix.lower() not in SUFFIXES:
                yield Skipped(path, "not named as text, Markdown or PDF")
            else:
                yield path
    yield from unlisted


def read_file(path: Path) -> Document | Skipped:
    """A file's text and title, or why there is none. Never raises for what is in a file."""
    data = read_bytes(path)
    return data if isinstance(data, Skipped) else parse(path, data)


def read_bytes(path: Path) -> bytes | Skipped:
    """A file's content, or why it cannot be read.

    Only regular files are read: a pipe or a device may never end.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # as no index can record it
        return Skipped(path, "its name is not UTF-8: rename it", unreadable=True)
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not os.path.isdir(path):
            return Skipped(path, "no regular file")
        return path.read_bytes()
    except (OSError, MemoryError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Skipped(path, f"cannot be read: {reason}", unreadable=True)


def parse(path: Path, data: bytes) -> Document | Skipped:
    """Text and title of a file with this content, or why there is none."""
    try:
        parsed = _read_pdf(path, data) if path.suffix.lower() == ".pdf" else _read_text(path, data)
    # what decoders make of a file nobody has seen is unknown; one file must not stop the others
    except Exception as error:
        return Skipped(path, f"cannot be read as text: {one_line(error)}")
    if isinstance(parsed, Document) and not parsed.text.strip():
        return Skipped(path, "empty")
    return parsed


def _read_text(path: Path, data: bytes) -> Document | Skipped:
    text, encoding = _decode(data)
    if text is None:
        return Skipped(path, "not text (binary content)")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    note = None if encoding.startswith("utf-8") else f"read as {encoding}, it is not UTF-8"
    return Document(path, _heading(path, text) or _name(path), text, note)


def _decode(data: bytes) -> tuple[str | None, str]:
    """Text and the encoding found; None for binary content."""
    marked = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    try:
        text = data.decode(marked or "utf-8")
        return (text if _looks_like_text(text) else None), marked or "utf-8"
    except UnicodeDecodeError:
        pass
    if marked or b"\0" in data:
        return None, ""
    from charset_normalizer import from_bytes

    matches = from_bytes(data)
    best = matches.best()
    if best is None:
        return None, ""
    # Of Western European texts the detector often takes a rarer code page (Baltic for French).
    western = any("cp1252" in match.could_be_from_charset for match in matches)
    text, encoding = (data.decode("cp1252"), "cp1252") if western else (str(best), best.encoding)
    return (text if _looks_like_text(text) else None), encoding


def _looks_like_text(text: str) -> bool:
    """No NUL, and hardly any other control characters, in the first part of a text."""
    start = text[:65_536]
    controls = sum(character < " " and character not in "\t\n\r\f\v\x1b" for character in start)
    return "\0" not in text and controls * 100 <= len(start)


def _read_pdf(path: Path, data: bytes) -> Document | Skipped:
    import io
    import logging

    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    # pypdf logs every oddity of a file; what matters to the user is in what is returned
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            return Skipped(path, "encrypted PDF")
        pages = [page.extract_text() or "" for page in reader.pages]
        title = ((reader.metadata and reader.metadata.title) or "").strip()
    except DependencyError:
        return Skipped(path, "encrypted PDF")
    # pypdf meets damaged files with errors of every kind; one file must not stop the others
    except Exception as error:
        return Skipped(path, f"not a readable PDF: {one_line(error)}")
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        return Skipped(path, "PDF without text (scanned pages?)")
    # surrogates come from broken character maps and can be neither tokenized nor stored
    text, title = (each.encode("utf-8", "replace").decode("utf-8") for each in (text, title))
    return Document(path, title or _name(path), text)


def _heading(path: Path, text: str) -> str | None:
    """The first heading of a Markdown text."""
    if path.suffix.lower() not in MARKDOWN:
        return None
    for line in text[:10_000].splitlines():
        if line.startswith("#"):
            return line.strip("# \t") or None
    return None


def _name(path: Path) -> str:
    return path.stem.replace("_", " ").strip() or path.name


def split(
    text: str, tokenizer: Any, tokens: int = 256, overlap: int = 32, markdown: bool = False
) -> list[str]:
    """Cut a text where its structure allows: headings, paragraphs, sentences, words.

    Args:
        tokenizer: the model's (a fast tokenizer of transformers).
        tokens: most tokens in a chunk.
        overlap: most tokens that a chunk repeats from the end of the one before, in whole
            sentences or words.
        markdown: cut at Markdown's structure.

    Raises:
        InputError: sizes that cannot be met.
    """
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    if tokens < 1 or not 0 <= overlap < tokens:
        raise InputError(
            f"chunks of {tokens} tokens with an overlap of {overlap}: tokens must be 1 or more, "
            f"and the overlap 0 or more and smaller than tokens"
        )
    kind = MarkdownSplitter if markdown else TextSplitter
    splitter = kind.from_huggingface_tokenizer(tokenizer.backend_tokenizer, tokens, overlap=overlap)
    return [chunk for piece in _pieces(text) for chunk in splitter.chunks(piece)]


def _pieces(text: str) -> Iterable[str]:
    """A long text in pieces, cut at headings or blank lines, else at any whitespace."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        for mark in ("\n#", "\n\n", "\n", " "):
            # not in the first half: pieces would get too many
            cut = text.rfind(mark, start + PIECE_CHARS // 2, end)
            if cut > 0:
                end = cut
                break
        yield text[start:end]
        start = end
    yield text[start:]


def chunks_of(
    document: Document,
    tokenizer: Any,
    tokens: int = 256,
    overlap: int = 32,
    source: str | None = None,
) -> list[Chunk]:
    """A document's chunks, with ids that stay the same for parts that stay the same.

    Args:
        source: what the chunks say they come from; None takes the path. Part of their ids.

    Returns:
        chunks with the document's title and metadata ``{"source": source, "part": n}``; a text
        that occurs twice in a document is one chunk.
    """
    source = str(document.path) if source is None else source
    markdown = document.path.suffix.lower() in MARKDOWN
    texts = split(document.text, tokenizer, tokens, overlap, markdown)
    return [
        Chunk(
            text,
            id=f"{source}#{hashlib.sha256(text.encode()).hexdigest()[:16]}",
            title=document.title,
            metadata={"source": source, "part": part},
        )
        for part, text in enumerate(dict.fromkeys(texts))
    ]
