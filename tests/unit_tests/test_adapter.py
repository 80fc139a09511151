from __future__ import annotations

import copy
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import tiny_adapters
import torch
import transformers as hf
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapters import KINDS, LAYOUTS

from kvlink_rag import (
    Adapter,
    AdapterError,
    AdapterRequiredError,
    InputError,
    KVLinkEngine,
    PromptTemplate,
)
from kvlink_rag.adapters.base_model import BaseModel
from kvlink_rag.adapters.load import load_adapter
from kvlink_rag.adapters.lora import lora_layers
from kvlink_rag.store import MemoryStore

CHUNKS = [f"Fact {i} is {i * i}." for i in range(5)]
QUESTION = "What is fact 3?"

all_kinds = pytest.mark.parametrize("kind", KINDS)


def logits(engine: KVLinkEngine, **options) -> torch.Tensor:
    return engine.prefill(QUESTION, CHUNKS, **options).logits


class TestFiles:
    @all_kinds
    @pytest.mark.parametrize("layout", [*LAYOUTS, None])
    @pytest.mark.parametrize("lora", [True, False])
    def test_round_trip(self, tmp_path, kind, layout, lora):
        options = {
            "encode_behind": "header",
            "prompt": PromptTemplate("Zürich:\n", "湖 {question}", {"enable_thinking": False}),
            "notes": {"steps": 3, "data": ["ä"]},
        }
        made = tiny_adapters.adapter("llama", kind, layout, lora=lora, **options)
        made.save(tmp_path / "deep" / "folder")
        read = load_adapter(str(tmp_path / "deep" / "folder"))
        assert (read.kind, read.encode_behind, read.notes) == (kind, "header", made.notes)
        assert read.prompt == made.prompt
        assert read.fingerprint == made.fingerprint
        assert read.name == str(tmp_path / "deep" / "folder")
        assert (read.links is None) == (layout is None)
        if read.links:
            assert read.links.ids(0, 1) == made.links.ids(0, 1)
            assert torch.equal(read.links.embeddings, made.links.embeddings)
        before, after = (tiny.engine(adapter=a, prompt=None) for a in (made, read))
        for strategy in ("link", "reuse", "full") if layout else ("reuse", "full"):
            torch.testing.assert_close(
                logits(after, strategy=strategy), logits(before, strategy=strategy), atol=0, rtol=0
            )

    def test_saved_again_over_the_old_one(self, tmp_path):
        for seed in range(2):
            made = tiny_adapters.adapter(seed=seed)
            made.save(tmp_path)
        assert torch.equal(load_adapter(tmp_path).links.embeddings, made.links.embeddings)

    def test_an_adapter_without_lora_over_one_with_it(self, tmp_path):
        tiny_adapters.adapter().save(tmp_path)
        tiny_adapters.adapter(lora=False).save(tmp_path)
        assert load_adapter(tmp_path).lora_config is None

    def test_files_are_plain(self, tmp_path):
        made = tiny_adapters.adapter(layout="slot", count=3, slots=7)
        made.save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "kvlink.json",
            "links.safetensors",
        ]
        settings = json.loads((tmp_path / "kvlink.json").read_text())
        assert (settings["format"], settings["kind"]) == (1, "cache-preserving")
        assert settings["links"] == {"layout": "slot", "count": 3, "slots": 7, "first_id": 320}
        assert settings["base"]["name"] == "tiny llama"
        with safe_open(tmp_path / "links.safetensors", "pt") as file:
            assert file.get_tensor("embeddings").shape == (21, 64)

    def test_peft_reads_its_own_files(self, tmp_path):
        """A whole-model adapter without its link tokens is a LoRA like any other."""
        made = tiny_adapters.adapter(kind="whole-model")
        made.save(tmp_path)
        config = LoraConfig.from_pretrained(tmp_path)
        assert (config.r, config.lora_alpha) == (4, 8)
        theirs = PeftModel.from_pretrained(copy.deepcopy(tiny.model("llama")), tmp_path)
        ours = tiny_adapters.engine("llama", made).prefill(QUESTION, CHUNKS, strategy="full")
        with torch.inference_mode():
            expected = theirs(torch.tensor([ours.token_ids])).logits[0, -1]
        torch.testing.assert_close(ours.logits, expected, atol=1e-4, rtol=0)

    def test_what_peft_saved_is_read(self, tmp_path):
        made = tiny_adapters.adapter(kind="whole-model")
        made.save(tmp_path)
        theirs = PeftModel.from_pretrained(copy.deepcopy(tiny.model("llama")), tmp_path)
        theirs.save_pretrained(tmp_path)
        read = load_adapter(tmp_path)
        engines = (tiny_adapters.engine("llama", a) for a in (made, read))
        first, second = map(logits, engines)
        torch.testing.assert_close(first, second, atol=0, rtol=0)


def edit(name, change):
    def damage(folder):
        settings = json.loads((folder / name).read_text())
        change(settings)
        (folder / name).write_text(json.dumps(settings))

    return damage


def cut(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def tensors(name, change):
    def damage(folder):
        loaded = load_file(folder / name)
        save_file(change(loaded), folder / name)

    return damage


DAMAGE = {
    "settings cut": cut("kvlink.json"),
    "settings empty": write("kvlink.json", ""),
    "settings a list": write("kvlink.json", "[1]"),
    "settings not UTF-8": lambda folder: (folder / "kvlink.json").write_bytes(b"\xff\xfe{"),
    "unknown format": edit("kvlink.json", lambda s: s.update(format=99)),
    "unknown kind": edit("kvlink.json", lambda s: s.update(kind="magic")),
    "unknown layout": edit("kvlink.json", lambda s: s["links"].update(layout="spiral")),
    "unknown prefix": edit("kvlink.json", lambda s: s.update(encode_behind="everything")),
    "kind missing": edit("kvlink.json", lambda s: s.pop("kind")),
    "links a text": edit("kvlink.json", lambda s: s.update(links="five")),
    "prompt without question": edit("kvlink.json", lambda s: s["prompt"].update(question="?")),
    "more link tokens told than there are": edit(
        "kvlink.json", lambda s: s["links"].update(count=9)
    ),
    "no number of slots": edit("kvlink.json", lambda s: s["links"].update(slots=None)),
    "links cut": cut("links.safetensors"),
    "links missing": remove("links.safetensors"),
    "no sample of the base": tensors(
        "links.safetensors", lambda t: {"embeddings": t["embeddings"]}
    ),
    "LoRA cut": cut("adapter_model.safetensors"),
    "LoRA missing": remove("adapter_model.safetensors"),
    "LoRA settings cut": cut("adapter_config.json"),
    "LoRA settings a list": write("adapter_config.json", "[1]"),
}
UNFIT = {
    "another rank": edit("adapter_config.json", lambda s: s.update(r=8)),
    "other layers": edit("adapter_config.json", lambda s: s.update(target_modules=["Wqkv"])),
    "fewer layers": edit("adapter_config.json", lambda s: s.update(target_modules=["q_proj"])),
    "half of the weights": tensors(
        "adapter_model.safetensors", lambda t: dict(list(t.items())[: len(t) // 2])
    ),
    "a rank that is none": edit("adapter_config.json", lambda s: s.update(r="four")),
    "embeddings of another width": tensors(
        "links.safetensors", lambda t: {**t, "embeddings": t["embeddings"][:, :32].contiguous()}
    ),
}


class TestLoadErrors:
    def test_no_such_folder(self, tmp_path):
        with pytest.raises(AdapterError, match=r"no adapter at '.*nowhere'.*kvlink train"):
            load_adapter(tmp_path / "nowhere")
        with pytest.raises(AdapterError, match="no adapter at 'smollm"):
            tiny.engine(adapter="smollm9-link5")

    def test_a_folder_that_is_no_adapter(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(AdapterError, match="no adapter at"):
            load_adapter(tmp_path)

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_files_name_folder_and_remedy(self, tmp_path, damage):
        tiny_adapters.adapter().save(tmp_path)
        DAMAGE[damage](tmp_path)
        with pytest.raises(AdapterError) as caught:
            load_adapter(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "get it anew" in str(caught.value)

    def test_another_format_is_told(self, tmp_path):
        tiny_adapters.adapter().save(tmp_path)
        DAMAGE["unknown format"](tmp_path)
        with pytest.raises(AdapterError, match="format 99, this version reads 1"):
            load_adapter(tmp_path)

    @all_kinds
    @pytest.mark.parametrize("damage", UNFIT)
    def test_what_does_not_fit_the_model_is_found_by_the_engine(self, tmp_path, kind, damage):
        tiny_adapters.adapter(kind=kind).save(tmp_path)
        UNFIT[damage](tmp_path)
        with pytest.raises(AdapterError) as caught:
            tiny.engine(adapter=tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_an_adapter_is_read_before_a_model_is_loaded(self, tmp_path):
        with pytest.raises(AdapterError):
            KVLinkEngine.from_pretrained(str(tmp_path), adapter=tmp_path / "nowhere")


def random_llama(**sizes) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**tiny.SIZES, **sizes})).eval()


def engine_of(model: hf.PreTrainedModel, adapter: Adapter) -> KVLinkEngine:
    return KVLinkEngine.from_pretrained((model, tiny.tokenizer()), adapter=adapter)


class TestBaseModel:
    @pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "num_hidden_layers"])
    def test_other_sizes_are_named(self, size):
        model = random_llama(**{size: tiny.SIZES[size] * 2})
        with pytest.raises(AdapterError, match=rf"tiny llama \({size}.*kvlink train"):
            engine_of(model, tiny_adapters.adapter())

    def test_another_architecture_is_named(self):
        with pytest.raises(AdapterError, match=r"model_type llama.*qwen2"):
            engine_of(tiny.model("qwen2"), tiny_adapters.adapter())

    @pytest.mark.parametrize(
        "other", [{}, {"intermediate_size": 80}, {"tie_word_embeddings": True}]
    )
    def test_other_weights(self, other):
        with pytest.raises(AdapterError, match=r"trained for tiny llama.*other weights"):
            engine_of(random_llama(**other), tiny_adapters.adapter())

    def test_broken_weights(self):
        model = copy.deepcopy(tiny.model("llama"))
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(AdapterError, match="other weights"):
            BaseModel.of(tiny.model("llama"), "tiny").check(model, "adapter")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @all_kinds
    def test_another_number_type_passes(self, kind, dtype):
        model = copy.deepcopy(tiny.model("llama")).to(dtype)
        engine = engine_of(model, tiny_adapters.adapter(kind=kind))
        assert engine.prefill(QUESTION, CHUNKS, strategy="link").logits.isfinite().all()

    def test_quantised_weights_pass(self):
        """Rounded to 4 bits in blocks of 32, as GGUF's Q4_0 does."""
        model = copy.deepcopy(tiny.model("llama"))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    blocks = weight.view(-1, 32)
                    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-9) / 7
                    blocks.copy_((blocks / scale).round() * scale)
        original = BaseModel.of(tiny.model("llama"), "tiny")
        assert not torch.equal(original.sample, BaseModel.of(model, "quantised").sample)
        engine_of(model, tiny_adapters.adapter())

    def test_an_adapter_on_an_adapters_reader_is_known_by_the_base(self):
        trained = tiny_adapters.adapter()
        reader = tiny_adapters.engine("llama", trained).reader
        trained.base.check(reader, "again")

    def test_without_a_base_any_model_that_fits_will_do(self):
        free = dataclasses.replace(tiny_adapters.adapter(), base=None)
        engine_of(random_llama(), free)


class TestSharing:
    @pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
    def test_the_reader_shares_the_weights(self, name):
        base = tiny.engine(name)
        engine = base.with_adapter(tiny_adapters.adapter(name))
        assert engine.model is base.model
        theirs = {w.data_ptr() for w in base.model.parameters()}
        own = [n for n, w in engine.reader.named_parameters() if w.data_ptr() not in theirs]
        assert own
        assert all("lora_" in name for name in own)
        assert {w.data_ptr() for w in engine.reader.parameters()} >= theirs

    def test_a_merged_lora_shares_what_it_does_not_change(self):
        base = tiny.engine()
        engine = base.with_adapter(tiny_adapters.adapter(kind="whole-model"))
        theirs = {w.data_ptr() for w in base.model.parameters()}
        mine = dict(engine.reader.named_parameters())
        for name, weight in mine.items():
            shared = not any(part in name for part in ("proj",))
            assert (weight.data_ptr() in theirs) == shared, name

    @pytest.mark.parametrize("strategy", ["link", "reuse", "recompute", "full"])
    @pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
    def test_merging_changes_no_result_and_no_cache(self, name, strategy):
        base = tiny.engine(name)
        before = {key: weight.clone() for key, weight in base.model.state_dict().items()}
        engine = base.with_adapter(tiny_adapters.adapter(name))
        merged = base.with_adapter(tiny_adapters.adapter(name), merge_adapter=True)
        assert merged.model is base.model
        assert merged.fingerprint == base.fingerprint
        wanted = logits(engine, strategy=strategy)
        assert not torch.allclose(wanted, logits(base, strategy="reuse"), atol=1e-4)
        torch.testing.assert_close(logits(merged, strategy=strategy), wanted, atol=1e-4, rtol=1e-4)
        assert merged.prefill(QUESTION, CHUNKS, strategy="link").report.misses == 0
        after = base.model.state_dict()
        assert all(torch.equal(after[key], weight) for key, weight in before.items())

    def test_merging_stays_what_was_chosen(self):
        def is_merged(engine):
            layers = list(lora_layers(engine.reader))
            assert layers
            return all(layer.merged for layer in layers)

        engine = tiny.engine(adapter=tiny_adapters.adapter(), merge_adapter=True)
        assert is_merged(engine)
        other = tiny_adapters.adapter(seed=1)
        assert is_merged(engine.with_adapter(other))
        assert not is_merged(engine.with_adapter(other, merge_adapter=False))
        assert not is_merged(tiny.engine(adapter=other))

    @all_kinds
    def test_base_engine_and_the_users_pair_stay_as_they_are(self, kind):
        model = copy.deepcopy(tiny.model("llama"))
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        flags = [weight.requires_grad for weight in model.parameters()]
        base = KVLinkEngine.from_pretrained((model, tiny.tokenizer()))
        expected = {s: logits(base, strategy=s) for s in ("reuse", "recompute", "full")}
        fingerprint = base.fingerprint
        trained = tiny_adapters.adapter(kind=kind)
        for engine in (base.with_adapter(trained), engine_of(model, trained)):
            logits(engine, strategy="link")
            assert engine.tokenizer is base.tokenizer
            assert {w.data_ptr() for w in engine.reader.parameters()} & {
                w.data_ptr() for w in model.parameters()
            }
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert [weight.requires_grad for weight in model.parameters()] == flags
        assert not any("lora" in type(module).__name__.lower() for module in model.modules())
        assert not hasattr(model, "peft_config")
        fresh = KVLinkEngine.from_pretrained((model, tiny.tokenizer()))
        assert fresh.fingerprint == fingerprint
        for strategy, wanted in expected.items():
            assert torch.equal(logits(fresh, strategy=strategy), wanted)
            assert torch.equal(logits(base, strategy=strategy), wanted)

    def test_with_adapter_and_without_again(self):
        base = tiny.engine()
        trained = tiny_adapters.adapter()
        engine = base.with_adapter(trained)
        assert (engine.adapter, base.adapter) == (trained, None)
        assert engine.store is base.store
        back = engine.with_adapter(None)
        assert back.adapter is None
        assert torch.equal(logits(back), logits(base))
        other = engine.with_adapter(tiny_adapters.adapter(seed=1))  # not one on top of the other
        direct = base.with_adapter(tiny_adapters.adapter(seed=1))
        assert torch.equal(logits(other, strategy="link"), logits(direct, strategy="link"))

    def test_with_adapter_keeps_what_the_user_chose(self):
        words = PromptTemplate(before="Mine:\n", question="? {question}")
        base = tiny.engine(prompt=words, encode_behind="header", recompute=0.1)
        engine = base.with_adapter(tiny_adapters.adapter(encode_behind="alone"))
        assert engine.layout.template == words
        assert engine.behind == base.behind
        assert engine.options["recompute"] == 0.1
        assert base.with_adapter(None).layout.template == words

    def test_with_adapter_goes_on_linking_where_it_can(self):
        linked = tiny_adapters.engine("llama", tiny_adapters.adapter())
        assert linked.options.get("strategy", "reuse") == "link"
        assert (
            linked.with_adapter(tiny_adapters.adapter(seed=1)).options.get("strategy", "reuse")
            == "link"
        )
        assert (
            linked.with_adapter(tiny_adapters.adapter(layout=None)).options.get("strategy", "reuse")
            == "reuse"
        )
        assert linked.with_adapter(None).options.get("strategy", "reuse") == "reuse"
        assert (
            tiny.engine().with_adapter(tiny_adapters.adapter()).options.get("strategy", "reuse")
            == "reuse"
        )

    def test_what_the_user_left_open_is_the_adapters(self):
        words = PromptTemplate(before="Trained:\n", question="! {question}")
        trained = tiny_adapters.adapter(encode_behind="alone", prompt=words)
        engine = tiny.engine(prompt=None, encode_behind=None).with_adapter(trained)
        assert (engine.layout.template, engine.behind) == (words, ())
        direct = tiny.engine(prompt=None, adapter=trained)
        assert (direct.layout.template, direct.behind) == (words, ())

    def test_with_store_keeps_the_adapter(self):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter())
        twin = engine.with_store(MemoryStore())
        assert torch.equal(logits(twin), logits(engine))
        assert twin.store.stat().entries == engine.store.stat().entries > 0


class TestStore:
    def test_one_store_serves_the_base_and_any_number_of_cache_preserving_adapters(self, tmp_path):
        base = tiny.engine(store=tmp_path / "store")
        base.index(CHUNKS, progress=False)
        for seed, layout in enumerate(LAYOUTS):
            trained = tiny_adapters.adapter(layout=layout, seed=seed)
            engine = tiny_adapters.engine("llama", trained, store=tmp_path / "store")
            assert engine.fingerprint == base.fingerprint
            for strategy in ("link", "reuse", "recompute"):
                report = engine.prefill(QUESTION, CHUNKS, strategy=strategy).report
                assert (report.hits, report.misses) == (5, 0)
            assert engine.index(CHUNKS, progress=False).misses == 0
            twin = base.with_adapter(trained)
            assert twin.prefill(QUESTION, CHUNKS, strategy="link").report.misses == 0

    def test_a_whole_model_adapter_has_nothing_but_misses(self):
        base = tiny.engine()
        base.index(CHUNKS, progress=False)
        first, second = (
            base.with_adapter(tiny_adapters.adapter(kind="whole-model", seed=seed))
            for seed in range(2)
        )
        assert len({base.fingerprint, first.fingerprint, second.fingerprint}) == 3
        for engine in (first, second):
            report = engine.prefill(QUESTION, CHUNKS, strategy="link").report
            assert (report.hits, report.misses, report.reused_tokens) == (0, 5, 0)
            report = engine.prefill(QUESTION, CHUNKS, strategy="link").report
            assert (report.hits, report.misses) == (5, 0)
        assert base.prefill(QUESTION, CHUNKS).report.misses == 0

    def test_a_whole_model_adapter_made_anew_finds_its_caches(self, tmp_path):
        trained = tiny_adapters.adapter(kind="whole-model")
        tiny_adapters.engine("llama", trained, store=tmp_path / "store").index(
            CHUNKS, progress=False
        )
        trained.save(tmp_path / "adapter")
        again = tiny.engine(adapter=tmp_path / "adapter", store=tmp_path / "store")
        assert again.prefill(QUESTION, CHUNKS, strategy="link").report.misses == 0


class TestLink:
    def test_link_needs_link_tokens(self):
        without = tiny_adapters.adapter(layout=None)
        with pytest.raises(AdapterRequiredError, match=r"trained link tokens.*kvlink train"):
            tiny.engine(adapter=without, strategy="link")
        engine = tiny.engine(adapter=without)
        for ask in (engine.prefill, engine.answer, engine.stream):
            with pytest.raises(AdapterRequiredError, match="link tokens"):
                ask(QUESTION, CHUNKS, strategy="link")

    def test_more_chunks_than_slots(self):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter(slots=3))
        engine.prefill(QUESTION, CHUNKS[:3])
        with pytest.raises(InputError, match=r"4 chunks.*link tokens for 3.*'reuse'"):
            engine.prefill(QUESTION, CHUNKS[:4])
        engine.prefill(QUESTION, CHUNKS[:4], strategy="reuse")

    @pytest.mark.parametrize("layout", ["shared", "tail"])
    def test_the_other_layouts_have_no_limit(self, layout):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter(layout=layout))
        many = [f"Fact {i}." for i in range(60)]
        assert engine.prefill(QUESTION, many).report.misses == 60

    @all_kinds
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_segments(self, kind, layout):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter("llama", kind, layout))
        prefill = engine.prefill(QUESTION, CHUNKS[:3])
        kinds = [(s.kind, s.slot) for s in prefill.segments]
        ids = [prefill.token_ids[s.start : s.stop] for s in prefill.segments if s.kind == "link"]
        per_slot = {
            "slot": [[320, 321], [322, 323], [324, 325]],
            "shared": [[320, 321]] * 3,
            "tail": [[320, 321]],
        }
        assert ids == per_slot[layout]
        if layout == "tail":
            middle = [("chunk", 0), ("chunk", 1), ("chunk", 2), ("link", 2)]
        else:
            middle = [(kind, slot) for slot in range(3) for kind in ("chunk", "link")]
        assert kinds == [("prefix", None), *middle, ("question", None)]
        stops = [0, *(s.stop for s in prefill.segments)]
        assert [s.start for s in prefill.segments] == stops[:-1]
        assert stops[-1] == len(prefill.token_ids) == prefill.report.context_tokens
        assert prefill.positions == list(range(stops[-1]))
        for s in prefill.segments:
            assert len(s.full_view) == (0 if s.kind == "chunk" else s.stop - s.start)
            assert s.behind == (engine.behind if s.kind == "chunk" else ())

    @pytest.mark.parametrize("strategy", ["reuse", "recompute", "full"])
    def test_only_link_has_link_tokens(self, strategy):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter())
        prefill = engine.prefill(QUESTION, CHUNKS, strategy=strategy)
        assert max(prefill.token_ids) < 320
        assert prefill.links is None
        assert prefill.embed(prefill.token_ids).shape == (len(prefill.token_ids), 64)

    @all_kinds
    @pytest.mark.parametrize(("layout", "links"), [("slot", 10), ("shared", 10), ("tail", 2)])
    def test_computed_tokens(self, kind, layout, links):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter("llama", kind, layout))
        lengths = sum(len(ids) for ids in map(engine.layout.encode_text, CHUNKS)) + 2 * 5
        prefix, question = len(engine.layout.prefix()), len(engine.layout.question(QUESTION))
        first = engine.prefill(QUESTION, CHUNKS).report
        assert first.context_tokens == prefix + lengths + links + question
        # the chunks, once what they are behind, the prefix; then what was asked for
        assert first.computed_tokens == lengths + len(engine.behind) + prefix + links + question
        second = engine.prefill(QUESTION, CHUNKS).report
        assert second.computed_tokens == links + question
        assert second.reused_tokens == prefix + lengths
        full = engine.prefill(QUESTION, CHUNKS, strategy="full").report
        assert full.computed_tokens == full.context_tokens == prefix + lengths + question

    def test_the_answer_runs_through_the_reader_alone(self):
        engine = tiny_adapters.engine("llama", tiny_adapters.adapter())
        engine.stop_ids = frozenset()
        engine.index(CHUNKS, progress=False)
        engine.prefill(QUESTION, CHUNKS)  # the prefix is stored
        seen = {"model": [], "reader": []}
        handles = [
            getattr(engine, which)
            .model.layers[0]
            .register_forward_pre_hook(
                lambda module, args, which=which: seen[which].append(args[0].shape[1])
            )
            for which in seen
        ]
        engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
        for handle in handles:
            handle.remove()
        question = len(engine.layout.question(QUESTION))
        assert seen == {"model": [], "reader": [10 + question, 1, 1]}


@pytest.mark.parametrize("strategies", [("reuse", "link"), ("recompute", "recompute")])
@all_kinds
def test_two_threads_answer_with_base_and_adapter_as_if_alone(kind, strategies):
    base = tiny.engine()
    engine = base.with_adapter(tiny_adapters.adapter(kind=kind))
    texts = [[f"{i}: {text}" for text in CHUNKS] for i in range(8)]
    jobs = list(zip((base, engine), strategies, strict=True))

    def answers(job, start=lambda: None):
        engine, strategy = job
        engine = engine.with_store(None)  # all caches are computed in the thread
        start()
        return [
            engine.answer(QUESTION, chunks, strategy=strategy, max_new_tokens=8).token_ids
            for chunks in texts
        ]

    alone = [answers(job) for job in jobs]
    together = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(answers, job, together.wait) for job in jobs]
        assert [future.result() for future in futures] == alone
