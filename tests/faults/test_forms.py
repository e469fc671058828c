"""The deployment forms as processes: replicas and workers that meet in a Redis, supervised, and leaving in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.faults.cluster import LARGE, Cluster, free_port
from tests.service.pictures import answered, file, pixels
from tests.service.processes import PATIENCE, ApiProcess, environment, metric, runs, tarflow, wait_until

SECRET = "open-sesame"  # noqa: S105
SMALL = {"model": "tiny-cond", "num_images": 1, "guidance_scale": 0, "denoise": False, "seed": 0}


def score(url: str) -> httpx.Response:
    """One tiny image scored."""
    files = {"files": ("a.png", file(pixels(16)))}
    return httpx.post(f"{url}/v1/score", files=files, data={"model": "tiny-cond"}, timeout=PATIENCE)


def is_running(api: ApiProcess, request: Future[httpx.Response]) -> None:
    """Return when a worker has the only request."""
    wait_until(lambda: request.done() or api.metric("tarflow_jobs_running") == 1, "the sample runs")
    assert not request.done(), request.result().text


def imported(form: str, variables: dict[str, str], log: Path, *flags: str | Path, until: str) -> set[str]:
    """Everything that a form has imported when it has printed something, by the interpreter's own list."""
    command = [sys.executable, "-X", "importtime", "-c", "from service.cli import main; main()", form, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
    try:
        wait_until(lambda: until in log.read_text() or process.poll() is not None, f"{form} has started")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    lines = [line for line in log.read_text().splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_only_workers_import_torch(cluster: Cluster, tmp_path: Path) -> None:
    """Neither the API does, nor the parent of workers."""
    variables = environment(TARFLOW_REDIS=cluster.url)
    api = imported("api", variables, tmp_path / "api", "--port", "0", until="Uvicorn running")
    assert {"service.broker.redis.api", "service.app", "redis"} <= api
    parent = imported("worker", variables, tmp_path / "parent", "--device", "cpu", until="service.broker.redis.burying")
    assert {"service.broker.redis.burying", "service.pool"} <= parent
    assert not {name for name in api | parent if name.partition(".")[0] == "torch"}


def test_any_replica_answers_with_any_worker_s_work(cluster: Cluster) -> None:
    """And what a killed worker had is given on at once: its supervisor knows. The lease here is an hour."""
    hour = ["--lease-seconds", "3600", "--ready-seconds", "60"]
    port, first = free_port(), free_port()
    apis = [cluster.api(*hour), cluster.api(*hour, "--metrics-port", str(port))]
    worker = cluster.worker(*hour, "--devices", "cpu,cpu", "--metrics-port", str(first))
    wait_until(lambda: len(worker.children()) == 2, "both are started")
    for child in worker.children():
        # Every user sees the arguments of every process.
        assert b"redis://" not in Path(f"/proc/{child}/cmdline").read_bytes()
    for api in apis:
        api.wait_ready(workers=2)
        assert len(answered(httpx.post(f"{api.url}/v1/sample", json=SMALL, timeout=PATIENCE))) == 1
        assert score(api.url).status_code == 200
    # Each process tells of itself on a port of its own; what is asked of a worker is what it did.
    texts = [httpx.get(f"http://127.0.0.1:{first + i}/metrics").text for i in range(2)]
    assert sum(metric(text, "tarflow_images_total", op="sample") for text in texts) == 2
    assert all(metric(text, "process_resident_memory_bytes") > 0 for text in texts)
    assert metric(httpx.get(f"http://127.0.0.1:{port}/metrics").text, "tarflow_requests_total", outcome="ok") == 2
    assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 404
    with apis[0].client() as client, ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.post, "/v1/sample", json=LARGE)
        is_running(apis[0], request)
        before = worker.children()
        for child in before:
            os.kill(child, signal.SIGKILL)
        assert len(answered(request.result())) == LARGE["num_images"]
    assert not set(worker.children()) & set(before)
    assert "was killed by signal 9" in worker.log
    assert "1 jobs of" in worker.log
    for process in (*apis, worker):
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


@pytest.mark.long
def test_an_api_process_starts_before_redis_and_recovers(cluster: Cluster) -> None:
    """With a password, which nobody prints; and beside a device that is not there."""
    assert cluster.redis.stop() == 0
    cluster.url = cluster.redis.url.replace("redis://", f"redis://:{SECRET}@")
    api = cluster.api("--log-level", "debug")
    assert api.get("/healthz").status_code == 200
    assert api.get("/metrics").status_code == 200
    for refused in (api.get("/readyz"), httpx.post(f"{api.url}/v1/sample", json=SMALL, timeout=PATIENCE)):
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "broker_unreachable"
    worker = cluster.worker("--devices", "cpu,cuda:99", "--log-level", "debug")
    wait_until(lambda: "could not start; a new one starts in" in worker.log, "the missing device is tried again")
    cluster.start_redis(SECRET)
    api.wait_ready()
    assert score(api.url).status_code == 200
    assert api.stop() == worker.stop() == 0
    assert SECRET not in api.log + worker.log
    assert "Traceback" not in api.log + worker.log


def test_what_a_worker_cannot_finish_is_handed_back(cluster: Cluster) -> None:
    """The next one does it, and no attempt is counted: with one allowed, one that was lost would be the end."""
    once = ["--max-attempts", "1"]
    api, worker = cluster.api(*once), cluster.worker(*once, "--grace-seconds", "0")
    api.wait_ready()
    with api.client() as client, ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.post, "/v1/sample", json=LARGE)
        is_running(api, request)
        assert worker.stop() == 0, worker.log
        assert not request.done()
        assert api.metric("tarflow_queue_depth", op="sample") == 1
        other = cluster.worker(*once)
        assert len(answered(request.result())) == LARGE["num_images"]
    # Nobody looks after a worker whose supervisor was killed, and it must not keep its device.
    [child] = other.children()
    other.process.kill()
    wait_until(lambda: not runs(child), "the worker leaves with its supervisor")
    wait_until(lambda: not api.is_ready(), "nobody is ready")


def test_all_leave_in_order(cluster: Cluster) -> None:
    api, other = cluster.api("--drain-seconds", str(int(PATIENCE))), cluster.api()
    hasty = cluster.api("--drain-seconds", "0")
    worker = cluster.worker("--grace-seconds", "120")
    for process in (api, other, hasty):
        process.wait_ready()
    [child] = worker.children()
    with ThreadPoolExecutor(1) as pool, hasty.client() as client:
        # What does not end in time is answered, too.
        request = pool.submit(client.post, "/v1/sample", json=LARGE)
        is_running(hasty, request)
        os.kill(child, signal.SIGSTOP)
        assert hasty.stop() == 0, hasty.log
        refused = request.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        os.kill(child, signal.SIGCONT)
        wait_until(lambda: other.metric("tarflow_jobs_running") == 0, "nobody works for it any more")
    api.wait_ready()
    with ThreadPoolExecutor(1) as pool, api.client() as client, api.client() as late:
        # A replica finishes what it has and refuses what is new.
        request = pool.submit(client.post, "/v1/sample", json=LARGE)
        is_running(api, request)
        late.get("/healthz")
        api.process.send_signal(signal.SIGTERM)
        wait_until(lambda: late.get("/readyz").json().get("reason") == "shutting down", "it says so")
        refused = late.post("/v1/sample", json=SMALL)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["x-request-id"]
        assert len(answered(request.result())) == LARGE["num_images"]
    assert api.wait() == 0, api.log
    with ThreadPoolExecutor(1) as pool, other.client() as client:
        # So does a worker, within its grace period.
        request = pool.submit(client.post, "/v1/sample", json=LARGE)
        is_running(other, request)
        assert worker.stop() == 0, worker.log
        assert len(answered(request.result())) == LARGE["num_images"]
    assert not other.is_ready()
    for process in (api, other, hasty, worker):
        assert "Traceback" not in process.log


def test_workers_that_cannot_start_say_why(cluster: Cluster, tmp_path: Path) -> None:
    done = tarflow("worker", "--redis", cluster.url, "--device", "cuda:99")
    assert done.returncode == 2
    assert "CUDA devices are usable here" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: a worker cannot start")
    done = tarflow("worker", "--redis", cluster.url, "--models", tmp_path / "none")
    assert done.returncode == 2
    assert "none" in done.stderr
