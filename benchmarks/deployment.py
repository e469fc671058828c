"""The service as it is deployed: real processes, their clocks and their memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

READY_SECONDS = 300.0
STOP_SECONDS = 60.0
TICKS = os.sysconf("SC_CLK_TCK")
STDERR = 2
TARFLOW = str(Path(sys.executable).with_name("tarflow"))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Deployment:
    """Processes that serve together."""

    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By what they are."""
    urls: list[str] = field(default_factory=list)
    """Where it answers."""

    def pids(self) -> dict[str, int]:
        """All processes, those that others started included."""
        found = {}
        for name, process in self.processes.items():
            found[name] = process.pid
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            found |= {f"{name} / worker {i}": int(child) for i, child in enumerate(children)}
        return found

    def cpu_seconds(self) -> float:
        """What all have computed so far."""
        total = 0
        for pid in self.pids().values():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def resident_bytes(self) -> dict[str, int]:
        """Memory of each."""
        page = os.sysconf("SC_PAGE_SIZE")
        return {
            name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for name, pid in self.pids().items()
        }

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples at the first URL."""
        text = httpx.get(f"{self.urls[0]}/metrics", timeout=60).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_ready(self, workers: int) -> None:
        """Return when so many workers are ready; raises ``RuntimeError`` when a process ends or time is over."""
        deadline = time.monotonic() + READY_SECONDS
        for url in self.urls:
            while not _is_ready(url, workers):
                ended = [name for name, process in self.processes.items() if process.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not become ready (ended: {ended}); its log is above")
                time.sleep(0.2)


def _is_ready(url: str, workers: int) -> bool:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=10)
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK and len(answer.json()["workers"]) >= workers


@contextmanager
def process(command: Sequence[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended in order, and with it whatever it has left behind."""
    # What they say goes where errors go: the output may be one JSON document.
    started = subprocess.Popen(list(command), env={**os.environ, **variables}, stdout=STDERR, start_new_session=True)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def _http_flags(port: int) -> list[str]:
    return ["--port", str(port), "--log-level", "warning"]


@contextmanager
def embedded(models: Path, *flags: str) -> Iterator[Deployment]:
    """``tarflow serve``, ready."""
    with tempfile.TemporaryDirectory() as state, ExitStack() as stack:
        port, found = free_port(), Deployment()
        command = [TARFLOW, "serve", "--models", str(models), "--state", state, *_http_flags(port), *flags]
        found.processes["serve"] = stack.enter_context(process(command))
        found.urls = [f"http://127.0.0.1:{port}"]
        found.wait_ready(1)
        yield found


@contextmanager
def distributed(
    models: Path, *, apis: int, workers: int, api_flags: Sequence[str] = (), preempting: bool = True
) -> Iterator[Deployment]:
    """redis-server with so many ``tarflow api`` and ``tarflow worker``, ready.

    Without ``preempting`` the workers finish sampling before they look for scores.
    """
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        found, port = Deployment(), free_port()
        url = {"TARFLOW_REDIS": f"redis://127.0.0.1:{port}/0"}
        redis = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        redis += ["--appendonly", "yes", "--appendfsync", "everysec", "--loglevel", "warning"]
        found.processes["redis"] = stack.enter_context(process(redis))
        share = max(1, len(os.sched_getaffinity(0)) // workers)
        for number in range(workers):
            flags = ["--models", str(models), "--threads", str(share), "--log-level", "warning"]
            program = [TARFLOW] if preempting else [sys.executable, "-m", "benchmarks.unpreempted"]
            worker = process([*program, "worker", *flags], **url)
            found.processes[f"worker host {number}"] = stack.enter_context(worker)
        for number in range(apis):
            at = free_port()
            command = [TARFLOW, "api", *_http_flags(at), *api_flags]
            found.processes[f"api {number}"] = stack.enter_context(process(command, **url))
            found.urls.append(f"http://127.0.0.1:{at}")
        found.wait_ready(workers)
        yield found
