"""Small question sets, and random adapters on disk, for the tests of evaluation."""

from __future__ import annotations

import json

import tiny_adapters

TEXTS = ["The tower is 330 m tall.", "Bees dance.", "Zürich lies on a lake.", "Ants follow trails."]


def write_set(folder, name="small", questions=5, texts=TEXTS):
    """A QA set whose questions differ in length, as do their documents."""
    docs = [{"title": f"T{i}", "text": text, "gold": i == 1} for i, text in enumerate(texts)]
    rows = [
        {
            "id": f"q{i}",
            "question": "How tall is it" + " really" * i + "?",
            "answers": ["330 m", "e"],
            "docs": docs[i % 3 :] + docs[: i % 3],
        }
        for i in range(questions)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_adapter(folder, name, **options):
    tiny_adapters.adapter(name=options.pop("model", "llama"), **options).save(folder / name)
    return str(folder / name)
