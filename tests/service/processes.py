"""The console script's long-running forms and Redis, each a real process with its output in a file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import redis
from prometheus_client.parser import text_string_to_metric_families

TARFLOW = Path(sys.executable).with_name("tarflow")
PATIENCE = 180.0
"""Seconds until something that must happen counts as a hang; no measurement."""
SETTLING_SECONDS = 3.0
_LISTENING = re.compile(r"Uvicorn running on (http://\S+)")


def environment(**more: str) -> dict[str, str]:
    """The environment without the tester's own settings, one thread to a process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TARFLOW_")}
    return {**own, "OMP_NUM_THREADS": "1", **more}


def tarflow(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the console script to its end."""
    return subprocess.run(
        [TARFLOW, *arguments], capture_output=True, text=True, timeout=PATIENCE, env=environment(**more), check=False
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples with these labels, in Prometheus' text format."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class Process:
    """Something that runs until it is told to leave, its output in a file."""

    def __init__(self, log: Path, command: list[str | Path], variables: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(variables))

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

    def children(self) -> list[int]:
        """Process ids of those that it started."""
        pid = self.process.pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to leave; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        return self.wait()

    def wait(self) -> int:
        """Exit status of a process that was asked to leave."""
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """Make sure that nothing is left, whatever a test did."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class HttpProcess(Process):
    """A form that answers HTTP, on a free port."""

    def __init__(self, log: Path, form: str, *flags: str | Path, **more: str) -> None:
        # Its own state: nothing touches the tester's, and no server goes on with another's work.
        self.state = Path(more.setdefault("TARFLOW_STATE", str(log.with_suffix(".state"))))
        super().__init__(log, [TARFLOW, form, "--port", "0", *flags], environment(**more))
        self._url = ""

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        if not self._url:
            wait_until(lambda: _LISTENING.search(self.log) is not None or self.process.poll() is not None, "it listens")
            match = _LISTENING.search(self.log)
            assert match is not None, self.log
            self._url = match[1]
        return self._url

    def client(self) -> httpx.Client:
        """A client that waits patiently."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def get(self, path: str) -> httpx.Response:
        """One GET on a connection of its own."""
        return httpx.get(self.url + path, timeout=PATIENCE)

    def is_ready(self) -> bool:
        """What /readyz says."""
        return self.get("/readyz").status_code == 200

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        return metric(self.get("/metrics").text, name, **labels)

    def settle(self) -> None:
        """Return when the figures of idle workers are up to date: they tell them about once a second."""
        time.sleep(SETTLING_SECONDS)


class ServerProcess(HttpProcess):
    """`tarflow serve`."""

    def __init__(self, log: Path, *flags: str | Path, **more: str) -> None:
        super().__init__(log, "serve", "--threads", "1", *flags, **more)

    def wait_ready(self) -> ServerProcess:
        """Return when requests can be served."""
        wait_until(lambda: self.process.poll() is not None or self.is_ready(), "the server is ready")
        assert self.process.poll() is None, self.log
        return self

    def worker(self) -> int:
        """Process id of the worker; there must be one."""
        children = self.children()
        assert len(children) == 1, children
        return children[0]


class ApiProcess(HttpProcess):
    """`tarflow api`."""

    def __init__(self, log: Path, url: str, *flags: str | Path, **more: str) -> None:
        super().__init__(log, "api", *flags, **{"TARFLOW_REDIS": url, **more})

    def wait_ready(self, workers: int = 1) -> ApiProcess:
        """Return when so many workers are ready for it."""

        def ready() -> bool:
            answer = self.get("/readyz")
            return answer.status_code == 200 and len(answer.json()["workers"]) >= workers

        wait_until(lambda: self.process.poll() is not None or ready(), f"{workers} workers are ready")
        assert self.process.poll() is None, self.log
        return self


class WorkerProcess(Process):
    """`tarflow worker` with its workers, by default one on the CPU."""

    def __init__(self, log: Path, url: str, *flags: str | Path, **more: str) -> None:
        command: list[str | Path] = [TARFLOW, "worker", "--device", "cpu", "--threads", "1", *flags]
        super().__init__(log, command, environment(**{"TARFLOW_REDIS": url, **more}))


class RedisProcess(Process):
    """A redis-server that keeps every write, on a port that stays the same when it is started again."""

    def __init__(self, directory: Path, port: int, password: str = "") -> None:
        directory.mkdir(exist_ok=True)
        command: list[str | Path] = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--dir", directory]
        command += ["--requirepass", password] if password else []
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{port}/0"
        super().__init__(directory / "log", command, os.environ)
        try:
            with self.client() as client:
                wait_until(lambda: self.process.poll() is not None or answers(client), "Redis answers")
            assert self.process.poll() is None, self.log
        except BaseException:
            self.kill()
            raise

    def client(self) -> redis.Redis:
        """A client of it."""
        return redis.Redis.from_url(self.url, protocol=2)


def answers(client: redis.Redis) -> bool:
    """Whether a Redis has loaded what it kept and answers."""
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process computes nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        # It may have been ended meanwhile.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
