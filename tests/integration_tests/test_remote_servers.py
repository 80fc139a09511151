"""Engines of two machines that share an S3 bucket or a Redis, and what these do to an answer.

Run as a script, this file is the other machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import remote_servers as servers
import tiny

from kvlink_rag import Chunk, KVLinkEngine, KVLinkWarning
from kvlink_rag.store import (
    FolderStore,
    FsspecRemote,
    RedisRemote,
    Remote,
    RemoteError,
    RemoteRefused,
    RemoteTier,
    open_store,
)

CHUNKS = [
    Chunk("The tower is 330 m tall, and was painted in brown.", id="tower"),
    Chunk("Bees dance in front of each other.", id="bees", title="Bees"),
    Chunk("The lake freezes in January.", id="lake"),
]
QUESTION = "How tall is the tower?"
PATIENCE_S = 60.0
SOON_S = 0.2


def open_tier(folder: Path | str, remote: Remote) -> RemoteTier:
    return RemoteTier(FolderStore(folder), remote, timeout_s=10.0, retry_s=SOON_S)


def open_remote(kind: str, options: dict[str, Any]) -> Remote:
    if kind == "redis":
        return RedisRemote(**options)
    return FsspecRemote("s3://caches/kv", **options)


def asked(engine: KVLinkEngine) -> dict[str, Any]:
    answer = engine.answer(QUESTION, CHUNKS, max_new_tokens=8)
    report = answer.report
    return {
        "token_ids": answer.token_ids,
        "misses": report.misses,
        "computed_tokens": report.computed_tokens,
    }


def machine() -> None:
    """Index and answer what is asked for, one line of JSON each."""
    for line in sys.stdin:
        task = json.loads(line)
        store = open_tier(task["folder"], open_remote(task["kind"], task["options"]))
        engine = tiny.engine(store=store)
        report = engine.index(CHUNKS, progress=False)
        told = {"index_misses": report.misses, "index_hits": report.hits, **asked(engine)}
        store.close()
        print(json.dumps(told), flush=True)


@pytest.fixture(scope="module")
def other_machine() -> Iterator[Callable[..., dict[str, Any]]]:
    """Another process with a model of its own."""
    paths = [str(Path(tiny.__file__).parent), str(Path(tiny.__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )

    def ask(**task: object) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        told: dict[str, Any] = json.loads(process.stdout.readline())
        return told

    with process:
        yield ask
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as options:
        yield options


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.redis_server(tmp_path_factory.mktemp("redis"), servers.free_port()) as url:
        yield url


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The answer of an engine without a remote, from stored caches."""
    engine = tiny.engine()
    engine.index(CHUNKS, progress=False)
    asked(engine)  # the prefix is stored, too
    return asked(engine)


@contextmanager
def told() -> Iterator[list[str]]:
    """The texts of the warnings of a block, once it has ended."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", KVLinkWarning)
        yield texts
    texts += [str(warning.message) for warning in found]


@pytest.mark.parametrize("kind", ["s3", "redis"])
def test_two_machines(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    other_machine: Callable[..., dict[str, Any]],
    expected: dict[str, Any],
) -> None:
    options = request.getfixturevalue("s3") if kind == "s3" else {"url": ""}
    if kind == "redis":
        options = {"url": request.getfixturevalue("redis_url")}
    remote = open_remote(kind, options)
    store = open_tier(tmp_path / "one", remote)
    engine = tiny.engine(store=store)
    assert engine.index(CHUNKS, progress=False).misses == len(CHUNKS)
    asked(engine)
    assert asked(engine) == expected
    assert store.flush(PATIENCE_S)
    found = other_machine(folder=str(tmp_path / "other"), kind=kind, options=options)
    assert found == {"index_misses": 0, "index_hits": len(CHUNKS), **expected}

    keys = engine.keys(CHUNKS)
    assert all(remote.has(key) for key in keys)
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.read(keys[0]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.release(["tower"])
    assert store.flush(PATIENCE_S)
    assert [remote.has(key) for key in keys] == [False, True, True]
    store.close()


def test_a_forked_process_leaves_connections_alone(s3: dict[str, Any]) -> None:
    """What it closes as it ends must not make its parent deaf, which is a time-out for each."""
    program = (
        "import json, os, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from kvlink_rag.store import FsspecRemote\n"
        "remote = FsspecRemote('s3://caches/forked', **json.loads(sys.argv[1]))\n"
        "remote.write('0' * 64, b'x')\n"
        "threads = ThreadPoolExecutor(8)\n"
        "asked = lambda: all(threads.map(lambda _: remote.has('0' * 64), range(8)))\n"
        "assert asked()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert remote.read('0' * 64) == b'x'\n"
        "    sys.exit()\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert asked()\n"
    )
    command = [sys.executable, "-c", program, json.dumps(s3)]
    ended = subprocess.run(command, timeout=PATIENCE_S, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_credentials_of_the_environment(
    s3: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    """As on a machine that is set up for its cloud: the URL is all that is said."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["endpoint_url"])
    for misses in (len(CHUNKS), 0):
        store = open_store(tmp_path / str(misses), remote="s3://caches/by-environment")
        assert isinstance(store, RemoteTier)
        engine = tiny.engine(store=store)
        assert engine.index(CHUNKS, progress=False).misses == misses
        asked(engine)
        assert asked(engine) == expected
        assert store.upload() == 0
        store.close()


def check_fault_and_recovery(
    store: RemoteTier, expected: dict[str, Any], mended: Callable[[], object]
) -> None:
    """An engine indexes and answers in spite of a fault, and all is uploaded when it is over."""
    engine = tiny.engine(store=store)
    with told() as texts:
        engine.index(CHUNKS, progress=False)
        asked(engine)
        assert asked(engine) == expected
        store.flush(4 * SOON_S)
    assert len(texts) == 1
    assert "computed meanwhile" in texts[0]
    mended()
    assert store.flush(PATIENCE_S)
    assert all(store.remote.has(key) for key in engine.with_store(store).keys(CHUNKS))
    assert asked(engine) == expected
    store.close()


def test_a_server_that_is_not_there(tmp_path: Path, expected: dict[str, Any]) -> None:
    port = servers.free_port()
    store = open_tier(tmp_path / "kv", RedisRemote(f"redis://127.0.0.1:{port}", connect_s=1.0))
    server = servers.redis_server(tmp_path, port)
    try:
        check_fault_and_recovery(store, expected, server.__enter__)
    finally:
        server.__exit__(None, None, None)


def test_a_server_that_hangs(tmp_path: Path, expected: dict[str, Any]) -> None:
    silent = servers.Silent()
    url = f"redis://127.0.0.1:{silent.port}"
    store = open_tier(tmp_path / "kv", RedisRemote(url, connect_s=0.2))
    server = servers.redis_server(tmp_path, silent.port)

    def mend() -> None:
        silent.close()
        server.__enter__()

    try:
        check_fault_and_recovery(store, expected, mend)
    finally:
        server.__exit__(None, None, None)


def test_an_object_store_that_hangs(tmp_path: Path, expected: dict[str, Any]) -> None:
    with servers.Silent() as silent:
        remote = FsspecRemote(
            "s3://caches/kv",
            connect_s=1.0,
            key=servers.KEY,
            secret=servers.SECRET,
            endpoint_url=f"http://127.0.0.1:{silent.port}",
        )
        engine = tiny.engine(store=open_tier(tmp_path / "kv", remote))
        with told() as texts:
            asked(engine)
            assert asked(engine) == expected
        assert len(texts) == 1
        assert servers.SECRET not in texts[0]
        engine.store.close()


def test_a_process_ends_while_a_server_hangs(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from kvlink_rag.chunk import ChunkKV\n"
        "from kvlink_rag.store import FolderStore, RedisRemote, RemoteTier\n"
        "remote = RedisRemote(sys.argv[1], connect_s=3600)\n"
        "store = RemoteTier(FolderStore(sys.argv[2]), remote, timeout_s=0.1)\n"
        "ones = torch.ones(1, 1, 1, 4)\n"
        "store.put(ChunkKV((1,), (), 'model', ones, ones))\n"
        "assert store.get('0' * 64) is None\n"
    )
    with servers.Silent() as silent:
        url = f"redis://127.0.0.1:{silent.port}"
        command = [sys.executable, "-c", program, url, str(tmp_path / "kv")]
        ended = subprocess.run(command, timeout=PATIENCE_S, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_damaged_objects(
    tmp_path: Path, redis_url: str, expected: dict[str, Any], damage: str
) -> None:
    remote = RedisRemote(redis_url)
    first = open_tier(tmp_path / "one", remote)
    engine = tiny.engine(store=first)
    engine.index(CHUNKS, progress=False)
    assert first.flush(PATIENCE_S)
    good = {key: remote.read(key) for key in engine.keys(CHUNKS)}
    for key, data in good.items():
        assert data is not None
        remote.write(key, b"garbage" if damage == "garbage" else data[: len(data) // 2])
    second = open_tier(tmp_path / "other", RedisRemote(redis_url))
    engine = tiny.engine(store=second)
    with told() as texts:
        found = asked(engine)
    assert len(texts) == 1
    assert "damaged objects" in texts[0]
    assert (found["misses"], found["token_ids"]) == (len(CHUNKS), expected["token_ids"])
    assert second.flush(PATIENCE_S)
    assert {key: remote.read(key) for key in good} == good
    first.close()
    second.close()


def test_uploads_of_a_killed_process(tmp_path: Path, expected: dict[str, Any]) -> None:
    port = servers.free_port()
    url = f"redis://127.0.0.1:{port}"
    engine = tiny.engine()
    engine.index(CHUNKS, progress=False)
    records = [engine.store.get(key) for key in engine.keys(CHUNKS)]
    child = os.fork()
    if child == 0:
        store = open_tier(tmp_path / "kv", RedisRemote(url))
        for record in records:
            assert record is not None
            store.put(record, ["a"])
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with servers.redis_server(tmp_path, port):
        store = open_tier(tmp_path / "kv", RedisRemote(url))
        assert store.flush(PATIENCE_S)
        assert all(store.remote.has(key) for key in engine.with_store(store).keys(CHUNKS))
        store.close()


def test_a_full_redis_is_read_on(tmp_path: Path) -> None:
    with servers.redis_server(tmp_path, servers.free_port()) as url:
        remote = RedisRemote(url)
        remote.write("0" * 64, b"small")
        remote._client.config_set("maxmemory", 1)
        with pytest.raises(RemoteRefused, match="OutOfMemory"):
            remote.write("1" * 64, b"small")
        assert remote.read("0" * 64) == b"small"
        remote.close()


def test_redis_objects_last_as_long_as_told(redis_url: str) -> None:
    key = "a" * 64
    remote = RedisRemote(redis_url, ttl_s=1000)
    remote.write(key, b"x")
    assert 0 < remote._client.ttl(f"kvlink:{key}") <= 1000
    remote.delete(key)
    remote.close()


def test_credentials_are_not_told(tmp_path: Path, s3: dict[str, Any]) -> None:
    with servers.redis_server(tmp_path, servers.free_port(), "--requirepass", "right-word") as url:
        with_password = url.replace("redis://", "redis://default:wrong-word@")
        wrong = [
            RedisRemote(with_password),
            FsspecRemote("s3://caches", **{**s3, "secret": "wrong-word"}),
            FsspecRemote(f"http://user:wrong-word@127.0.0.1:{servers.free_port()}/kv"),
        ]
        for remote in wrong:
            with pytest.raises(RemoteError) as error:
                remote.read("0" * 64)
            assert "wrong-word" not in str(error.value) + remote.name + repr(error.value)
            assert remote.name in str(error.value)
        RedisRemote(with_password.replace("wrong", "right")).write("0" * 64, b"x")
    with pytest.raises(RemoteRefused, match="no-such"):
        FsspecRemote("s3://no-such-bucket/kv", **s3).write("0" * 64, b"x")


if __name__ == "__main__":
    machine()
