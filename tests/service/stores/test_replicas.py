"""Several API processes over one Redis: what one has accepted, all see, make, use and delete."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from model.bundle import read_bundle
from service.app import create_app
from service.broker.redis.api import RedisBroker
from service.broker.redis.worker import RedisWorkerBroker
from service.jobs import Job, JobResult, Lane, ModelInfo, WorkerInfo
from service.settings import Settings
from service.stores import redis
from tests.service.api.test_calibrations import COUNT, PATH, files, normal
from tests.service.broker.conftest import AMPLE
from tests.service.broker.redis_server import RedisServer
from tests.service.processes import PATIENCE
from tests.service.test_calibrator import BATCH, MODEL, NAME, statistics

pytestmark = pytest.mark.anyio
LIMITS = replace(AMPLE, max_queue_cost=2_000_000)


@pytest.fixture(scope="module")
def info(models: Path) -> ModelInfo:
    return replace(ModelInfo.of(read_bundle(models / NAME)), calibration=None)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of the test's own, with an append-only file."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        server = RedisServer(Path(directory), appendonly=True).start()
        yield server
        server.stop()


@dataclass
class Replica:
    """An app within its lifespan."""

    app: Any
    client: httpx.AsyncClient

    async def post(self, name: str, **fields: str) -> httpx.Response:
        return await self.client.post(PATH, files=files(), data={"name": name, **MODEL, **fields})

    async def get(self, name: str) -> httpx.Response:
        return await self.client.get(f"{PATH}/{name}", params=MODEL)

    async def delete(self, name: str) -> httpx.Response:
        return await self.client.delete(f"{PATH}/{name}", params=MODEL)

    async def listed(self) -> list[tuple[str, str]]:
        response = await self.client.get(PATH, params=MODEL)
        return [(item["name"], item["status"]) for item in response.json()["data"]]

    async def judged(self, name: str) -> httpx.Response:
        image = {"files": ("a.png", normal(0))}
        return await self.client.post("/v1/score", files=image, data={**MODEL, "calibration": name})

    async def begun(self, *names: str) -> None:
        """Return when images of one of these are done."""
        with anyio.fail_after(PATIENCE):
            while not any([(await self.get(name)).json()["progress"] > 0 for name in names]):  # noqa: ASYNC110
                await anyio.sleep(0.02)

    async def forgets(self, name: str) -> None:
        """Return when its metrics speak of a calibration no more."""
        with anyio.fail_after(PATIENCE):
            while f'calibration="{name}"' in (await self.client.get("/metrics")).text:  # noqa: ASYNC110
                await anyio.sleep(0.2)

    async def until(self, name: str, status: str) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE):
            while True:
                found: dict[str, Any] = (await self.get(name)).json()
                if found.get("status") == status:
                    return found
                assert found.get("status") in ("running", None), found
                await anyio.sleep(0.02)


class Worker:
    """Does what a worker of one model does, as many jobs as it may."""

    def __init__(self, url: str, info: ModelInfo) -> None:
        self._face = RedisWorkerBroker(url, "w", LIMITS)
        self._face.register(WorkerInfo(id="w", device="cpu", models=(info,)))
        self._allowed = threading.Semaphore(0)
        self._ending = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def allow(self, jobs: int = 10_000) -> None:
        """Do so many more jobs."""
        self._allowed.release(jobs)

    def _work(self) -> None:
        while not self._ending:
            self._face.heartbeat([])
            if self._allowed.acquire(timeout=0.1):
                jobs = self._face.claim({Lane.URGENT}, 1, 0.2)
                for job in jobs:
                    self._face.complete(job, JobResult(arrays=answered(job), inference_seconds=0))
                if not jobs:
                    self._allowed.release()

    def close(self) -> None:
        """Leave."""
        self._ending = True
        self._thread.join()
        self._face.close()


def answered(job: Job) -> dict[str, Any]:
    """Every array that a score may be asked for."""
    asked = {**job.payload, "statistics": {"seed": job.payload["seed"], "gradient": True}}
    arrays = statistics(replace(job, payload=asked), None)
    return arrays | {name: np.zeros(job.rows) for name in ("log_likelihood_std", "bits_per_dim")}


@pytest.fixture
def worker(server: RedisServer, info: ModelInfo) -> Iterator[Worker]:
    worker = Worker(server.url, info)
    yield worker
    worker.close()


@asynccontextmanager
async def replica(server: RedisServer, **settings: Any) -> AsyncIterator[Replica]:
    broker, connection = RedisBroker(server.url, LIMITS), redis.Connection(server.url, "tarflow")
    state = redis.state_in(connection, LIMITS.lease_seconds)
    app = create_app(Settings(batch_rows=BATCH, **settings), broker, state)
    await broker.start()
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", timeout=PATIENCE) as client,
        ):
            yield Replica(app, client)
    finally:
        await broker.close()
        connection.close()


async def test_what_one_has_made_all_use_and_delete(server: RedisServer, worker: Worker) -> None:
    worker.allow()
    async with replica(server) as first, replica(server) as second:
        response = await first.post("a", seed="7")
        assert response.status_code == 202, response.text
        assert (await second.get("a")).status_code == 200
        made = await second.until("a", "ready")
        assert (made["usable"], made["record"]["seed"]) == (True, 7)
        assert await first.listed() == await second.listed() == [("a", "ready")]
        for each in (first, second):
            answer = await each.judged("a")
            assert answer.status_code == 200, answer.text
            assert 'calibration="a"' in (await each.client.get("/metrics")).text
            assert (await each.post("a")).json()["error"]["code"] == "calibration_exists"
        # Another one in its place is used at once, and its drift begins anew.
        assert (await second.post("a", seed="8", replace="true")).status_code == 202
        await first.until("a", "ready")
        for each in (second, first):
            assert (await each.get("a")).json()["record"]["seed"] == 8
            assert (await each.judged("a")).status_code == 200
            assert (
                'tarflow_anomaly_window{calibration="a",model="tiny-uncond",score="combined"} 1.0'
                in (await each.client.get("/metrics")).text
            )
        assert (await second.delete("a")).status_code == 204
        for each in (first, second):
            assert await each.listed() == []
            assert (await each.get("a")).status_code == 404
            assert (await each.delete("a")).status_code == 404
            refused = await each.judged("a")
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "calibration_not_found")
        await first.forgets("a")


async def test_a_deletion_reaches_whoever_makes_it(server: RedisServer, worker: Worker) -> None:
    async with replica(server) as first:
        await first.post("a")
        worker.allow(1)
        await first.begun("a")
        async with replica(server) as second:
            assert (await second.get("a")).json()["progress"] == pytest.approx(BATCH / COUNT)
            assert (await second.delete("a")).status_code == 204
            assert (await first.get("a")).status_code == 404
            # The batch that it waits for is given up, and the next one has its turn.
            await first.post("b")
            worker.allow()
            assert (await second.until("b", "ready"))["num_images"] == COUNT
            assert await first.listed() == [("b", "ready")]


async def test_replacing_reaches_whoever_makes_it(server: RedisServer, worker: Worker) -> None:
    async with replica(server) as first:
        await first.post("a", seed="1")
        async with replica(server) as second:
            assert (await second.post("a", seed="2")).json()["error"]["code"] == "calibration_exists"
            assert (await second.post("a", seed="2", replace="true")).status_code == 202
            worker.allow()
            assert (await first.until("a", "ready"))["record"]["seed"] == 2


async def test_of_many_uploads_at_once_one_is_accepted(server: RedisServer, worker: Worker) -> None:
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(server, max_calibrations=2)) for _ in range(3)]
        same = await asyncio.gather(*(each.post("a") for each in replicas))
        assert sorted(response.status_code for response in same) == [202, 409, 409]
        others = await asyncio.gather(*(each.post(name) for each, name in zip(replicas, "bcd", strict=True)))
        assert sorted(response.status_code for response in others) == [202, 409, 409]
        worker.allow()
        for name, status in await replicas[0].listed():
            assert status in ("running", "ready")
            await replicas[1].until(name, "ready")


async def test_another_replica_finishes_what_one_leaves(server: RedisServer, worker: Worker) -> None:
    async with replica(server) as second:
        async with replica(server) as first:
            await first.post("a")
            await first.post("b")
            worker.allow(1)
            await second.begun("a", "b")
        worker.allow()
        for name in "ab":
            assert (await second.until(name, "ready"))["num_images"] == COUNT
    async with replica(server) as third:
        assert await third.listed() == [("a", "ready"), ("b", "ready")]
        assert (await third.judged("b")).status_code == 200


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_redis_goes_away_in_the_middle(server: RedisServer, worker: Worker, how: signal.Signals) -> None:
    async with replica(server) as first:
        await first.post("kept")
        worker.allow(COUNT // BATCH)
        await first.until("kept", "ready")
        await first.post("a")
        worker.allow(1)
        await first.begun("a")
        server.stop(how)
        for refused in (await first.get("a"), await first.post("b"), await first.delete("a")):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "broker_unreachable"
            assert int(refused.headers["retry-after"]) >= 1
        server.start()
        worker.allow()
        assert (await first.until("a", "ready"))["num_images"] == COUNT
        assert await first.listed() == [("a", "ready"), ("kept", "ready")]


async def test_an_api_process_without_redis_takes_up_what_waits_when_it_comes(
    server: RedisServer, worker: Worker
) -> None:
    async with replica(server) as first:
        await first.post("a")
    server.stop()
    async with replica(server) as second:
        assert (await second.get("a")).status_code == 503
        server.start()
        worker.allow()
        await second.until("a", "ready")
