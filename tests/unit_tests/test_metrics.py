"""Prometheus metrics: as they are scraped."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
import scripted
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from kvlink_rag import Chunk, InputError, KVLinkWarning
from kvlink_rag.engine.observe.metrics import EngineMetrics
from kvlink_rag.engine.report import PARTS
from kvlink_rag.store import Budget, open_store

CHUNKS = ["The tower is 330 m tall.", "Bees dance to tell where flowers are."]
QUESTION = "How tall is it?"


def watched(**options):
    engine = scripted.engine(**options)
    engine.stop_ids = frozenset()
    registry = CollectorRegistry()
    return engine, registry, EngineMetrics(engine, registry)


def scraped(registry: CollectorRegistry) -> dict[str, float]:
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, float]:
    """Value by name, with the label's value behind a slash; without bookkeeping."""
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


def test_answers_are_counted_as_their_reports_have_them():
    engine, registry, _ = watched()
    reports = [
        engine.answer(QUESTION, CHUNKS, max_new_tokens=3).report,
        engine.answer(QUESTION, CHUNKS, max_new_tokens=2).report,
        engine.prefill(QUESTION, CHUNKS, strategy="full").report,
    ]
    found = scraped(registry)
    assert found["kvlink_answers_total/reuse"] == found["kvlink_ttft_seconds_count/reuse"] == 2
    assert found["kvlink_answers_total/full"] == found["kvlink_ttft_seconds_count/full"] == 1
    sums = {
        "chunk_hits": "hits",
        "chunk_misses": "misses",
        "reused_tokens": "reused_tokens",
        "computed_tokens": "computed_tokens",
        "new_tokens": "new_tokens",
        "read_bytes": "bytes_read",
    }
    for metric, name in sums.items():
        total = sum(getattr(report, name) for report in reports)
        assert total > 0
        assert found[f"kvlink_{metric}_total"] == total
    for part in PARTS:
        counted = found[f"kvlink_ttft_part_seconds_total/{part.removesuffix('_s')}"]
        assert counted == pytest.approx(sum(getattr(report, part) for report in reports))
    parts = sum(v for name, v in found.items() if name.startswith("kvlink_ttft_part_seconds_total"))
    ttft = found["kvlink_ttft_seconds_sum/reuse"] + found["kvlink_ttft_seconds_sum/full"]
    assert parts == pytest.approx(ttft) == pytest.approx(sum(r.ttft_s for r in reports))


def test_fidelity_checks_and_fallbacks():
    engine, registry, _ = watched(fidelity_rate=1.0, fidelity_limit=0.0)
    found = engine.answer(QUESTION, CHUNKS, max_new_tokens=1).report.fidelity
    assert found is not None
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1, fidelity_limit=math.inf)
    values = scraped(registry)
    assert values["kvlink_fidelity_kl_nats_count"] == 2
    assert values["kvlink_fidelity_kl_nats_sum"] == pytest.approx(2 * found.kl_nats)
    assert values["kvlink_fidelity_fallbacks_total"] == 1
    assert values["kvlink_answers_total/full"] == values["kvlink_answers_total/reuse"] == 1


def test_indexing_and_the_store(tmp_path):
    engine, registry, _ = watched(store=tmp_path)
    report = engine.index([*CHUNKS, CHUNKS[0]], progress=False)
    engine.index(CHUNKS, progress=False)
    found, stat = scraped(registry), engine.store.stat()
    assert found["kvlink_index_runs_total"] == 2
    assert found["kvlink_index_seconds_total"] >= report.total_s
    assert found["kvlink_index_chunks_total"] == 5
    assert found["kvlink_index_encoded_chunks_total"] == 2
    assert found["kvlink_index_encoded_tokens_total"] == report.tokens
    assert found["kvlink_index_written_bytes_total"] == report.nbytes
    assert found["kvlink_store_up"] == 1
    assert found["kvlink_store_entries"] == stat.entries == 2
    assert found["kvlink_store_tokens"] == stat.tokens
    assert found["kvlink_store_bytes"] == stat.nbytes
    assert found["kvlink_store_documents"] == stat.documents == 2
    for absent in ("kvlink_ram_bytes", "kvlink_remote_up", "kvlink_store_budget_bytes"):
        assert absent not in found


def test_budget_evictions_and_pins(tmp_path):
    engine, registry, _ = watched(store=tmp_path)
    engine.index([Chunk(text, id=text[:5]) for text in CHUNKS], progress=False)
    assert scraped(registry)["kvlink_store_evictions_total"] == 0
    engine.store.pin([CHUNKS[0][:5]])
    engine.store.set_budget(Budget(1))
    found = scraped(registry)
    assert found["kvlink_store_budget_bytes"] == 1
    assert found["kvlink_store_evictions_total"] == found["kvlink_store_pinned_entries"] == 1
    assert found["kvlink_store_entries"] == 1


def test_a_remote_that_is_down_behind_memory(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        remote = f"redis://127.0.0.1:{closed.getsockname()[1]}"
        store = open_store(tmp_path, ram_bytes=1 << 20, remote=remote)
        engine, registry, _ = watched(store=store)
        assert scraped(registry)["kvlink_remote_up"] == 1

        def left_after_indexing():
            engine.index(CHUNKS, progress=False)
            return store.below.upload()

        with pytest.warns(KVLinkWarning, match="computed meanwhile"):
            left = left_after_indexing()
        assert left == 2
        found = scraped(registry)
        assert (found["kvlink_remote_up"], found["kvlink_remote_waiting"]) == (0, 2)
        assert found["kvlink_store_entries"] == 2
        store.close()


def test_the_ram_tier(tmp_path):
    engine, registry, _ = watched(store=tmp_path, ram_bytes=1 << 24)
    engine.index(CHUNKS, progress=False)
    for _ in range(2):
        engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
        engine.store.flush()
    found = scraped(registry)
    assert found["kvlink_ram_hits_total"] == engine.store.hits == 2
    assert found["kvlink_ram_misses_total"] == engine.store.misses > 0
    assert found["kvlink_ram_bytes"] == engine.store.nbytes > 0
    assert found["kvlink_store_entries"] == 3  # and the prefix


def test_a_store_that_cannot_be_read_is_told(tmp_path):
    engine, registry, _ = watched(store=tmp_path / "store")
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    engine.store.close()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("no folder")
    found = scraped(registry)
    assert found["kvlink_store_up"] == 0
    assert "kvlink_store_entries" not in found
    assert found["kvlink_answers_total/reuse"] == 1


def test_one_engine_a_registry_until_it_is_closed():
    engine, registry, metrics = watched()
    with pytest.raises(InputError, match="another registry"):
        EngineMetrics(scripted.engine(), registry)
    metrics.close()
    assert engine.observers == []
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert scraped(registry) == {}
    EngineMetrics(engine, registry)
    engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
    assert scraped(registry)["kvlink_answers_total/reuse"] == 1


def test_over_http_after_answers_of_several_threads():
    engine, registry, _ = watched()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        asking = [threading.Thread(target=engine.answer, args=(QUESTION, CHUNKS)) for _ in range(3)]
        for each in asking:
            each.start()
        for each in asking:
            each.join()
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            assert parsed(response.read().decode())["kvlink_answers_total/reuse"] == 3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_names_keep_to_the_conventions():
    _, registry, metrics = watched()
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    families = [family for family in families if not family.name.endswith("_created")]
    assert {family.name for family in families} <= {each.name for each in metrics.describe()}
    for family in families:
        assert family.name.startswith("kvlink_")
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert all(s.name.endswith("_total") for s in family.samples)


def test_without_the_package():
    code = (
        "import sys\nsys.modules['prometheus_client'] = None\n"
        "from kvlink_rag.engine.observe.metrics import EngineMetrics\n"
        "try:\n    EngineMetrics(None)\n"
        "except ValueError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kvlink-rag[metrics]'" in out.stdout
