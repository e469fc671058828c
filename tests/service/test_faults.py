"""What happens when processes die, stop or cannot start: a clear answer, never a hang."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from model.bundle import BUNDLED, WEIGHTS
from tests.service.conftest import Start
from tests.service.pictures import answered
from tests.service.processes import ServerProcess, runs, tarflow, wait_until

IMAGES = 32
LARGE = {"num_images": IMAGES, "guidance_scale": 1.0, "denoise": True, "seed": 0, "class": "Bag"}
SMALL = {"num_images": 1, "guidance_scale": 0, "denoise": False, "seed": 0}


@contextmanager
def running(server: ServerProcess) -> Iterator[Future[httpx.Response]]:
    """A large sample that a worker has begun."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.post, "/v1/sample", json=LARGE)
        wait_until(lambda: future.done() or server.metric("tarflow_jobs_running") == 1, "the sample runs")
        assert not future.done(), future.result().text
        yield future


def assert_works(server: ServerProcess) -> None:
    with server.client() as client:
        assert len(answered(client.post("/v1/sample", json=SMALL))) == 1


def assert_result_or_clear_error(response: httpx.Response) -> None:
    if response.status_code == 200:
        assert len(answered(response)) == IMAGES
    else:
        assert response.status_code == 503
        assert response.json()["error"]["code"] in ("no_worker", "worker_lost")


def test_a_killed_worker_is_replaced_and_its_request_ends(start: Start) -> None:
    server = start().wait_ready()
    killed = server.worker()
    with running(server) as request:
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not server.is_ready(), "the service is not ready")
        assert server.get("/healthz").status_code == 200
        assert_result_or_clear_error(request.result())
    server.wait_ready()
    assert server.worker() != killed
    assert server.metric("tarflow_worker_restarts_total") == 1
    assert_works(server)
    with running(server) as request:
        server.process.send_signal(signal.SIGTERM)
        assert len(answered(request.result())) == IMAGES
    assert server.wait() == 0, server.log
    assert "Traceback" not in server.log


def test_a_stopped_worker_is_not_ready_and_nothing_hangs(start: Start) -> None:
    server = start("--lease-seconds", "2", "--ready-seconds", "2").wait_ready()
    worker = server.worker()
    with running(server) as request:
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: not server.is_ready(), "the service is not ready")
        refused = httpx.post(server.url + "/v1/sample", json=SMALL)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
        wait_until(lambda: server.metric("tarflow_queue_depth", op="sample") == 1, "the job is given on")
        os.kill(worker, signal.SIGCONT)
        assert_result_or_clear_error(request.result())
    server.wait_ready()
    assert server.worker() == worker
    with running(server) as request:
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: not server.is_ready(), "the service is not ready")
        os.kill(worker, signal.SIGKILL)
        assert_result_or_clear_error(request.result())
    server.wait_ready()
    assert_works(server)
    with running(server) as request:
        server.process.send_signal(signal.SIGINT)
        assert len(answered(request.result())) == IMAGES
    assert server.wait() == 0, server.log
    assert "Traceback" not in server.log


def test_settings_hold_and_a_worker_leaves_when_the_api_process_was_killed(start: Start) -> None:
    server = start("--max-images", "3", TARFLOW_MAX_IMAGES="1", TARFLOW_MAX_DRAWS="2").wait_ready()
    worker = server.worker()
    # Settings come from flags and the environment, and a flag wins.
    for path, body, allowed in (
        ("/v1/sample", {"num_images": 4}, "allowed are 1 to 3"),
        ("/v1/score", {"images": ["aGk="], "draws": 3}, "allowed are 1 to 2"),
    ):
        assert allowed in httpx.post(server.url + path, json=body).json()["error"]["message"]
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not runs(worker), "the worker has gone")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of the bundled model whose last weight has changed."""
    directory = tmp_path / "models" / "fashion-mnist"
    shutil.copytree(BUNDLED / "fashion-mnist", directory)
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (directory / WEIGHTS).write_bytes(data)
    return directory.parent


def test_damaged_weights_end_the_service(damaged: Path) -> None:
    done = tarflow("serve", "--port", "0", "--models", damaged)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert f"{WEIGHTS}: content does not match its sha256" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: a worker cannot start")


def test_a_device_that_is_not_there_ends_the_service() -> None:
    done = tarflow("serve", "--port", "0", "--device", "cuda:99")
    assert done.returncode == 2
    assert "CUDA devices are usable here" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: a worker cannot start")


def test_a_worker_that_is_damaged_later_is_tried_again(start: Start, damaged: Path) -> None:
    """Once it has served, the service stays and says that it is not ready."""
    data = (BUNDLED / "fashion-mnist" / WEIGHTS).read_bytes()
    target = damaged / "fashion-mnist" / WEIGHTS
    broken = target.read_bytes()
    target.write_bytes(data)
    server = start("--models", damaged).wait_ready()
    target.write_bytes(broken)
    os.kill(server.worker(), signal.SIGKILL)
    wait_until(lambda: "cannot start" in server.log, "the new worker has failed")
    assert not server.is_ready()
    target.write_bytes(data)
    server.wait_ready()
    assert_works(server)
    assert server.stop() == 0
