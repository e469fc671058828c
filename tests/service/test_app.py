"""The app over a broker without workers behind it: what happens when nothing answers, or too much is sent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from model.bundle import find_bundles
from service.api import door as door_module
from service.app import create_app
from service.broker.base import USUAL, Accepted, Terms
from service.broker.memory import MemoryBroker
from service.jobs import Job, ModelInfo, Op, WorkerInfo
from service.settings import Settings
from service.stores.directory import state_in
from tests.service.broker.conftest import AMPLE
from tests.service.pictures import file

pytestmark = pytest.mark.anyio
SMALL = 4096


@pytest.fixture(autouse=True)
def door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is judged at the door, however soon it comes after another."""
    monkeypatch.setattr(door_module, "OPEN_SECONDS", 0)


class Broken(MemoryBroker):
    """A broker with a fault."""

    async def submit(self, job: Job, terms: Terms = USUAL) -> Accepted:
        raise RuntimeError("a secret that no caller may see")


def make(models: Path, kind: type[MemoryBroker] = MemoryBroker, *, worker: bool = True, **changes: Any) -> Any:
    """An app, with a worker that never claims anything."""
    settings = Settings(max_body_bytes=SMALL, **changes)
    broker = kind(replace(AMPLE, max_queue_cost=settings.max_queue_cost))
    infos = tuple(ModelInfo.of(bundle) for bundle in find_bundles(models))
    broker.announce(infos)
    if worker:
        broker.register(WorkerInfo(id="w", device="cpu", models=infos))
    return create_app(settings, broker, state_in(models / ".state"))


def connect(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://service")


async def test_a_fault_is_a_500_that_tells_nothing(models: Path) -> None:
    async with connect(make(models, Broken)) as client:
        response = await client.post("/v1/sample", json={})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert response.headers["x-request-id"]
        kept = await client.post("/v1/sample", json={}, headers={"x-request-id": "mine"})
        assert kept.headers["x-request-id"] == "mine"
        metrics = (await client.get("/metrics")).text
    assert 'tarflow_requests_total{model="fashion-mnist",op="sample",outcome="error"} 2.0' in metrics


async def test_a_body_that_announces_too_much_is_413(models: Path) -> None:
    async with connect(make(models)) as client:
        for path in ("/v1/sample", "/v1/score"):
            response = await client.post(path, content=b" " * (SMALL + 1), headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
            assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/sample", "/v1/decode", "/v1/score", "/v1/denoise"])
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_chunked_body_that_grows_too_large_is_413(models: Path, path: str, content_type: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(20):
            yield b" " * 1024

    async with connect(make(models)) as client:
        response = await client.post(path, content=chunks(), headers={"content-type": content_type})
    assert response.status_code == 413, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "body_too_large")


async def test_without_a_worker_there_is_503(models: Path) -> None:
    async with connect(make(models, worker=False)) as client:
        response = await client.post("/v1/sample", json={})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("unavailable_error", "no_worker")
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
        assert (await client.get("/healthz")).status_code == 200
        assert len((await client.get("/v1/models")).json()["data"]) == 5


async def test_draining_is_503(models: Path) -> None:
    app = make(models)
    app.state.drain.begin()
    async with connect(app) as client:
        response = await client.post("/v1/sample", json={})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "shutting down")


async def test_a_request_that_takes_too_long_is_504(models: Path) -> None:
    app = make(models, request_timeout=0.05)
    async with connect(app) as client:
        response = await client.post("/v1/sample", json={})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        metrics = (await client.get("/metrics")).text
    assert 'outcome="timeout"' in metrics
    assert (await app.state.broker.stats()).waiting_cost == 0


async def test_a_full_queue_is_429(models: Path) -> None:
    app = make(models, request_timeout=0.5, max_queue_cost=10)
    model = (await app.state.broker.models())[0]
    await app.state.broker.submit(Job(id="a", op=Op.SAMPLE, model=model.name, payload={}, rows=1, cost=11))
    async with connect(app) as client:
        response = await client.post("/v1/sample", json={})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "2"
        assert 'outcome="rate_limited"' in (await client.get("/metrics")).text


async def test_classifying_costs_a_pass_for_every_class_and_none(models: Path) -> None:
    """The whole cost is refused at the door, before an image is decoded."""
    app = make(models, request_timeout=0.5, max_queue_cost=1 + 2 * 16 * (5 + 1) * 3)
    await app.state.broker.submit(Job(id="a", op=Op.SAMPLE, model="tiny-cond", payload={}, rows=1, cost=1))
    body = {"model": "tiny-cond", "images": ["aGk="] * 2, "draws": 3}
    async with connect(app) as client:
        assert (await client.post("/v1/classify", json=body)).json()["error"]["code"] == "invalid_image"
        await app.state.broker.submit(Job(id="b", op=Op.SAMPLE, model="tiny-cond", payload={}, rows=1, cost=1))
        response = await client.post("/v1/classify", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert f"this request costs {2 * 16 * 6 * 3}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "passes"), [({}, 3), ({"alpha": 0.1}, 4), ({"score": "gradient"}, 7), ({"maps": "array"}, 7)]
)
async def test_verdicts_cost_a_pass_and_gradients_three_more(models: Path, asked: dict[str, Any], passes: int) -> None:
    app = make(models, max_queue_cost=10)
    await app.state.broker.submit(Job(id="a", op=Op.SAMPLE, model="tiny-uncond", payload={}, rows=1, cost=1))
    async with connect(app) as client:
        body = {"model": "tiny-uncond", "images": ["aGk="] * 2, "draws": 3, **asked}
        response = await client.post("/v1/score", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert f"this request costs {2 * 36 * passes}" in response.json()["error"]["message"]


async def test_limits_are_settings(models: Path) -> None:
    async with connect(make(models, max_images=2, max_draws=1, default_model="tiny-vp")) as client:
        for path, body in (
            ("/v1/sample", {"num_images": 3}),
            ("/v1/score", {"images": ["x"], "draws": 2}),
            ("/v1/classify", {"images": ["x"], "draws": 2}),
            ("/v1/score", {"images": ["aGk="] * 3}),
        ):
            response = await client.post(path, json=body)
            assert response.status_code == 422
        data = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in data if model["default"]] == ["tiny-vp"]


@pytest.mark.parametrize("module", ["service.app", "service.cli", "service.server"])
def test_the_api_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in sys.modules if m.partition('.')[0] == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_used_up_pixels_are_blamed_on_the_request(models: Path) -> None:
    picture = file(Image.new("L", (28, 28)))
    async with connect(make(models, max_pixels=28 * 28)) as client:
        response = await client.post("/v1/score", files=[("files", (f"{i}.png", picture)) for i in range(5)])
        large = await client.post("/v1/score", files={"files": file(Image.new("L", (29, 28)))})
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("files", "too_many_pixels")
    assert "4 of 5 images with 3,136 pixels went in" in error["message"]
    assert (large.json()["error"]["param"], large.json()["error"]["code"]) == ("files.0", "image_too_large")
