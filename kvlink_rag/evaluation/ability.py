"""General ability: is plain text, and are instructions, as likely with an adapter as without?

Perplexity of texts that training leaves out (:func:`kvlink_rag.evaluation.data.held_out`), with
each adapter on against off. Everything runs through the adapter's reader, without chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from kvlink_rag.common.progress import bar
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError
from kvlink_rag.evaluation.data import field, held_out, read_rows, set_name
from kvlink_rag.evaluation.items import digest_of
from kvlink_rag.evaluation.journal import Journal
from kvlink_rag.evaluation.plan import Plan
from kvlink_rag.evaluation.rows import FORMAT

FileKind = Literal["text", "instructions"]

MAX_TOKENS = 1024
"""Of a text, or of an instruction with its response: what is longer is cut."""

OFF = "off"


@dataclass(frozen=True, eq=False)
class File:
    """The held-out texts (or lists of messages) of a file, by the number of their line from 0."""

    name: str
    kind: FileKind
    texts: dict[int, Any]

    def digest(self, model: str, place: int) -> str:
        """Of the loss of a text under a model."""
        return digest_of([FORMAT, model, self.kind, MAX_TOKENS, self.texts[place]])


def read_files(plan: Plan) -> list[File]:
    """The texts that a plan names.

    Raises:
        InputError: a file is missing or damaged, naming file, line and field.
    """
    files = [_read(path, "text", plan.questions) for path in plan.text]
    return files + [_read(path, "instructions", plan.questions) for path in plan.instructions]


def _read(source: str, kind: FileKind, limit: int | None) -> File:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"no such file: {source}")
    texts: dict[int, Any] = {}
    for place, (where, row) in enumerate(read_rows(path)):
        if limit is not None and len(texts) >= limit:
            break
        if held_out(place):
            texts[place] = field(row, "text", str, where) if kind == "text" else _turns(row, where)
    if not texts:
        raise InputError(f"{path} is empty: it is to have a JSON object on each line")
    return File(set_name(path), kind, texts)


def _turns(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages up to and with the last response."""
    messages = field(row, "messages", list, where)
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: a message is {str(message)[:60]!r}: role and content miss")
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if len(messages) < 2 or not isinstance(messages[-1]["content"], str):
        raise InputError(f"{where}: no message of the role 'assistant' answers another one")
    return list(messages)


def text_loss(engine: KVLinkEngine, text: str) -> tuple[float, int]:
    """Loss (nats, a sum) over the tokens of a plain text behind the first, and their number."""
    start = list(engine.tokenizer("")["input_ids"])  # a start token, if the model has one
    return _loss(engine, start, engine.layout.encode_text(text))


def response_loss(engine: KVLinkEngine, messages: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Loss (nats, a sum) over the last message and its end token, and their number."""
    prompt = engine.layout.lay_out(messages[:-1], with_chunks=False).question
    response = engine.layout.encode_text(messages[-1]["content"])
    return _loss(engine, prompt, [*response, *sorted(engine.stop_ids)[:1]])


@torch.inference_mode()
def _loss(engine: KVLinkEngine, given: list[int], wanted: list[int]) -> tuple[float, int]:
    """Loss over the ``wanted`` tokens that have something before them."""
    if not given:
        given, wanted = wanted[:1], wanted[1:]
    limit = min(MAX_TOKENS, engine.architecture.max_tokens)
    wanted = wanted[: max(limit - len(given), 0)]
    if not wanted:
        return 0.0, 0
    ids = torch.tensor([[*given, *wanted]], device=engine.architecture.device)
    logits = engine.reader(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(wanted))
    losses = F.cross_entropy(logits.logits[0].float(), ids[0, -len(wanted) :], reduction="sum")
    return float(losses), len(wanted)


LOSSES: dict[FileKind, Callable[[KVLinkEngine, Any], tuple[float, int]]] = {
    "text": text_loss,
    "instructions": response_loss,
}


def describe(plan: Plan, base: KVLinkEngine, files: Sequence[File]) -> list[dict[str, Any]]:
    """For each file, the digests of all losses: by adapter and line."""
    models = {name: _model(base, name) for name in [OFF, *plan.adapters]} if files else {}
    return [
        {
            "name": file.name,
            "kind": file.kind,
            "items": {
                name: {str(place): file.digest(model, place) for place in file.texts}
                for name, model in models.items()
            },
        }
        for file in files
    ]


def _model(base: KVLinkEngine, adapter: str) -> str:
    from kvlink_rag.adapters.load import load_adapter

    if adapter == OFF:
        return base.fingerprint
    return f"{base.fingerprint} {load_adapter(adapter).fingerprint}"


def measure(
    plan: Plan,
    base: KVLinkEngine,
    files: Sequence[File],
    out: Path,
    shard: tuple[int, int],
    progress: bool,
) -> None:
    """Losses that the folder does not hold yet, each a line of ``ability.jsonl``."""
    journal = Journal(out, "ability", shard)
    known = set(journal.read())
    adapters = [OFF, *plan.adapters] if files else []
    total = len(adapters) * sum(len(file.texts) for file in files)
    with bar("Reading texts", total, enabled=progress and bool(files)) as show:
        done = 0
        for adapter in adapters:
            engine = base if adapter == OFF else base.with_adapter(adapter)
            model = _model(base, adapter)
            for file in files:
                for place, text in list(file.texts.items())[shard[0] :: shard[1]]:
                    digest = file.digest(model, place)
                    if digest not in known:
                        loss, tokens = LOSSES[file.kind](engine, text)
                        more = {"loss": loss, "tokens": tokens, "digest": digest}
                        about = {"set": file.name, "id": place, "adapter": adapter}
                        journal.append([about | more])
                        known.add(digest)
                    done += 1
                    show(done)
