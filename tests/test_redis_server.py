"""The redis-server that `make test` installs is the one that the tests of shared brokers may count on."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import redis

OLDEST = (6, 2)
"""Commands up to this version may be used, so that every managed Redis works."""


def test_a_private_redis_server_starts_and_is_recent_enough(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with redis.Redis(unix_socket_path=str(path), protocol=2) as client:
            version = client.info("server")["redis_version"]
            assert tuple(map(int, version.split(".")[:2])) >= OLDEST
            assert client.eval("return redis.call('TIME')", 0)
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
