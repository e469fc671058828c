"""A whole deployment of real processes: a Redis that keeps everything, API replicas, supervised workers."""

from __future__ import annotations

import socket
from pathlib import Path

from service.broker.base import Limits
from tests.service.processes import ApiProcess, Process, RedisProcess, WorkerProcess, metric

LEASE_SECONDS, READY_SECONDS, ATTEMPTS = 2.0, 2.0, 8
"""Attempts are many: a storm kills workers far oftener than anything real."""
SHARED = ["--lease-seconds", str(LEASE_SECONDS), "--ready-seconds", str(READY_SECONDS), "--max-attempts", str(ATTEMPTS)]
LARGE = {"model": "tiny-cond", "num_images": 1024, "guidance_scale": 1.0, "denoise": True, "seed": 0}
"""A request that takes long enough to be met at work on any machine, tiny as the model is."""
LIMITS = Limits(
    max_queue_cost=2_000_000,
    caller_share=0.5,
    lease_seconds=LEASE_SECONDS,
    ready_seconds=READY_SECONDS,
    max_attempts=ATTEMPTS,
)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Starts processes and makes sure that none is left."""

    def __init__(self, directory: Path, models: Path) -> None:
        self._directory, self.models = directory, models
        self._port = free_port()
        self._processes: list[Process] = []
        self.redis = self.start_redis()
        self.url = self.redis.url
        """Where processes that are started look for Redis; a test may put a proxy between."""

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}-{len(self._processes)}.log"

    def start_redis(self, password: str = "") -> RedisProcess:
        """Start Redis, or start it again with everything that it has kept."""
        self.redis = RedisProcess(self._directory / "redis", self._port, password)
        self._processes.append(self.redis)
        return self.redis

    def api(self, *flags: str | Path) -> ApiProcess:
        """One more API replica."""
        most = ["--max-images", str(LARGE["num_images"])]
        process = ApiProcess(self._log("api"), self.url, *SHARED, *most, *flags)
        self._processes.append(process)
        return process

    def worker(self, *flags: str | Path) -> WorkerProcess:
        """One more host with workers."""
        process = WorkerProcess(self._log("worker"), self.url, "--models", self.models, *SHARED, *flags)
        self._processes.append(process)
        return process

    def log_files(self) -> list[Path]:
        """What all have printed."""
        return sorted(self._directory.glob("**/*log"))

    def close(self) -> None:
        """End everything; workers leave with their supervisors."""
        for process in reversed(self._processes):
            process.kill()


def total(apis: list[ApiProcess], name: str, **labels: str) -> float:
    """A counter over several replicas."""
    return sum(metric(api.get("/metrics").text, name, **labels) for api in apis)
