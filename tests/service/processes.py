"""A real `tarflow serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

TARFLOW = Path(sys.executable).with_name("tarflow")
PATIENCE = 180.0
"""Seconds until something that must happen counts as a hang; no measurement."""
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


class ServerProcess:
    """`tarflow serve` on a free port, its output in a file."""

    def __init__(self, log: Path, *flags: str | Path, **more: str) -> None:
        self._log = log
        # Its own state: nothing touches the tester's, and no server goes on with another's work.
        self.state = Path(more.setdefault("TARFLOW_STATE", str(log.with_suffix(".state"))))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [TARFLOW, "serve", "--port", "0", "--threads", "1", *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(**more),
            )
        self._url = ""

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

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

    def wait_ready(self) -> ServerProcess:
        """Return when requests can be served."""
        wait_until(lambda: self.process.poll() is not None or self.is_ready(), "the server is ready")
        assert self.process.poll() is None, self.log
        return self

    def worker(self) -> int:
        """Process id of the worker; there must be one."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to leave; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        return self.wait()

    def wait(self) -> int:
        """Exit status of a server that was asked to leave."""
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """Make sure that nothing is left, whatever a test did."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
