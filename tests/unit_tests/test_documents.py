from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from tokenizers import Tokenizer, models, pre_tokenizers

from kvlink_rag.errors import InputError
from kvlink_rag.index import documents
from kvlink_rag.index.documents import (
    Document,
    Skipped,
    chunks_of,
    find_files,
    look,
    read_file,
    split,
)


class Bytes:
    """A tokenizer with one token a byte, as a transformers tokenizer holds it."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: place for place, character in enumerate(alphabet)}
        self.backend_tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def count(self, text: str) -> int:
        return len(self.backend_tokenizer.encode(text).ids)


@pytest.fixture(scope="module")
def tokenizer() -> Bytes:
    return Bytes()


def write_pdf(path: Path, text: str, password: str | None = None, title: str | None = None) -> None:
    """A one-page PDF that shows a line of text (none when it is empty)."""
    writer = PdfWriter()
    page = writer.add_blank_page(width=300, height=100)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 10 50 Td ({text}) Tj ET".encode() if text else b"")
    page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)


def skipped(path: Path) -> Skipped:
    read = read_file(path)
    assert isinstance(read, Skipped)
    assert read.path == path
    return read


def document(path: Path) -> Document:
    read = read_file(path)
    assert isinstance(read, Document), read
    return read


def test_find_files_takes_known_kinds_sorted_and_leaves_hidden_ones(tmp_path: Path) -> None:
    for name in (
        "b.md",
        "a.txt",
        "sub/c.RST",
        "sub/d.pdf",
        "sub/.hidden.txt",
        ".git/x.txt",
        "e.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    names = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path])]
    assert names == ["a.txt", "b.md", "sub/c.RST", "sub/d.pdf"]


def test_find_files_takes_a_named_file_of_any_kind_once(tmp_path: Path) -> None:
    code = tmp_path / "e.py"
    code.write_text("x")
    assert find_files([code, str(code)]) == [code]


def test_find_files_names_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder: .*nothing"):
        find_files([tmp_path / "nothing"])


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]


def test_what_is_left_out_is_named_with_the_reason(tmp_path: Path) -> None:
    for name in ("a.txt", "b.png", ".hidden.md", ".git/config", "sub/c.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (tmp_path / "again").symlink_to(tmp_path)
    found = look([tmp_path, tmp_path / "sub" / "c.py"])  # named: to be read
    assert found.files == [tmp_path / "a.txt", tmp_path / "sub" / "c.py"]
    assert [(each.path.name, each.reason) for each in found.left_out] == [
        (".git", "hidden folder"),
        (".hidden.md", "hidden"),
        ("again", "link to a folder"),
        ("b.png", "not named as text, Markdown or PDF"),
    ]


@pytest.mark.timeout(60)
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for path in find_files([tmp_path]):
        assert skipped(path).reason == "no regular file"
    assert len(find_files([tmp_path])) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_a_name_that_is_no_text_is_skipped(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    (path,) = find_files([tmp_path])
    assert skipped(path).reason == "its name is not UTF-8: rename it"


def test_whatever_a_decoder_raises_is_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(data: bytes) -> tuple[str, str]:
        raise RecursionError("too\ndeep")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(documents, "_decode", fails)
    assert skipped(tmp_path / "a.txt").reason == "cannot be read as text: too deep"


def test_title_is_the_first_heading_or_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text\n\n## The heading ##\n\n# Later\n")
    (tmp_path / "my_notes.txt").write_text("# not markdown\n")
    assert document(tmp_path / "a.md").title == "The heading"
    assert document(tmp_path / "my_notes.txt").title == "my notes"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_survives(tmp_path: Path, encoding: str) -> None:
    text = "Ünïcödé 元朝 إسلام 👩‍🚀\nnaïve"
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert document(path).text == text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Le café où l'été fut très agréable; l'hôtel était complètement fermé."),
        ("cp1252", "café"),
        ("cp1250", "Zażółć gęślą jaźń. Książka leży na stole, a chłopiec czyta gazetę w domu."),
        ("cp1253", "Στην Ελλάδα είναι πολύ ζεστά το καλοκαίρι, λένε όλοι."),
        ("shift_jis", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"),
    ],
)
def test_another_encoding_is_found_and_noted(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    read = document(path)
    assert read.text == text
    assert read.note is not None
    assert "not UTF-8" in read.note


@pytest.mark.parametrize(
    "data",
    [
        b"text\0more",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4,
        bytes(range(1, 32)) * 50,
        b"\xff\xfea",
    ],
)
def test_binary_content_is_skipped(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert "not text" in skipped(path).reason
    assert not skipped(path).unreadable


def test_empty_and_blank_files_are_skipped(tmp_path: Path) -> None:
    for data in (b"", b" \n\t\n"):
        path = tmp_path / "a.txt"
        path.write_bytes(data)
        assert skipped(path).reason == "empty"


def test_what_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    # root may read everything, so not by permissions alone
    gone = tmp_path / "gone.txt"
    assert skipped(gone).unreadable
    assert skipped(tmp_path).unreadable


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    assert skipped(path).reason == "cannot be read: Permission denied"


def test_pdf(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    write_pdf(path, "The answer is 42.", title="Answers")
    assert "The answer is 42." in document(path).text
    assert document(path).title == "Answers"


def test_pdf_that_cannot_be_used_is_skipped_with_the_reason(tmp_path: Path) -> None:
    write_pdf(tmp_path / "locked.pdf", "secret", password="x")
    write_pdf(tmp_path / "scan.pdf", "")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing")
    write_pdf(tmp_path / "cut.pdf", "text")
    whole = (tmp_path / "cut.pdf").read_bytes()
    (tmp_path / "cut.pdf").write_bytes(whole[: len(whole) // 3])
    assert PdfReader(tmp_path / "locked.pdf").is_encrypted
    assert skipped(tmp_path / "locked.pdf").reason == "encrypted PDF"
    assert "without text" in skipped(tmp_path / "scan.pdf").reason
    assert "not a readable PDF" in skipped(tmp_path / "broken.pdf").reason
    assert isinstance(read_file(tmp_path / "cut.pdf"), Skipped)


def test_chunks_keep_to_the_limit_and_lose_nothing(tokenizer: Bytes) -> None:
    text = "\n\n".join(f"Paragraph {n}: größe 元朝 and more words. Another one." for n in range(60))
    chunks = split(text, tokenizer, tokens=100, overlap=0)
    assert len(chunks) > 20
    assert max(map(tokenizer.count, chunks)) <= 100
    assert "".join("".join(chunks).split()) == "".join(text.split())


def test_overlap_repeats_the_end_of_the_chunk_before(tokenizer: Bytes) -> None:
    text = " ".join(f"word{n}" for n in range(200))
    chunks = split(text, tokenizer, tokens=100, overlap=40)
    for before, after in pairwise(chunks):
        assert after.split()[0] in before.split()


def test_markdown_is_cut_at_headings(tokenizer: Bytes) -> None:
    text = "# One\n\nshort text here\n\n# Two\n\nother text there\n"
    assert [c[:5] for c in split(text, tokenizer, 30, 0, markdown=True)] == ["# One", "# Two"]


@pytest.mark.parametrize(("tokens", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_sizes_that_cannot_be_are_refused(tokenizer: Bytes, tokens: int, overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        split("text", tokenizer, tokens, overlap)


def test_ids_stay_for_parts_that_stay(tmp_path: Path, tokenizer: Bytes) -> None:
    paragraphs = [f"Paragraph number {n} has these words in it." for n in range(20)]
    path = tmp_path / "a.txt"

    def chunks() -> dict[str, Any]:
        path.write_text("\n\n".join(paragraphs))
        return {c.id: c for c in chunks_of(document(path), tokenizer, tokens=50, overlap=0)}

    before = chunks()
    paragraphs[7] = "Something else is written here now."
    after = chunks()
    assert len(before) == len(after) == 20
    assert len(before.keys() & after.keys()) == 19
    assert [c.metadata for c in after.values()] == [
        {"source": str(path), "part": part} for part in range(20)
    ]
    assert {c.title for c in after.values()} == {"a"}


def test_a_text_that_occurs_twice_is_one_chunk(tmp_path: Path, tokenizer: Bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(["The same words again and again."] * 3))
    assert len(chunks_of(document(path), tokenizer, tokens=40, overlap=0)) == 1


@pytest.mark.model
@pytest.mark.slow
def test_five_megabytes(default_model_folder: str) -> None:
    from transformers import AutoTokenizer

    model_tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    section = "# Größe 元朝\n\n" + "The quick brown fox jumps over the lazy dog, it is said. " * 40
    text = "\n\n".join(f"{section} {n}" for n in range(5_000_000 // len(section)))
    start = time.perf_counter()
    chunks = split(text, model_tokenizer, overlap=0)
    assert time.perf_counter() - start < 120
    assert "".join("".join(chunks).split()) == "".join(text.split())
    lengths = [
        len(ids) for ids in model_tokenizer(chunks[::20], add_special_tokens=False).input_ids
    ]
    assert max(lengths) <= 256
