"""The long test: mixed requests while the worker is killed again and again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service.conftest import Start
from tests.service.pictures import answered, file, pixels
from tests.service.processes import ServerProcess, wait_until

REQUESTS = 200
KILLS = 6
CLIENTS = 8
ALLOWED = {(200, None), (503, "no_worker"), (503, "worker_lost")}


class Storm:
    """Clients that insist on their result, and what they were told meanwhile."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.told: Counter[tuple[int, str | None]] = Counter()
        self.done: set[int] = set()
        self._lock = threading.Lock()

    def request(self, number: int) -> None:
        """One request, repeated until it has its result."""
        with self.server.client() as client:
            while not self._asked(client, number):
                time.sleep(0.5)  # as Retry-After asks, but impatiently

    def _asked(self, client: httpx.Client, number: int) -> bool:
        if number % 3:
            answer = client.post("/v1/score", files={"files": ("a.png", file(pixels()))})
        else:
            solver = ("sequential", "jacobi")[number % 2]
            body = {"class": "Bag", "seed": number, "num_images": 2, "solver": solver}
            answer = client.post("/v1/sample", json=body)
        with self._lock:
            error = answer.json().get("error")
            self.told[answer.status_code, error["code"] if error else None] += 1
            if answer.status_code != httpx.codes.OK:
                assert (answer.status_code, error["code"]) in ALLOWED, answer.text
                return False
            if not number % 3:
                assert len(answered(answer)) == 2
            self.done.add(number)
            return True


@pytest.mark.long
def test_every_request_ends_while_workers_are_killed(start: Start) -> None:
    """Each request gets its result or a clear refusal, none hangs, and the service is whole afterwards.

    A worker is killed in the midst of its work, whenever a share of the requests has got its results: so each worker
    does something, however slow the machine, and each dies with jobs in its hands.
    """
    server = start().wait_ready()
    storm = Storm(server)
    with ThreadPoolExecutor(CLIENTS) as pool:
        requests = [pool.submit(storm.request, number) for number in range(REQUESTS)]
        for kill in range(1, KILLS + 1):
            wanted = kill * REQUESTS // (KILLS + 1)
            wait_until(lambda wanted=wanted: len(storm.done) >= wanted, f"{wanted} requests are done")
            wait_until(lambda: server.metric("tarflow_jobs_running") > 0, "the worker has jobs")
            os.kill(server.worker(), signal.SIGKILL)
        for request in requests:
            request.result()
    print(f"{KILLS} kills, answers {dict(storm.told)}")
    assert storm.done == set(range(REQUESTS))
    assert storm.told[200, None] == REQUESTS
    server.wait_ready()
    assert server.metric("tarflow_worker_restarts_total") == KILLS
    assert server.metric("tarflow_jobs_running") == server.metric("tarflow_queue_depth") == 0
    assert "Traceback" not in server.log
    assert server.stop() == 0
