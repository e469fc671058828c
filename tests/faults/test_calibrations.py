"""Calibrations of a deployment: an API process that dies in the middle of one is replaced by another."""

from __future__ import annotations

import io
import os
import signal
import zipfile

import httpx
import numpy as np

from tests.faults.cluster import Cluster
from tests.service.pictures import file, pixels
from tests.service.processes import PATIENCE, ApiProcess, wait_until

PATH = "/v1/calibrations"
MODEL = {"model": "tiny-cond"}
COUNT = 24


def archive() -> bytes:
    """Normal images of 16x16."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for i in range(COUNT):
            content.writestr(f"{i}.png", file((pixels(16, 3, i) // 4 + 60).astype(np.uint8)))
    return buffer.getvalue()


def post(api: ApiProcess, name: str) -> None:
    data = {"name": name, **MODEL}
    response = httpx.post(api.url + PATH, files={"files": ("a.zip", archive())}, data=data, timeout=PATIENCE)
    assert response.status_code == 202, response.text


def status(api: ApiProcess, name: str) -> str:
    return str(api.get(f"{PATH}/{name}?model=tiny-cond").json()["status"])


def score(api: ApiProcess, name: str) -> int:
    files = {"files": ("a.png", file(pixels(16)))}
    data = {**MODEL, "calibration": name}
    return httpx.post(f"{api.url}/v1/score", files=files, data=data, timeout=PATIENCE).status_code


def test_a_calibration_outlives_the_process_that_makes_it(cluster: Cluster) -> None:
    apis = [cluster.api(), cluster.api()]
    worker = cluster.worker()
    for api in apis:
        api.wait_ready()
    [child] = worker.children()
    os.kill(child, signal.SIGSTOP)
    post(apis[0], "a")
    wait_until(lambda: any("calibration a of tiny-cond is being made" in api.log for api in apis), "one makes it")
    [maker] = [api for api in apis if "is being made" in api.log]
    [other] = [api for api in apis if api is not maker]
    maker.kill()
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: status(other, "a") != "running", "the other has made it")
    assert status(other, "a") == "ready"
    assert score(other, "a") == 200
    # All go, and what was made stays; what one process accepts while nobody can make it, the next one makes.
    assert other.stop() == 0, other.log
    assert worker.stop() == 0, worker.log
    third = cluster.api()
    assert status(third, "a") == "ready"
    post(third, "b")
    third.kill()
    cluster.worker()
    last = cluster.api()
    last.wait_ready()
    wait_until(lambda: status(last, "b") == "ready", "the last has made it")
    assert httpx.delete(f"{last.url}{PATH}/a?model=tiny-cond", timeout=PATIENCE).status_code == 204
    assert score(last, "a") == 422
    for process in (last, third, other):
        assert "Traceback" not in process.log
