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
from tests.service.pictures import file, pixels

REQUESTS = 200
SECONDS_BETWEEN_KILLS = 4.0
ALLOWED = {(200, None), (503, "no_worker"), (503, "worker_lost")}


@pytest.mark.long
def test_every_request_ends_while_workers_are_killed(start: Start) -> None:
    """Each request ends in a result or a clear refusal, none hangs, and the service is whole afterwards."""
    server = start().wait_ready()
    outcomes: Counter[tuple[int, str | None]] = Counter()
    done = threading.Event()
    kills = 0

    def kill_workers() -> None:
        nonlocal kills
        while not done.wait(SECONDS_BETWEEN_KILLS):
            if server.is_ready():
                os.kill(server.worker(), signal.SIGKILL)
                kills += 1

    def request(number: int) -> None:
        with server.client() as client:
            while True:
                if number % 3:
                    answer = client.post("/v1/score", files={"files": ("a.png", file(pixels()))})
                else:
                    answer = client.post("/v1/sample", json={"class": "Bag", "seed": number, "num_images": 2})
                error = answer.json().get("error")
                outcomes[answer.status_code, error["code"] if error else None] += 1
                if answer.status_code == httpx.codes.OK:
                    return
                time.sleep(0.5)  # as Retry-After asks, but impatiently

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(request, range(REQUESTS)))
    finally:
        done.set()
        killer.join()
    print(f"{kills} kills, outcomes {dict(outcomes)}")
    assert kills >= 1
    assert set(outcomes) <= ALLOWED
    assert outcomes[200, None] == REQUESTS
    server.wait_ready()
    assert server.metric("tarflow_jobs_running") == server.metric("tarflow_queue_depth") == 0
    assert server.stop() == 0
