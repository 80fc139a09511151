"""Training computes what inference computes: packs give the logits of the engine, turn by turn."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny_adapters import KINDS, LAYOUTS, PROMPT

from kvlink_rag import Chunk, InputError
from kvlink_rag.runners.transformers.forward import run_behind
from kvlink_rag.training.attention import _PackAttention
from kvlink_rag.training.lesson import Lesson, Turn
from kvlink_rag.training.model import LinkModel
from kvlink_rag.training.pack import IGNORED, Packer
from kvlink_rag.training.run import first_links, lora_config, make_adapter
from kvlink_rag.training.settings import TrainSettings

pytestmark = pytest.mark.matrix

TOLERANCE = 1e-4
MODELS = [
    "llama",
    "llama-yarn",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-sliding",
    "olmo2",
    "phi",
    "smollm3",
]
CHUNKS = (
    Chunk("The tower is 330 m tall.", title="Tower"),
    Chunk("x"),
    Chunk("Bees dance to tell where flowers are, and this is longer than any sliding window."),
    Chunk("Zürich lies on a lake; 湖 means lake."),
)
TURNS = (
    Turn("How tall is it?", "330 m"),
    Turn("Who dances?", "Bees"),
    Turn("?", "湖"),
)
VIEWS = ("link", "reuse", "full")

all_models = pytest.mark.parametrize("name", MODELS)
few_models = pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-sliding"])
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Made:
    """A model in training with random weights, its packer, and an engine with its adapter."""

    def __init__(
        self, name="llama", kind="cache-preserving", layout="slot", *, behind="system", **changes
    ) -> None:
        settings = TrainSettings(
            data={"none": 1.0}, kind=kind, layout=layout, encode_behind=behind,
            **{"links": 2, "slots": 6, "max_chunks": 6, "rank": 4, "alpha": 8, **changes},
        )  # fmt: skip
        base = tiny.engine(name, encode_behind=behind)
        links = first_links(settings, base)
        self.base = base
        self.model = LinkModel(base.model, base.architecture, lora_config(settings), links).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.model.trained().values():
                weight.copy_(0.12 * torch.randn(weight.shape, generator=generator))
        self.packer = Packer(base, kind, links, max_tokens=2048, max_answer=64)
        self.engine = base.with_adapter(make_adapter(settings, base, self.model))
        assert self.engine.layout.template == PROMPT
        assert self.engine.behind == base.behind

    @torch.inference_mode()
    def trained(self, *lessons: Lesson) -> torch.Tensor:
        """Logits ``[labels, vocab]`` of the packs of some lessons in one batch."""
        return self.model([self.packer.pack(lesson) for lesson in lessons])["logits"]

    def inferred(self, *lessons: Lesson) -> torch.Tensor:
        """The engine's logits for the same labels, one turn after the other."""
        return torch.cat([self._turn(lesson, turn) for lesson in lessons for turn in lesson.turns])

    def _turn(self, lesson: Lesson, turn: Turn) -> torch.Tensor:
        prefill = self.engine.prefill(turn.question, lesson.chunks, strategy=lesson.view)
        rows = [prefill.logits]
        for token in self.engine.layout.encode_text(turn.answer):  # the end token is predicted
            rows.append(run_behind(self.engine.reader, prefill.cache, [token]))
        return torch.stack(rows)


made = functools.cache(Made)


def check(made: Made, *lessons: Lesson) -> None:
    torch.testing.assert_close(
        made.trained(*lessons), made.inferred(*lessons), atol=TOLERANCE, rtol=0
    )


@all_models
@all_kinds
@all_layouts
def test_a_pack_gives_the_logits_of_inference(name, kind, layout):
    for view in VIEWS if layout == "slot" else ("link",):  # the others have no link tokens
        check(made(name, kind, layout), Lesson(CHUNKS, TURNS, view))


@few_models
@all_kinds
@all_layouts
def test_many_packs_in_a_batch(name, kind, layout):
    lessons = [
        Lesson(CHUNKS[::-1], TURNS[:2], "link"),
        Lesson(CHUNKS[:1], TURNS[1:], "full"),
        Lesson((), TURNS[:1]),
        Lesson((CHUNKS[0], CHUNKS[1], CHUNKS[0]), TURNS[::-1], "reuse"),
        Lesson(CHUNKS[2:3], TURNS[2:], "link"),
    ]
    check(made(name, kind, layout), *lessons)


@few_models
@all_kinds
@pytest.mark.parametrize("behind", ["alone", "header"])
def test_every_prefix_behind_the_chunks(name, kind, behind):
    check(made(name, kind, behind=behind), *(Lesson(CHUNKS, TURNS, view) for view in VIEWS))


@few_models
@all_kinds
def test_lora_alone_and_link_tokens_alone(name, kind):
    lora = Made(name, kind, links=0, views={"reuse": 1.0})
    assert lora.engine.adapter.links is None
    check(lora, Lesson(CHUNKS, TURNS, "reuse"), Lesson(CHUNKS, TURNS, "full"))
    links = Made(name, kind, rank=0)
    assert links.engine.adapter.lora_config is None
    check(links, *(Lesson(CHUNKS, TURNS, view) for view in VIEWS))


@few_models
@all_kinds
@all_layouts
def test_the_other_turns_of_a_lesson_change_nothing(name, kind, layout):
    it = made(name, kind, layout)
    for view in VIEWS:
        together = it.trained(Lesson(CHUNKS, TURNS, view))
        alone = [it.trained(Lesson(CHUNKS, (turn,), view)) for turn in TURNS]
        torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)
        swapped = it.trained(Lesson(CHUNKS, (TURNS[1], Turn("Zzz!", "...."), TURNS[0]), view))
        torch.testing.assert_close(swapped[: len(alone[1])], alone[1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(swapped[-len(alone[0]) :], alone[0], atol=TOLERANCE, rtol=0)


@few_models
@all_kinds
def test_plain_text_is_an_ordinary_forward_pass(name, kind):
    it = made(name, kind)
    text = "Bees dance to tell where flowers are."
    ids = it.engine.layout.encode_text(text)
    with torch.inference_mode():
        expected = it.engine.reader(torch.tensor([ids])).logits[0, :-1]
    lesson = Lesson((), (Turn("", text),))
    torch.testing.assert_close(it.trained(lesson), expected, atol=TOLERANCE, rtol=0)


@few_models
@all_kinds
def test_these_tests_can_fail(name, kind):
    it = made(name, kind)
    lessons = {view: Lesson(CHUNKS, TURNS[:1], view) for view in VIEWS}
    trained = {view: it.trained(lesson) for view, lesson in lessons.items()}
    for view, lesson in lessons.items():
        inferred = it.inferred(lesson)
        for other in VIEWS:
            difference = (trained[other] - inferred).abs().max()
            assert (difference > 100 * TOLERANCE) == (other != view)
    base = it.base.prefill(TURNS[0].question, CHUNKS, strategy="reuse").logits
    assert (trained["reuse"][0] - base).abs().max() > 100 * TOLERANCE


def next_slots_links(pack, first_id):
    pack.token_ids = [token + 2 if token >= first_id else token for token in pack.token_ids]


def links_that_only_later_links_see(pack, first_id):
    for place, token in enumerate(pack.token_ids):
        pack.shared[place] &= token < first_id
        pack.groups[place] = -99 if token >= first_id else pack.groups[place]


def turns_that_see_each_other(pack, first_id):
    pack.groups = [0 if group >= 0 else group for group in pack.groups]


def links_at_the_end(pack, first_id):
    for place, token in enumerate(pack.token_ids):
        pack.positions[place] += 9 * (token >= first_id)


@few_models
@all_kinds
@pytest.mark.parametrize(
    "mistake",
    [
        next_slots_links,
        links_that_only_later_links_see,
        turns_that_see_each_other,
        links_at_the_end,
    ],
)
def test_a_wrong_pack_is_seen(name, kind, mistake):
    it = made(name, kind)
    lesson = Lesson(CHUNKS, TURNS, "link")
    pack = it.packer.pack(lesson)
    mistake(pack, it.packer.links.first_id)
    with torch.inference_mode():
        wrong = it.model([pack])["logits"]
    assert (wrong - it.trained(lesson)).abs().max() > 100 * TOLERANCE


@few_models
@all_kinds
def test_the_loss_is_a_mean_over_turns(name, kind):
    it = made(name, kind)
    lessons = [Lesson(CHUNKS, TURNS), Lesson(CHUNKS[:1], TURNS[:1], "full")]
    packs = [it.packer.pack(lesson) for lesson in lessons]
    with torch.inference_mode():
        loss = float(it.model(packs)["loss"])
    losses = []
    for lesson in lessons:
        for turn in lesson.turns:
            rows = it._turn(lesson, turn)
            ids = [*it.engine.layout.encode_text(turn.answer), it.packer.end]
            losses.append(F.cross_entropy(rows, torch.tensor(ids)))
    assert loss == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


@few_models
@all_kinds
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("own", [False, True], ids=["base", "own"])
def test_the_teacher_is_a_full_prefill(name, kind, view, own):
    it = made(name, kind)
    teacher = it.engine if own else it.base
    packer = Packer(
        it.base,
        kind,
        it.packer.links,
        max_tokens=2048,
        max_answer=64,
        distill=1.0,
        teacher=teacher if own else None,
    )
    pack = packer.pack(Lesson(CHUNKS, TURNS, view))
    with torch.inference_mode():
        loss = float(it.model([pack])["loss"])
    start, losses = 0, []
    for turn in TURNS:
        prefill = teacher.prefill(turn.question, CHUNKS, strategy="full")
        rows = [prefill.logits]
        for token in it.base.layout.encode_text(turn.answer):
            rows.append(run_behind(teacher.reader, prefill.cache, [token]))
        expected = torch.stack(rows).log_softmax(-1)
        stop = start + len(rows)
        torch.testing.assert_close(pack.teacher[start:stop], expected, atol=TOLERANCE, rtol=0)
        said = it._turn(Lesson(CHUNKS, TURNS, view), turn).log_softmax(-1)
        losses.append(F.kl_div(said, expected, reduction="batchmean", log_target=True))
        start = stop
    assert start == len(pack.teacher)
    assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4, abs=1e-6)


@all_kinds
def test_gradients_reach_what_is_trained_and_nothing_else(kind):
    it = Made(kind=kind)
    before = {name: w.clone() for name, w in it.base.model.state_dict().items()}
    it.model([it.packer.pack(Lesson(CHUNKS, TURNS))])["loss"].backward()
    for name, weight in it.model.named_parameters():
        assert weight.requires_grad == ("lora_" in name or name == "link_embeddings"), name
        if weight.requires_grad:
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().max() > 0, name
    used = it.model.link_embeddings.grad.abs().amax(1) > 0
    assert used.tolist() == [True] * 2 * len(CHUNKS) + [False] * 2 * (6 - len(CHUNKS))
    assert all(weight.grad is None for weight in it.base.model.parameters())
    assert all(torch.equal(w, before[name]) for name, w in it.base.model.state_dict().items())


@all_kinds
@all_layouts
def test_gradients_are_those_of_the_loss(kind, layout):
    """A small step along the gradient changes the loss by what the gradient says."""
    it = Made("gemma2", kind, layout)
    packs = [it.packer.pack(Lesson(CHUNKS, TURNS, view)) for view in VIEWS]
    it.model(packs)["loss"].backward()
    weights = [weight for weight in it.model.parameters() if weight.requires_grad]
    slope = float(sum((weight.grad**2).sum() for weight in weights))
    step = 0.005 / slope**0.5

    def loss(factor):
        with torch.no_grad():
            for weight in weights:
                weight += factor * step * weight.grad / slope**0.5
            return float(it.model(packs)["loss"])

    up, down = loss(1), loss(-2)
    assert (up - down) / (2 * step) == pytest.approx(slope**0.5, rel=0.05)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("frozen", [0, 3])
def test_gradients_of_the_attention(softcap, frozen):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = draw(4, 5, 6), draw(2, 5, 6), draw(2, 5, 3)
    keys, values = draw(2, frozen, 6), draw(2, frozen, 3)
    seen = torch.ones(5, frozen + 5, dtype=torch.bool).tril(frozen)
    seen[3, frozen + 1] = False
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, float("-inf"))

    def attend(query, key, value):
        return _PackAttention.apply(query, key, value, keys, values, bias, 0.7, softcap)

    inputs = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    assert torch.autograd.gradcheck(attend, inputs)
    everything = (torch.cat(pair, 1).repeat_interleave(2, 0)
                  for pair in ((keys, key), (values, value)))  # fmt: skip
    all_keys, all_values = everything
    scores = query @ all_keys.transpose(1, 2) * 0.7
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    expected = (scores + bias).softmax(-1) @ all_values
    torch.testing.assert_close(attend(*inputs), expected)


@all_kinds
def test_labels_are_the_answers(kind):
    it = made("llama", kind)
    pack = it.packer.pack(Lesson(CHUNKS, TURNS))
    labels = [label for label in pack.labels if label != IGNORED]
    answers = [[*it.engine.layout.encode_text(turn.answer), it.packer.end] for turn in TURNS]
    assert labels == [token for answer in answers for token in answer]
    assert pack.answers == [len(answer) for answer in answers]
    assert it.packer.end in it.engine.stop_ids


@all_kinds
@pytest.mark.parametrize("view", VIEWS)
def test_long_lessons_are_cut(kind, view):
    it = made("llama", kind)
    packer = Packer(it.base, kind, it.packer.links, max_tokens=200, max_answer=10)
    long = Lesson(tuple(Chunk(f"{i} " * 30) for i in range(6)), (Turn("Why?", "z" * 50),), view)
    pack = packer.pack(long)
    assert max(pack.positions) < 200
    assert pack.answers == [10]
    few = dataclasses.replace(long, chunks=(Chunk("y" * 1000),))
    assert max(packer.pack(few).positions) < 200


def test_answers_end_as_the_tokenizer_says():
    """Models tell several tokens that stop them; chat models end a turn with their tokenizer's."""
    engine = tiny.engine()
    end = engine.tokenizer.eos_token_id
    engine.stop_ids = frozenset({end - 1, end, end + 1})
    assert Packer(engine, "whole-model", None, max_tokens=99, max_answer=9).end == end
    engine.stop_ids = frozenset({7})
    assert Packer(engine, "whole-model", None, max_tokens=99, max_answer=9).end == 7
    engine.stop_ids = frozenset()
    with pytest.raises(InputError, match=r"no token that ends an answer.*eos_token"):
        Packer(engine, "whole-model", None, max_tokens=99, max_answer=9)
