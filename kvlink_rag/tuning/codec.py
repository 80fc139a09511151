"""Which codec a model's chunk caches can be stored with: measured, not assumed.

    from kvlink_rag.tuning.codec import choose_codec

    choice = choose_codec(engine)
    print(choice.codec, *choice.rows(), sep="\\n")

``codec="auto"`` of an engine, an index and the command line does this once, for a new folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvlink_rag.chunk import RAW, Chunk
from kvlink_rag.common.corpus import corpus_files, paragraphs
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.engine.fidelity import compare
from kvlink_rag.engine.questions import Case, write_cases
from kvlink_rag.engine.trial import Trial
from kvlink_rag.errors import InputError
from kvlink_rag.store import KVStore, is_store
from kvlink_rag.tuning.trial import reuse_of, store_wanted, trial_engines

AUTO = "auto"
"""In place of a codec's name: the one that is chosen by measuring."""

BOUND = 0.0018
"""Nats that a codec may add to a token, on average.

Over the answers to the questions here, to others of five sets, and to such as the default model
writes itself, with and without its adapter, int8 added 0.0009 to 0.0014 nats, fp8 0.0020 to 0.0136
and int4 0.0049 to 0.0251. By first tokens of 300 questions it was 0.0031, 0.0189 and 0.0667, which
left 96, 92 and 85 % of the likeliest as they were, and by exact match int8 lost nothing: the bound
lies between what hardly shows and what does. Reading chunks apart adds far more by itself.
"""

BUILT_IN = (
    ("Who was the first head of the Federal Energy Office?", "William E. Simon as the first"),
    ("On which day was Israel attacked in 1973?", "launched a surprise attack on Israel"),
    ("Which country faced a complete embargo?", "the Netherlands faced a complete embargo"),
    ("Who was the first person to fly in space, and when?", "Yuri Gagarin became the first person"),
    ("How many astronauts was Apollo to carry?", "The Apollo program was conceived during"),
    ("From when to when did Apollo run?", "supported by the two-man Gemini program"),
    ("In which animals does the plague live?", "is enzootic (commonly present)"),
    ("What are the symptoms of bubonic plague?", "mortality rate of 30–75%"),  # noqa: RUF001
    ("In which years was there plague somewhere in Europe?", "According to Biraben"),
    ("What are the three major types of rock?", "three major types of rock"),
    ("How is the interior of the Earth known?", "arrival times of seismic waves"),
    ("What is the principle of faunal succession based on?", "principle of faunal succession"),
    ("Which phagocytes are the most abundant?", "Neutrophils and macrophages are phagocytes"),
    ("What do natural killer cells destroy?", "Natural killer cells, or NK cells"),
    ("What do killer T cells kill?", "Killer T cells are a sub-group"),
)
"""Questions about the articles of the package, three of each, and words of the paragraph that
answers each."""

CHUNKS_PER_CASE = 5
QUESTIONS = 12
"""That the model writes about chunks."""
TOKENS = 16
"""Of each answer, compared."""


@dataclass(frozen=True)
class CodecMeasure:
    """What was measured of one codec.

    Attributes:
        bytes_per_token: of files, headers included.
        kl_nats: mean divergence that it adds: ``KL(raw || coded)`` of a token's distribution, over
            the tokens of full prefill's answers.
    """

    codec: str
    bytes_per_token: float
    kl_nats: float


@dataclass(frozen=True)
class CodecChoice:
    """A codec, and why.

    Attributes:
        codec: the smallest whose mean divergence is at or under ``bound`` nats.
        measured: each codec that can hold the model's caches, smallest first.
        refused: why the others cannot, by name.
    """

    codec: str
    bound: float
    measured: tuple[CodecMeasure, ...]
    refused: dict[str, str]

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people: a heading, and a row for each codec measured."""
        raw = next(each for each in self.measured if each.codec == RAW).bytes_per_token
        rows: list[tuple[str, ...]] = [("codec", "bytes a token", "of raw", "divergence, nats", "")]
        for each in self.measured:
            size, share = f"{each.bytes_per_token:,.0f}", f"{each.bytes_per_token / raw:.1%}"
            chosen = "chosen" if each.codec == self.codec else ""
            rows.append((each.codec, size, share, f"{each.kl_nats:.4f}", chosen))
        return rows


def choose_codec(
    engine: KVLinkEngine,
    cases: Iterable[Case] | None = None,
    *,
    bound: float = BOUND,
    progress: bool = True,
) -> CodecChoice:
    """The smallest codec that leaves the distributions of answers' tokens nearly as they are.

    Full prefill's answer to each question is read with strategy `reuse` from caches of every codec,
    in temporary folders, and what the model would have said at each token is compared with `raw`
    ones (:class:`kvlink_rag.engine.trial.Trial`). The engine's own store is left alone.

    Args:
        engine: with the model, and adapter, that will read the caches.
        cases: questions with chunks such as yours; None takes 15 about Wikipedia articles, with
            five paragraphs each.
        bound: the most divergence, in nats, on the mean of the cases.
        progress: show a bar.

    Raises:
        InputError: there are no cases, one is empty or too long, or the bound is below 0.
    """
    if not bound >= 0:
        raise InputError(f"bound must be 0 or more (nats), not {bound}")
    given = built_in_cases() if cases is None else [(q, list(chunks)) for q, chunks in cases]
    if not given:
        raise InputError("there are no cases to choose a codec by: pass questions with chunks")
    with (
        trial_engines(engine) as twins,
        bar("Choosing a codec", len(given), enabled=progress) as show,
    ):
        refused: dict[str, str] = {}
        sums, tokens = dict.fromkeys(twins, 0.0), 0
        for done, (question, chunks) in enumerate(given, 1):
            refused |= store_wanted(twins, question, chunks)
            request = reuse_of(engine, question, chunks)
            trial = Trial(twins[RAW].pipeline, request, TOKENS)
            raw, _ = trial.read(request)
            tokens += len(raw)
            for codec, twin in twins.items():
                if codec != RAW:
                    coded, _ = trial.read(request, twin.pipeline)
                    sums[codec] += compare(raw, coded).kl_nats * len(raw)
            show(done)
        stats = {codec: twin.store.stat() for codec, twin in twins.items()}
    measured = [
        CodecMeasure(codec, stat.nbytes / stat.tokens, sums[codec] / tokens)
        for codec, stat in stats.items()
    ]
    measured.sort(key=lambda each: each.bytes_per_token)
    chosen = next(each.codec for each in measured if each.kl_nats <= bound)  # `raw` adds nothing
    return CodecChoice(chosen, bound, tuple(measured), refused)


def resolve_codec(
    codec: str | None,
    store: str | os.PathLike[str] | KVStore | None,
    engine: KVLinkEngine,
    chunks: Sequence[Chunk] = (),
) -> str | None:
    """What to open a store with where `auto` may be said for a codec.

    Args:
        codec: None or a codec's name, which is returned as it is, or `auto`.
        store: a folder; or a store or None (memory), which have their codec.
        engine: to measure with (:func:`choose_codec`) where `auto` is for a folder that is new.
        chunks: that it will hold, where that is known: the model asks itself about some of them.

    Returns:
        a codec's name; None for that of the store.

    Raises:
        InputError: `auto` for a URL.
        StoreError: the folder cannot be looked at.
    """
    if codec != AUTO or not isinstance(store, (str, os.PathLike)):
        return None if codec == AUTO else codec
    if isinstance(store, str) and "://" in store:
        raise InputError(
            "codec 'auto' is for a folder: all who share a URL need the same codec, so choose it "
            "once with kvlink_rag.tuning.codec.choose_codec and name it"
        )
    if is_store(store):
        return None
    if not chunks:
        return choose_codec(engine).codec
    cases = write_cases(engine.pipeline.unwatched, chunks, QUESTIONS, CHUNKS_PER_CASE)
    return choose_codec(engine, cases).codec


def built_in_cases() -> list[Case]:
    """Questions about the package's articles, each with one paragraph of every article.

    The paragraph that answers is among them, at any place.

    Raises:
        InputError: the articles are missing.
    """
    pool = [_paragraph(words) for _, words in BUILT_IN]
    step = len(pool) // CHUNKS_PER_CASE
    cases: list[Case] = []
    for number, (question, _) in enumerate(BUILT_IN):
        chunks = [pool[(number + step * other) % len(pool)] for other in range(CHUNKS_PER_CASE)]
        turn = number % CHUNKS_PER_CASE
        cases.append((question, chunks[turn:] + chunks[:turn]))
    return cases


def _paragraph(words: str) -> Chunk:
    for file in corpus_files():
        for text in paragraphs(file):
            if words in text:
                return Chunk(text, title=file.stem.replace("_", " "))
    raise InputError(f"the articles have no paragraph with {words!r}: reinstall kvlink-rag")
