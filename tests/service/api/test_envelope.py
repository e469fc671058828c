"""Errors come in the envelope of the prefix that was called, whoever raises them."""

from __future__ import annotations

import json
import socket
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.broker.memory import MemoryBroker
from service.jobs import WorkerInfo
from tests.service.test_app import SMALL, Broken, connect, make

TEXT = ("/v2", "/v2/", "/v2/models/tiny-vp/infer", "/v2/nothing", "/v2/models/tiny-vp/nothing", "/v2/models/tiny-vp/")
NATIVE = ("/v20", "/v1", "/v1/imagesque", "/v1/sample", "/v2.json", "/V2/models")
OPENAI = ("/v1/images", "/v1/images/nothing", "/v1/images/generations/more")
SEED = {"inputs": [{"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]}]}


def check(response: httpx.Response, path: str) -> None:
    """An error in the right envelope, with an id by which the log knows it."""
    assert response.status_code >= 400, path
    body = response.json()
    assert list(body) == ["error"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    if path in TEXT:
        assert isinstance(body["error"], str)
        assert body["error"]
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
    if path in TEXT or path in OPENAI:
        assert response.status_code != 422


@pytest.mark.parametrize("path", [*TEXT, *NATIVE, *OPENAI])
def test_what_the_framework_refuses(client: httpx.Client, path: str) -> None:
    wrong = client.request("PUT", path, follow_redirects=True)
    assert wrong.status_code in (404, 405)
    check(wrong, path)
    check(client.request("PATCH", path, follow_redirects=True), path)


@pytest.mark.parametrize("path", ["/v2/models/tiny-vp/infer", "/v1/sample"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b"[" * 100_000])
def test_bodies_that_are_no_requests(client: httpx.Client, path: str, content: bytes) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    check(response, path)


@pytest.mark.parametrize("name", ["%ED%A0%80", "a%0Ab", "%00", "a" * 500, "tiny-vp%3Anothing", "%E2%82%AC"])
def test_names_that_are_none(client: httpx.Client, name: str) -> None:
    for method, path in (("GET", ""), ("GET", "/ready"), ("GET", "/config"), ("POST", "/infer")):
        response = client.request(method, f"/v2/models/{name}{path}", json=None if method == "GET" else SEED)
        assert response.status_code in (404, 405)
        check(response, TEXT[0])


def test_413_at_the_door(client: httpx.Client) -> None:
    """From a middleware, before there is a route, or a body."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        head = b"POST /v2/models/tiny-vp/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999\r\n\r\n"
        connection.sendall(head)
        connection.settimeout(60)
        answer = b""
        while not answer.endswith(b'"}') and (part := connection.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id" in head
    assert json.loads(body)["error"].startswith("the request has 999999999999999 bytes")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_small_body_that_unpacks_to_a_large_one_is_413(client: httpx.Client, encoding: str) -> None:
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    assert len(bomb) < 2**17
    response = client.post("/v2/models/tiny-vp/infer", content=bomb, headers={"content-encoding": encoding})
    assert response.status_code == 413
    assert "when it is unpacked" in response.json()["error"]
    check(response, TEXT[0])


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v2/models/tiny-vp:sample/infer", "/v1/sample"])
async def test_what_comes_from_beside_the_routes(models: Path, path: str) -> None:
    """A shutdown, a fault, a body that grows too large, a queue without workers: each in the path's envelope."""

    async def answer(app: Any, **more: Any) -> tuple[int, str, httpx.Headers]:
        async with connect(app) as client:
            body = {"json": SEED if path.startswith("/v2") else {}, **more}
            response = await client.post(path, **body)
        check(response, TEXT[0] if path.startswith("/v2") else path)
        error = response.json()["error"]
        return response.status_code, error if isinstance(error, str) else error["message"], response.headers

    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 1024

    leaving = make(models)
    leaving.state.drain.begin()
    status, said, headers = await answer(leaving)
    assert (status, said, headers["retry-after"]) == (503, "the service is shutting down", "2")
    status, said, _ = await answer(make(models, Broken))
    assert (status, "secret" in said) == (500, False)
    app = make(models)
    sent = {"json": None, "content": chunks(), "headers": {"content-type": "application/json"}}
    status, said, _ = await answer(app, **sent)
    assert (status, said) == (413, f"the request is larger than {SMALL} bytes; send fewer or smaller images")
    status, said, headers = await answer(make(models, worker=False))
    assert (status, headers["retry-after"]) == (503, "2")
    status, said, _ = await answer(make(models, request_timeout=0.05))
    assert status == 504


@pytest.mark.anyio
async def test_readiness_is_that_of_readyz(models: Path) -> None:
    async with connect(make(models, worker=False)) as client:
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        for path in ("/v2/health/ready", "/v2/models/tiny-vp/ready"):
            response = await client.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "2")
            assert response.json()["error"].startswith("no worker is ready")
        assert (await client.get("/v2/models/tiny-vp")).status_code == 200
    app = make(models)
    async with connect(app) as client:
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        assert (await client.get("/v2/models/tiny-vp/ready")).json() == {"name": "tiny-vp", "ready": True}
        app.state.drain.begin()
        response = await client.get("/v2/models/tiny-vp/ready")
        assert (response.status_code, response.json()) == (503, {"error": "the service is shutting down"})


@pytest.mark.anyio
@pytest.mark.parametrize("admin", [False, True])
async def test_only_operators_see_why_a_model_is_not_there(models: Path, admin: bool) -> None:
    app = make(models, admin=admin)
    states = {"broken": "failed: /some/directory is damaged", "new": "loading"}
    app.state.broker.register(WorkerInfo(id="other", device="cpu", models=(), states=states))
    async with connect(app) as client:
        index = (await client.post("/v2/repository/index")).json()
    found = {entry["name"]: (entry["state"], entry["reason"]) for entry in index}
    assert found["broken:sample"] == ("UNAVAILABLE", states["broken"] if admin else "")
    assert (found["new"], found["tiny-vp"]) == (("LOADING", ""), ("READY", ""))


@pytest.mark.anyio
async def test_requests_count_as_the_operation_that_they_are(models: Path) -> None:
    app = make(models, request_timeout=0.05)
    async with connect(app) as client:
        await client.post("/v2/models/tiny-vp:sample/infer", json=SEED)
        await client.post("/v2/models/tiny-vp:encode/infer", json=SEED)
        await client.post("/v2/models/nothing/infer", json=SEED)
        metrics = (await client.get("/metrics")).text
    assert 'tarflow_requests_total{model="tiny-vp",op="sample",outcome="timeout"} 1.0' in metrics
    assert 'tarflow_requests_total{model="tiny-vp",op="encode",outcome="invalid"} 1.0' in metrics
    assert isinstance(app.state.broker, MemoryBroker)
    assert (await app.state.broker.stats()).waiting_cost == 0
