"""Many callers at once: nobody's result depends on anybody else."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

from tests.service.pictures import Pixels, answered, b64, file, pixels
from tests.service.processes import ServerProcess, wait_until

LARGE = {"model": "fashion-mnist", "num_images": 64, "guidance_scale": 1.0, "denoise": True, "seed": 0}
SAMPLING = {"op": "sample"}


def _requests() -> list[dict[str, Any]]:
    return [
        {
            "model": "fashion-mnist" if i % 5 == 0 else "tiny-cond",
            "class": None if i % 4 == 3 else i % 5,
            "guidance_scale": (0, 0.5, 2.0)[i % 3],
            "guidance_schedule": ("constant", "linear")[i % 2],
            "attention_temperature": (1.0, 0.7)[i % 7 == 0],
            "denoise": i % 6 == 0,
            "num_images": 1 + (i % 11 == 0),
            "seed": i // 3,
        }
        for i in range(30)
    ]


def _images(client: httpx.Client, body: dict[str, Any]) -> list[Pixels]:
    return answered(client.post("/v1/sample", json=body))


def test_images_in_company_are_those_obtained_alone(client: httpx.Client) -> None:
    requests = _requests()
    alone = [_images(client, body) for body in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda body: _images(client, body), requests))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(np.array(one).astype(int) - np.array(other)).max() <= 1


def test_scores_do_not_wait_for_samples(client: httpx.Client, server: ServerProcess) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.post, "/v1/sample", json=LARGE)
        wait_until(lambda: server.metric("tarflow_jobs_running", **SAMPLING) == 1, "the sample runs")
        for name, size in (("fashion-mnist", 28), ("tiny-vp", 8)):
            response = client.post("/v1/score", json={"model": name, "images": [b64(file(pixels(size)))]})
            assert response.status_code == 200
            assert not long.done()
        assert len(answered(long.result())) == 64


def test_a_client_that_goes_away_cancels_its_sample(client: httpx.Client, server: ServerProcess) -> None:
    def finished() -> float:
        return server.metric("tarflow_images_total", model="fashion-mnist", **SAMPLING)

    # Figures come with heartbeats: those of earlier requests have arrived when this one's have.
    score = {"model": "tiny-vp", "images": [b64(file(pixels(8)))]}
    scored = server.metric("tarflow_bits_per_dim_count", model="tiny-vp")
    client.post("/v1/score", json=score)
    wait_until(lambda: server.metric("tarflow_bits_per_dim_count", model="tiny-vp") > scored, "figures arrive")
    images = finished()
    canceled = server.metric("tarflow_requests_total", outcome="canceled", **SAMPLING)
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request("POST", "/v1/sample", json.dumps(LARGE), {"content-type": "application/json"})
    wait_until(lambda: server.metric("tarflow_jobs_running", **SAMPLING) == 1, "the sample runs")
    connection.close()
    wait_until(lambda: server.metric("tarflow_jobs_running", **SAMPLING) == 0, "the sample is canceled")
    wait_until(
        lambda: server.metric("tarflow_requests_total", outcome="canceled", **SAMPLING) == canceled + 1,
        "the outcome is counted",
    )
    # The worker goes on with others, and has not finished what nobody wanted.
    body = {"model": "fashion-mnist", "seed": 1, "guidance_scale": 0, "denoise": False}
    assert client.post("/v1/sample", json=body).status_code == 200
    wait_until(lambda: finished() > images, "the image is counted")
    assert finished() == images + 1
