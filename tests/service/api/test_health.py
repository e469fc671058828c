"""GET /healthz, /readyz and /metrics."""

from __future__ import annotations

from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.service.pictures import b64, file, pixels
from tests.service.processes import ServerProcess, wait_until


def test_it_lives_and_is_ready(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    response = client.get("/readyz")
    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "ready"
    [worker] = body["workers"]
    assert worker["models"] == ["fashion-mnist", "tiny-cond", "tiny-uncond", "tiny-uniform", "tiny-vp"]
    assert worker["heartbeat_age"] >= 0


def test_metrics_are_valid_and_each_family_is_there_once(client: httpx.Client) -> None:
    client.post("/v1/sample", json={"model": "tiny-cond"})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    names = Counter(family.name for family in families)
    assert max(names.values()) == 1, names
    assert {
        "tarflow_requests",
        "tarflow_request_seconds",
        "tarflow_queue_wait_seconds",
        "tarflow_queue_depth",
        "tarflow_queue_cost",
        "tarflow_queue_oldest_seconds",
        "tarflow_queue_callers",
        "tarflow_broker_up",
        "tarflow_build_info",
        "tarflow_jobs",
        "tarflow_jobs_reclaimed",
        "tarflow_dead_letters",
        "tarflow_worker_info",
        "tarflow_worker_start_time_seconds",
        "tarflow_jobs_running",
        "tarflow_workers_ready",
        "tarflow_worker_restarts",
        "tarflow_worker_heartbeat_age_seconds",
        "tarflow_inference_seconds",
        "tarflow_slice_seconds",
        "tarflow_batch_rows",
        "tarflow_images",
        "tarflow_nonfinite",
        "tarflow_failed_batches",
        "tarflow_bits_per_dim",
    } <= names.keys()
    samples = Counter((s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples)
    assert max(samples.values()) == 1


def test_workers_figures_arrive(client: httpx.Client, server: ServerProcess) -> None:
    labels = {"model": "tiny-vp", "op": "sample", "worker": "worker-0"}
    server.settle()
    before = server.metric("tarflow_images_total", **labels)
    client.post("/v1/sample", json={"model": "tiny-vp", "num_images": 3})
    client.post("/v1/score", json={"model": "tiny-vp", "images": [b64(file(pixels(8)))]})
    wait_until(lambda: server.metric("tarflow_images_total", **labels) == before + 3, "the images are counted")
    assert server.metric("tarflow_batch_rows_sum", **labels) >= 3
    wait_until(lambda: server.metric("tarflow_bits_per_dim_count", model="tiny-vp") >= 1, "the score is counted")
    assert server.metric("tarflow_workers_ready") == 1
    assert server.metric("tarflow_worker_restarts_total") == 0
    assert server.metric("tarflow_failed_batches_total") == 0


def test_outcomes_are_counted(client: httpx.Client, server: ServerProcess) -> None:
    def count(outcome: str, model: str) -> float:
        return server.metric("tarflow_requests_total", op="sample", outcome=outcome, model=model)

    ok, refused, unknown = count("ok", "tiny-cond"), count("invalid", "tiny-cond"), count("invalid", "")
    server.settle()
    waits = server.metric("tarflow_queue_wait_seconds_count", op="sample", model="tiny-cond")
    client.post("/v1/sample", json={"model": "tiny-cond"})
    client.post("/v1/sample", json={"model": "tiny-cond", "class": "wolf"})
    client.post("/v1/sample", json={"model": "nobody"})
    client.post("/v1/sample", json={"num_images": 0})
    client.post("/v1/sample", content=b"{")
    assert count("ok", "tiny-cond") == ok + 1
    assert count("invalid", "tiny-cond") == refused + 1
    assert count("invalid", "") == unknown + 3
    name, labels = "tarflow_queue_wait_seconds_count", {"op": "sample", "model": "tiny-cond"}
    wait_until(lambda: server.metric(name, **labels) == waits + 1, "the worker has told of the wait")
    # What callers make up never becomes a label.
    assert server.metric("tarflow_requests_total", model="nobody") == 0
