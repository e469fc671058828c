"""Whoever goes away takes along what only they waited for, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest

from service.broker.redis.api import RedisBroker
from service.broker.redis.keys import REPLICA_SECONDS
from tests.faults.cluster import LARGE, LIMITS, Cluster
from tests.faults.storm import check_ended, detached_job, known, submitted, terms
from tests.service.processes import PATIENCE, ApiProcess, wait_until

pytestmark = pytest.mark.anyio
TOGETHER = ["--batch-rows", str(LARGE["num_images"])]
"""All rows of a large request are one batch: none is finished before the others."""


async def begun(api: ApiProcess, running: int = 1) -> None:
    """Return when workers have so many jobs."""
    await asyncio.to_thread(
        wait_until, lambda: api.metric("tarflow_jobs_running") == running, f"{running} jobs are being done"
    )


async def test_a_client_that_goes_away_frees_its_rows_and_no_others(cluster: Cluster) -> None:
    api, worker = cluster.api(), cluster.worker(*TOGETHER)
    await asyncio.to_thread(api.wait_ready)
    [child] = worker.children()
    broker = RedisBroker(cluster.url, LIMITS)
    await broker.start()
    try:
        model = await known(broker)
        async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
            request = asyncio.create_task(client.post("/v1/sample", json=LARGE))
            await begun(api)
            # Stopped, so that the request is still being worked on when its client goes.
            os.kill(child, signal.SIGSTOP)
            # What an asynchronous job's client does is of no concern to the job.
            detached = detached_job(model, 0)
            job_id = await submitted(broker, detached, terms(0))
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        await broker.close()
        await asyncio.to_thread(
            wait_until,
            lambda: api.metric("tarflow_requests_total", op="sample", outcome="canceled") == 1,
            "the service hears of it",
        )
        os.kill(child, signal.SIGCONT)
        broker = RedisBroker(cluster.url, LIMITS)
        await broker.start()
        await check_ended(broker, {job_id: detached})
        # Its rows left with the first slice after it, and not one of them was finished; those of others were.
        await asyncio.to_thread(
            wait_until,
            lambda: api.metric("tarflow_images_total") == detached.rows,
            "the worker has told what it did",
        )
        assert api.metric("tarflow_dropped_rows_total", op="sample") == LARGE["num_images"]
        assert api.metric("tarflow_jobs_running") == api.metric("tarflow_queue_depth") == 0
    finally:
        await broker.close()


async def test_a_killed_replica_takes_along_what_only_it_waited_for(cluster: Cluster) -> None:
    api, other, worker = cluster.api(), cluster.api(), cluster.worker(*TOGETHER)
    for each in (api, other):
        await asyncio.to_thread(each.wait_ready)
    [child] = worker.children()
    broker = RedisBroker(cluster.url, LIMITS)
    await broker.start()
    try:
        model = await known(broker)
        async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
            request = asyncio.create_task(client.post("/v1/sample", json=LARGE))
            await begun(other)
            os.kill(child, signal.SIGSTOP)
            detached = detached_job(model, 0)
            job_id = await submitted(broker, detached, terms(0))
            api.process.kill()
            assert isinstance((await asyncio.gather(request, return_exceptions=True))[0], httpx.TransportError)
        # Others notice that it is gone; what was asked for asynchronously waits on.
        async with asyncio.timeout(REPLICA_SECONDS + PATIENCE):
            while True:
                stats = await broker.stats()
                if not any(stats.running.values()) and sum(stats.waiting.values()) == 1:
                    break
                await asyncio.sleep(0.2)
        os.kill(child, signal.SIGCONT)
        await asyncio.to_thread(other.wait_ready)
        await check_ended(broker, {job_id: detached})
        assert other.metric("tarflow_images_total", op="sample") == 0
    finally:
        await broker.close()
