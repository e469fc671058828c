"""Redis dies, fills up, hangs, or is cut off: clear errors meanwhile, nothing that was accepted is lost, recovery."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import httpx
import pytest

from service.broker.base import Accepted
from service.broker.redis.api import RedisBroker
from service.jobs import Job, JobState
from tests.faults.cluster import LIMITS, Cluster
from tests.faults.proxy import proxied
from tests.faults.storm import Storm, check_ended, detached_job, known, submitted, terms
from tests.service.processes import PATIENCE, ApiProcess

pytestmark = pytest.mark.anyio

SMALL = {"model": "tiny-cond", "num_images": 1, "guidance_scale": 0, "denoise": False, "seed": 0}
AWAY = {(503, "broker_unreachable"), (503, "no_worker"), (503, "broker_full")}
HEAVY_ROWS = 16


async def refusal(api: ApiProcess) -> tuple[int, str, int]:
    """What a request is told while something is wrong: status, code and after how many seconds to try again."""
    async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
        answer = await client.post("/v1/sample", json=SMALL)
        assert (await client.get("/healthz")).status_code == 200
    if answer.status_code == httpx.codes.OK:
        return answer.status_code, "", 0
    return answer.status_code, answer.json()["error"]["code"], int(answer.headers["retry-after"])


async def refused(api: ApiProcess, *codes: str) -> None:
    """Return when requests are refused with one of these codes, and a time after which to try again."""
    async with asyncio.timeout(PATIENCE):
        while True:
            status, code, after = await refusal(api)
            if status == httpx.codes.SERVICE_UNAVAILABLE and code in codes:
                assert after >= 1
                return
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("jobs", [50, pytest.param(200, marks=pytest.mark.long)])
async def test_a_redis_that_is_killed_and_started_again_loses_nothing(cluster: Cluster, jobs: int) -> None:
    api, worker = cluster.api(), cluster.worker()
    await asyncio.to_thread(api.wait_ready)
    broker = RedisBroker(cluster.url, LIMITS)
    await broker.start()
    try:
        model = await known(broker)
        accepted: dict[str, Job] = {}

        async def submit(number: int) -> None:
            job = detached_job(model, number, HEAVY_ROWS)
            accepted[await submitted(broker, job, terms(number))] = job

        await asyncio.gather(*(submit(number) for number in range(jobs)))
        assert (await broker.stats()).waiting_cost > 0
        cluster.redis.kill()
        await refused(api, "broker_unreachable")
        assert api.get("/readyz").status_code == 503
        await asyncio.to_thread(cluster.start_redis)
        await asyncio.to_thread(api.wait_ready)
        # What is repeated is known: nothing has to be done again.
        again = await broker.submit(detached_job(model, 0, HEAVY_ROWS), terms(0))
        assert isinstance(again, Accepted)
        assert again.repeated
        ended = await check_ended(broker, accepted)
        assert ended.states == {JobState.COMPLETED: jobs}
        assert (await refusal(api))[0] == httpx.codes.OK
    finally:
        await broker.close()
    for process in (api, worker):
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


async def test_a_redis_without_memory_refuses_and_recovers(cluster: Cluster) -> None:
    api, worker = cluster.api(), cluster.worker()
    await asyncio.to_thread(api.wait_ready)
    with cluster.redis.client() as client:
        client.config_set("maxmemory", "1")
        await refused(api, "broker_full")
        client.config_set("maxmemory", "0")
    await asyncio.to_thread(api.wait_ready)
    assert (await refusal(api))[0] == httpx.codes.OK
    for process in (api, worker):
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


async def test_cut_connections_are_made_anew(cluster: Cluster) -> None:
    """Everybody's connections are cut again and again in a storm; then nothing comes through for a while."""
    port = urlsplit(cluster.url).port
    assert port is not None
    with proxied(port) as proxy:
        cluster.url = f"redis://127.0.0.1:{proxy.port}/0"
        apis, worker = [cluster.api(), cluster.api()], cluster.worker()
        for api in apis:
            await asyncio.to_thread(api.wait_ready)
        async with Storm(cluster, apis, AWAY) as storm, asyncio.TaskGroup() as group:
            storming = group.create_task(storm.run(60))
            for _ in range(10):
                await asyncio.sleep(0.3)
                proxy.cut()
            storm.over.set()
            await storming
            ended = await check_ended(storm.broker, storm.detached)
            assert ended.states == {JobState.COMPLETED: len(storm.detached)}
        assert proxy.cuts >= 10
        proxy.freeze()
        await refused(apis[0], "broker_unreachable")
        proxy.thaw()
        await asyncio.to_thread(apis[0].wait_ready)
        assert (await refusal(apis[0]))[0] == httpx.codes.OK
        for process in (*apis, worker):
            assert process.stop() == 0, process.log
            assert "Traceback" not in process.log
