"""A real redis-server for tests: private, on a Unix socket, with or without an append-only file."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis


class RedisServer:
    """One process; it may be stopped, killed and started again over the same files."""

    def __init__(self, directory: Path, *options: str, appendonly: bool = False) -> None:
        self._directory, self._options = directory, options
        self._appendonly = appendonly
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For clients."""
        return f"unix://{self._socket}"

    def start(self) -> RedisServer:
        """Returns when it answers."""
        persistence = ["--appendonly", "yes" if self._appendonly else "no", "--appendfsync", "always", "--save", ""]
        place = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._directory)]
        self._process = subprocess.Popen(
            ["redis-server", *place, *persistence, "--maxmemory-policy", "noeviction", *self._options],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        with self.client() as client:
            while True:
                assert self._process.poll() is None, "redis-server did not start"
                assert time.monotonic() < deadline, "redis-server does not answer"
                try:
                    client.ping()
                except redis.RedisError:
                    time.sleep(0.02)
                else:
                    return self

    def client(self) -> redis.Redis:
        """A connection of the test's own."""
        return redis.Redis(unix_socket_path=str(self._socket), protocol=2)

    def send(self, number: signal.Signals) -> None:
        """A signal to the process."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it; SIGKILL leaves no time to write anything."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(timeout=30)
            self._process = None
            self._socket.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """One server for all tests of a process."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        server = RedisServer(Path(directory)).start()
        yield server
        server.stop()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """The shared server, empty."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis
