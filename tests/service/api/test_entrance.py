"""What every request passes on its way in and out: time, hosts, origins, headers, encodings."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI

from model.bundle import find_bundles
from service.api.entrance import MOST_HEADERS
from service.app import EXPOSED, create_app
from service.broker.base import USUAL, Accepted, Terms
from service.broker.memory import MemoryBroker
from service.jobs import Job, ModelInfo, WorkerInfo
from service.settings import Settings
from service.stores.directory import state_in
from tests.service.api.test_access import Refusing, connect
from tests.service.broker.conftest import AMPLE
from tests.service.processes import PATIENCE

pytestmark = pytest.mark.anyio
FIXED = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def make(models: Path, kind: type[MemoryBroker] = MemoryBroker, **changes: Any) -> FastAPI:
    """An app without keys, with a worker that never claims anything."""
    settings = Settings(**changes)
    broker = kind(replace(AMPLE, max_queue_cost=settings.max_queue_cost))
    infos = tuple(ModelInfo.of(bundle) for bundle in find_bundles(models))
    broker.announce(infos)
    broker.register(WorkerInfo(id="w", device="cpu", models=infos))
    return create_app(settings, broker, state_in(Path("/nonexistent")))


# Time.


async def test_a_job_has_the_time_that_is_left_of_its_request(models: Path) -> None:
    app = make(models, Refusing, request_timeout=50)
    async with connect(app) as client:
        for sent in ("7", "30.5", None):
            headers = {} if sent is None else {"x-request-timeout": sent}
            assert (await client.post("/v1/sample", json={}, headers=headers)).status_code == 429
            assert 0 < app.state.broker.terms.timeout <= float(sent or 50)


async def test_when_the_time_is_over_so_is_the_work(models: Path) -> None:
    app = make(models)
    async with connect(app) as client:
        response = await client.post("/v1/sample", json={}, headers={"x-request-timeout": "0.3"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        # Only who is slow to send is hung up on.
        assert "connection" not in response.headers
    assert (await app.state.broker.stats()).waiting_cost == 0


@pytest.mark.parametrize(
    "sent", ["", "0", "0.0", "-1", "+1", "1e3", "inf", "nan", "50.001", "9" * 30, "1,5", "1s", "0x1", "٣"]
)
async def test_a_time_that_is_none_is_refused(models: Path, sent: str) -> None:
    async with connect(make(models, request_timeout=50)) as client:
        for method, path in (("POST", "/v1/sample"), ("GET", "/v1/models")):
            response = await client.request(method, path, headers=[(b"x-request-timeout", sent.encode())])
            assert response.status_code == 422
            error = response.json()["error"]
            assert error["param"] == "X-Request-Timeout"
            assert "up to 50" in error["message"]
        assert (await client.get("/v1/models", headers={"x-request-timeout": "50"})).status_code == 200


@pytest.mark.parametrize("path", ["/v1/sample", "/v1/score", "/v1/calibrations"])
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
async def test_the_body_must_come_in_time(models: Path, tmp_path: Path, path: str, content_type: str) -> None:
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"seed": ' if "json" in content_type else b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\na'
        await never.wait()

    app = make(models)
    app.state.spool = tmp_path
    async with connect(app) as client:
        with anyio.fail_after(PATIENCE):
            headers = {"content-type": content_type, "x-request-timeout": "0.3"}
            response = await client.post(path, content=body(), headers=headers)
    if path == "/v1/calibrations" and "json" in content_type:
        assert response.status_code == 400
        return
    assert (response.status_code, response.json()["error"]["code"]) == (408, "slow_body")
    assert response.headers["connection"] == "close"
    assert response.headers["x-request-id"]


# Who sends it.


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "[::1]", "localhost:8000", "LOCALHOST", "app.localhost:80", "service",
     "tarflow:8000", "host.docker.internal:8000", "192.168.1.7", "localhost."],
)  # fmt: skip
async def test_addresses_and_names_that_nobody_can_register_are_hosts(models: Path, host: str) -> None:
    async with connect(make(models)) as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "abc.de",
        "a.b:1",
        "internal.de",
    ],
)
async def test_a_name_that_was_made_to_lead_here_is_refused(models: Path, host: str) -> None:
    async with connect(make(models)) as client:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/sample"), ("GET", "/metrics"), ("GET", "/docs")):
            response = await client.request(method, path, headers={"host": host})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "untrusted_host")
    for changes in ({"anonymous": True}, {"host": "0.0.0.0"}):
        async with connect(make(models, **changes)) as client:
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


CROSS = [
    {"origin": "https://evil.example"},
    {"origin": "http://127.0.0.1:9999"},
    {"origin": "null"},
    {"origin": "http://["},
    {"origin": "127.0.0.1:8000"},
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "cross-site"},
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-site"},
]
OWN: list[dict[str, str]] = [
    {},
    {"origin": "http://127.0.0.1:8000"},
    {"origin": "https://proxy.example", "sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", CROSS)
async def test_pages_of_others_may_not_use_what_is_open_to_all(models: Path, headers: dict[str, str]) -> None:
    async with connect(make(models, admin=True), base="http://127.0.0.1:8000") as client:
        for method, path in (
            ("POST", "/v1/sample"),
            ("POST", "/v1/admin/models/m/unload"),
            ("DELETE", "/v1/calibrations/a"),
        ):
            response = await client.request(method, path, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "cross_site")
        # They cannot read what they get.
        assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=headers)).headers
    async with connect(make(models, cors="*"), base="http://127.0.0.1:8000") as client:
        assert (await client.post("/v1/sample", content=b"{", headers=headers)).status_code == 400


@pytest.mark.parametrize("headers", OWN)
async def test_others_than_pages_and_own_pages_may(models: Path, headers: dict[str, str]) -> None:
    async with connect(make(models), base="http://127.0.0.1:8000") as client:
        assert (await client.post("/v1/sample", content=b"{", headers=headers)).status_code == 400


async def test_origins_that_are_named_may_read_everything(models: Path) -> None:
    app = make(models, cors="https://a.example, http://b.example:8080")
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, idempotency-key",
    }
    async with connect(app) as client:
        for origin in ("https://a.example", "http://b.example:8080"):
            preflight = await client.options("/v1/sample", headers={"origin": origin, **asked})
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == origin
            assert preflight.headers["x-request-id"]
            for response in (
                await client.post("/v1/sample", content=b"{", headers={"origin": origin}),
                await client.get("/nothing", headers={"origin": origin}),
                await client.post("/v1/sample", headers={"origin": origin, "content-length": "9" * 15}),
                await client.get("/v1/models", headers={"origin": origin, "x-request-timeout": "never"}),
            ):
                assert response.status_code >= 400
                assert response.headers["access-control-allow-origin"] == origin
                assert set(response.headers["access-control-expose-headers"].split(", ")) == set(EXPOSED)
        stranger = await client.options("/v1/sample", headers={"origin": "https://c.example", **asked})
        assert (stranger.status_code, stranger.json()["error"]["code"]) == (403, "cross_site")
        assert "https://c.example" in stranger.json()["error"]["message"]
        assert "access-control-allow-origin" not in stranger.headers
        assert "Origin" in stranger.headers["vary"].split(", ")
        assert stranger.headers["x-request-id"]
        under = await client.options("/v2/models/m/infer", headers={"origin": "https://c.example", **asked})
        assert under.status_code == 403
        assert isinstance(under.json()["error"], str)
        wish = {**asked, "access-control-request-method": "PATCH"}
        other = await client.options("/v1/sample", headers={"origin": "https://a.example", **wish})
        assert other.status_code == 403
        assert "'PATCH'" in other.json()["error"]["message"]
        # The page itself may read why.
        assert other.headers["access-control-allow-origin"] == "https://a.example"


# Headers.


class Broken(MemoryBroker):
    async def submit(self, job: Job, terms: Terms = USUAL) -> Accepted:
        raise RuntimeError("a fault")


async def test_every_answer_has_the_headers_that_keep_browsers_from_harm(models: Path) -> None:
    app = make(models, Broken, cors="https://a.example")
    origin = {"origin": "https://a.example"}
    async with connect(app) as client:
        answers = [
            (200, await client.get("/healthz")),
            (200, await client.get("/openapi.json")),
            (200, await client.get("/metrics")),
            (404, await client.get("/nothing")),
            (405, await client.put("/v1/sample")),
            (413, await client.post("/v1/sample", headers={"content-length": "9" * 15, **origin})),
            (422, await client.post("/v1/sample", json={"num_images": -1})),
            (403, await client.get("/v1/models", headers={"host": "evil.example"})),
            (500, await client.post("/v1/sample", json={}, headers=origin)),
        ]
        page = await client.get("/docs")
    for status, answer in answers:
        assert answer.status_code == status, answer.text
        assert FIXED.items() <= dict(answer.headers).items()
        assert answer.headers["x-request-id"]
    fault = answers[-1][1]
    assert fault.json()["error"]["code"] == "internal_error"
    assert fault.headers["access-control-allow-origin"] == "https://a.example"
    policy = page.headers["content-security-policy"]
    assert {name: value for name, value in page.headers.items() if name in FIXED}.items() >= (
        FIXED.items() - {("content-security-policy", FIXED["content-security-policy"])}
    )
    assert "unsafe-inline" not in re.sub(r"style-src[^;]*", "", policy)
    for source in re.findall(r'(?:src|href)="(https://[^"/]+)', page.text):
        assert source in policy
    assert len(re.findall(r"<script>", page.text)) == len(re.findall(r"'sha256-", policy)) == 1


async def test_too_many_headers(models: Path) -> None:
    async with connect(make(models)) as client:
        usual = len((await client.get("/healthz")).request.headers)
        most = [(f"x-{i}", "a") for i in range(MOST_HEADERS - usual)]
        assert (await client.get("/healthz", headers=most)).status_code == 200
        response = await client.get("/healthz", headers=[*most, ("x-more", "a")])
        assert (response.status_code, response.json()["error"]["code"]) == (431, "too_many_headers")
        assert f"allowed are {MOST_HEADERS}" in response.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x" * 1000])
@pytest.mark.parametrize("path", ["/v1/sample", "/v1/score", "/v1/calibrations"])
async def test_encoded_bodies_are_refused_clearly(models: Path, path: str, encoding: str) -> None:
    async with connect(make(models)) as client:
        response = await client.post(path, content=b"\x1f\x8b", headers={"content-encoding": encoding})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_content_encoding", "Content-Encoding")
        assert encoding[:100] in error["message"]
        plain = await client.post("/v1/sample", content=b"{", headers={"content-encoding": "Identity"})
        assert plain.json()["error"]["code"] == "malformed_body"
