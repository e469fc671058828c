"""Who gets in: on every route of the app, as its own table lists them, so that a new one cannot be forgotten."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount, WebSocketRoute

from model.bundle import find_bundles
from service.access.caller import ANYONE, NOBODY, Scope
from service.access.keys import digest, made, written
from service.app import OPERATIONS, PARTS, create_app, guard
from service.broker.base import USUAL, Accepted, Terms
from service.broker.memory import MemoryBroker
from service.errors import Overloaded
from service.jobs import Job, ModelInfo, Op, Priority, WorkerInfo
from service.page.files import file_names
from service.settings import Settings
from service.stores.directory import state_in
from tests.service.broker.conftest import AMPLE
from tests.service.pictures import b64, file, pixels

pytestmark = pytest.mark.anyio
PAGE = {"/", *(f"/page/x/{name}" for name in file_names())}
OPEN = {"/healthz", "/readyz", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready", *PAGE}
"""All that is answered without a key. Who adds a path here says that it may be."""
SECRETS = {str(scope): f"tarflow_secret-of-{scope}" for scope in Scope} | {
    "limited": "tarflow_secret-of-limited",
    "few": "tarflow_secret-of-few",
}


class Refusing(MemoryBroker):
    """Remembers on which terms a job came, and refuses it."""

    terms: Terms

    async def submit(self, job: Job, terms: Terms = USUAL) -> Accepted:
        self.terms = terms
        raise Overloaded("not now")


def keys() -> str:
    """A key for each scope alone, one with all limits, and one that may ask three times an hour."""
    more: dict[str, dict[str, Any]] = {
        "limited": {"scopes": ["infer"], "priority": "high", "concurrent_cost": 200},
        "few": {"scopes": ["infer"], "rate": "3/hour"},
    }
    return "\n".join(
        written(name, made(sha256=digest(secret).hex(), **more.get(name, {"scopes": [name]})))
        for name, secret in SECRETS.items()
    )


def make(models: Path | None = None, **changes: Any) -> FastAPI:
    """An app with keys, with a worker that never claims anything where there are models."""
    settings = Settings(**({"keys_inline": keys()} | changes))
    broker = MemoryBroker(replace(AMPLE, max_queue_cost=settings.max_queue_cost))
    infos = () if models is None else tuple(ModelInfo.of(bundle) for bundle in find_bundles(models))
    broker.announce(infos)
    if models is not None:
        broker.register(WorkerInfo(id="w", device="cpu", models=infos))
    return create_app(settings, broker, state_in(Path("/nonexistent")))


@asynccontextmanager
async def connect(
    app: FastAPI, secret: str | None = None, base: str = "http://service"
) -> AsyncIterator[httpx.AsyncClient]:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=base, headers=headers) as client:
        yield client


def places(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of everything that the app answers, mounted apps included."""
    for route in iter_route_contexts(app.routes):
        path = re.sub(r"\{[^}]*\}", "x", str(route.path))
        if isinstance(route.original_route, Mount):
            yield from ((method, f"{path}/x") for method in ("GET", "POST", "DELETE", "PUT"))
        else:
            yield from ((method, path) for method in sorted(route.methods or ()))


async def test_what_is_open_is_written_down() -> None:
    app = make()
    found = list(places(app))
    assert len(found) > 20
    async with connect(app) as client:
        answered = {path for method, path in found if (await client.request(method, path)).status_code != 401}
    assert answered == OPEN


async def test_what_is_open_tells_no_names(models: Path) -> None:
    names = [bundle.name for bundle in find_bundles(models)]
    assert names
    async with connect(make(models), SECRETS["infer"]) as client:
        for path in OPEN - {"/docs", "/openapi.json"}:
            response = await client.get(path)
            assert response.status_code == 200
            assert not [name for name in names if name in response.text], path
        assert (await client.get("/readyz")).json() == {"status": "ready", "workers": []}
        # Examples have names of their own, whatever is served.
        async with connect(make()) as bare:
            for path in ("/docs", "/openapi.json"):
                assert (await client.get(path)).text == (await bare.get(path)).text
    async with connect(make(models, keys_inline=None)) as client:
        [worker] = (await client.get("/readyz")).json()["workers"]
        assert sorted(worker["models"]) == sorted(names)


@pytest.mark.parametrize("metrics_port", [False, True])
async def test_every_other_route_is_closed(metrics_port: bool) -> None:
    app = make()
    if metrics_port:
        operations = FastAPI(openapi_url=None)
        operations.state = app.state
        guard(operations, OPERATIONS, app.state.settings)
        app = operations
    closed = [(method, path) for method, path in places(app) if path not in OPEN]
    assert closed
    wrong_headers = (
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {SECRETS['infer']}"},
        {"authorization": f"Bearer {SECRETS['infer']}x"},
        {"authorization": f"Bearer {digest(SECRETS['infer']).hex()}"},
        {"x-api-key": "wrong"},
        {"x-api-key": f"Bearer {SECRETS['infer']}"},
        {"cookie": f"key={SECRETS['infer']}"},
    )
    async with connect(app) as client:
        for method, path in closed:
            for headers in wrong_headers:
                response = await client.request(method, path, headers=headers)
                assert response.status_code == 401, (method, path, headers)
                assert response.headers["www-authenticate"] == 'Bearer realm="tarflow"'
                assert response.headers["x-request-id"]
                if path.startswith("/v2"):
                    assert isinstance(response.json()["error"], str)
                elif method != "HEAD":
                    error = response.json()["error"]
                    assert error["code"] == (
                        "missing_key" if not any(headers.values()) or "cookie" in headers else "invalid_key"
                    )
                    assert error["type"] == "authentication_error"
                assert SECRETS["infer"] not in response.text
            let_in = []
            for scope in Scope:
                for headers in ({"authorization": f"bearer {SECRETS[scope]}"}, {"x-api-key": SECRETS[scope]}):
                    response = await client.request(method, path, headers=headers)
                    if response.status_code == 403:
                        if path.startswith("/v2"):
                            assert f"'{scope}'" in response.json()["error"]
                        elif method != "HEAD":
                            assert response.json()["error"]["code"] == "wrong_scope"
                            assert response.json()["error"]["type"] == "permission_error"
                            assert f"'{scope}'" in response.json()["error"]["message"]
                        assert 'error="insufficient_scope"' in response.headers["www-authenticate"]
                    else:
                        assert response.status_code != 401, (method, path)
                        let_in.append(scope)
            assert len(let_in) == 2, (method, path, let_in)
            assert len(set(let_in)) == 1, (method, path, let_in)


async def test_which_scope_opens_what() -> None:
    app = make()
    for path, scope in (("/v1/models", "infer"), ("/metrics", "metrics"), ("/v1/admin/workers", "admin")):
        async with connect(app, SECRETS[scope]) as client:
            assert (await client.get(path)).status_code == 200


async def test_what_there_is_not_needs_a_key_too() -> None:
    app = make()
    async with connect(app) as client:
        for method, path in (("GET", "/nothing"), ("PUT", "/v1/sample"), ("POST", "/healthz"), ("GET", "/v1/models/")):
            assert (await client.request(method, path)).status_code == 401
    async with connect(app, SECRETS["metrics"]) as client:
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.put("/v1/sample")).status_code == 405
        # Routers take a line's end behind a path for nothing; what guards them must, too.
        for path in ("/v1/models%0A", "/v1/admin/workers%0A"):
            assert (await client.get(path)).status_code == 403


async def test_a_route_that_nobody_guards_is_no_app() -> None:
    async def endpoint() -> None: ...

    class Sub(FastAPI): ...

    for route in (Mount("/more", Sub()), WebSocketRoute("/socket", endpoint)):
        app = FastAPI(openapi_url=None)
        app.state = make().state
        app.router.routes.append(route)
        with pytest.raises(LookupError, match=route.path):
            guard(app, PARTS, app.state.settings)
    app = FastAPI(openapi_url=None)
    app.state = make().state
    app.add_api_route("/forgotten", endpoint)
    with pytest.raises(LookupError, match="/forgotten"):
        guard(app, PARTS, app.state.settings)


async def test_the_documentation_tells_who_needs_what() -> None:
    async with connect(make()) as client:
        document = (await client.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path not in OPEN)
    assert document["paths"]["/v1/sample"]["post"]["security"] == [{"bearer": ["infer"]}, {"x-api-key": ["infer"]}]
    assert document["paths"]["/metrics"]["get"]["security"] == [{"bearer": ["metrics"]}, {"x-api-key": ["metrics"]}]
    async with connect(make(keys_inline=None)) as client:
        document = (await client.get("/openapi.json")).json()
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for path in document["paths"].values() for operation in path.values())


async def test_without_keys_all_are_anyone_and_nobody_administers() -> None:
    app = make(keys_inline=None)
    async with connect(app) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/admin/workers")).status_code == 404
        # A key that nobody asked for is no harm.
        assert (await client.get("/v1/models", headers={"x-api-key": "any"})).status_code == 200
    assert ANYONE.scopes == set(Scope)
    assert NOBODY.scopes == set()


# Limits.


async def test_a_rate_is_told_and_held(models: Path) -> None:
    app = make(models)
    async with connect(app, SECRETS["few"]) as client:
        # Whatever is refused for another reason first does not count; what there is not, does.
        assert (await client.get("/metrics")).status_code == 403
        for remaining in (2, 1, 0):
            response = await client.get("/v1/models" if remaining else "/nothing")
            assert response.status_code == (200 if remaining else 404)
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == str(remaining)
        for method in ("GET", "POST"):
            response = await client.request(method, "/v1/sample", json={})
            assert response.status_code == 429
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert "'few' allows 3/hour" in error["message"]
            assert 1 <= int(response.headers["retry-after"]) <= 3600
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            assert re.fullmatch(r"[0-9]+s", response.headers["x-ratelimit-reset-requests"])
        assert (await client.get("/readyz")).status_code == 200
    async with connect(app, SECRETS["metrics"]) as client:
        assert 'tarflow_refused_total{code="rate_limit_exceeded"} 2.0' in (await client.get("/metrics")).text


async def test_a_limit_of_what_is_in_flight(models: Path) -> None:
    app = make(models, request_timeout=60)
    async with connect(app, SECRETS["limited"]) as client:
        model = {"model": "tiny-cond", "class": 0, "guidance_scale": 0, "denoise": False, "solver": "sequential"}
        too_large = await client.post("/v1/sample", json={**model, "num_images": 13})
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (422, "cost_too_large")
        assert "costs 208 units" in too_large.json()["error"]["message"]
        too_many = {"model": "tiny-cond", "images": [b64(file(pixels(16)))] * 13}
        before = await client.post("/v1/score", json=too_many)
        assert (before.status_code, before.json()["error"]["code"]) == (422, "cost_too_large")
        timed_out = await client.post(
            "/v1/sample", json={**model, "num_images": 12}, headers={"x-request-timeout": "0.2"}
        )
        assert (timed_out.status_code, timed_out.json()["error"]["code"]) == (504, "timeout")
        # Something of this caller's is on its way.
        job = Job(id="a", op=Op.SAMPLE, model="tiny-cond", payload={}, rows=12, cost=192)
        await app.state.broker.submit(job, Terms(caller="limited", detached=True))
        for path, body in (("/v1/sample", model), ("/v1/score", {"model": "tiny-cond", "images": ["aGk="]})):
            refused = await client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded"), path
            assert refused.headers["retry-after"]
            assert "allows 200 units at once (192 are waiting or running" in refused.json()["error"]["message"]


async def test_a_job_carries_its_caller(models: Path) -> None:
    settings = Settings(keys_inline=keys(), request_timeout=50)
    broker = Refusing(AMPLE)
    infos = tuple(ModelInfo.of(bundle) for bundle in find_bundles(models))
    broker.announce(infos)
    broker.register(WorkerInfo(id="w", device="cpu", models=infos))
    app = create_app(settings, broker, state_in(Path("/nonexistent")))
    async with connect(app, SECRETS["limited"]) as client:
        assert (await client.post("/v1/sample", json={"model": "tiny-cond"})).status_code == 429
    terms = broker.terms
    assert (terms.caller, terms.priority, terms.caller_cost) == ("limited", Priority.HIGH, 200)
    assert 0 < terms.timeout <= 50
