"""Other model servers with the same model behind them, in their usual form: a worker process for each endpoint."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.deployment import READY_SECONDS, Deployment, free_port, process
from benchmarks.load import OK, Load, apply

PEERS = ("litserve", "mosec")
SCORE_BATCH, SAMPLE_BATCH = 32, 16
WAIT_SECONDS = 0.01
"""How long a batch that is not full waits."""
ENDPOINTS = 2


@contextmanager
def serving(name: str) -> Iterator[Deployment]:
    """A peer that answers on /score and /sample; raises ``RuntimeError`` when it does not."""
    port = free_port()
    # As our pool does it: threads of several processes on the same cores slow each other down.
    threads = str(max(1, len(os.sched_getaffinity(0)) // ENDPOINTS))
    command = [sys.executable, "-m", f"benchmarks.peers.{name}_app", str(port)]
    with process(command, OMP_NUM_THREADS=threads, MOSEC_PORT=str(port)) as started:
        found = Deployment(processes={name: started}, urls=[f"http://127.0.0.1:{port}"])
        for kind in ("score", "sample"):
            _wait_for(found, kind)
        yield found


def _wait_for(deployment: Deployment, kind: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    load = Load(urls=deployment.urls, kind=kind, seconds=0.1, concurrency=1, path=f"/{kind}", as_json=True)
    while OK not in apply(load).statuses:
        if time.monotonic() > deadline or any(each.poll() is not None for each in deployment.processes.values()):
            raise RuntimeError("the peer did not become ready; its log is above")
        time.sleep(0.5)
