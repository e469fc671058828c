"""Mixed jobs over two replicas and two hosts of workers, while workers die and stop: none is lost, none comes twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from service.jobs import JobState
from tests.faults.cluster import LEASE_SECONDS, Cluster
from tests.faults.storm import Storm, check_ended, victim
from tests.service.processes import PATIENCE, ApiProcess, WorkerProcess

pytestmark = pytest.mark.anyio

REFUSALS = {(503, "no_worker"), (503, "worker_lost")}
SIZES = [
    pytest.param(150, 4, id="short"),
    pytest.param(1000, 40, id="long", marks=pytest.mark.long),
]
STOPPED_SECONDS = 1.5 * LEASE_SECONDS
START_SECONDS = 30.0
"""In which a worker that was killed is there again, on a slow machine: it lives until the next second."""


def started(cluster: Cluster) -> tuple[list[ApiProcess], list[WorkerProcess]]:
    """Two replicas, and two hosts with a worker each, ready."""
    apis, workers = [cluster.api(), cluster.api()], [cluster.worker(), cluster.worker()]
    for api in apis:
        api.wait_ready(workers=2)
    return apis, workers


async def whole_again(storm: Storm, apis: list[ApiProcess], workers: list[WorkerProcess]) -> None:
    """All that was asked for has ended, nothing is left in the queue, and all processes leave in order."""
    ended = await check_ended(storm.broker, storm.detached)
    print(f"answers {dict(storm.told)}, detached {dict(ended.states)}, {ended.requeued} more attempts")
    assert ended.states[JobState.COMPLETED] >= 0.9 * len(storm.detached)
    for api in apis:
        await asyncio.to_thread(api.wait_ready, 2)
    assert apis[0].metric("tarflow_jobs_running") == apis[0].metric("tarflow_queue_depth") == 0
    for process in (*apis, *workers):
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


@pytest.mark.parametrize(("jobs", "kills"), SIZES)
async def test_every_job_ends_once_while_workers_are_killed(cluster: Cluster, jobs: int, kills: int) -> None:
    """Every second a worker that is ready is killed at random, with whatever it has in its hands."""
    apis, workers = started(cluster)
    chance = random.Random(5)
    patience = PATIENCE + kills * START_SECONDS
    async with Storm(cluster, apis, REFUSALS, patience) as storm, asyncio.TaskGroup() as group:
        storming = group.create_task(storm.run(jobs))
        for _ in range(kills):
            await asyncio.sleep(1)
            os.kill(await victim(apis[0], workers, chance), signal.SIGKILL)
        storm.over.set()
        await storming
        await whole_again(storm, apis, workers)
    assert sum(worker.log.count("was killed by signal 9") for worker in workers) == kills


@pytest.mark.parametrize(("jobs", "stops"), SIZES)
async def test_every_job_ends_once_while_workers_are_stopped(cluster: Cluster, jobs: int, stops: int) -> None:
    """For longer than the lease: others do the work, and a worker that goes on with it lets go of it by its next
    heartbeat, or is refused if it brings a result before."""
    apis, workers = started(cluster)
    chance, count = random.Random(7), 0

    def refused() -> int:
        return sum(worker.log.count("was not wanted any more") for worker in workers)

    def let_go() -> float:
        return apis[0].metric("tarflow_dropped_rows_total")

    async def was_late() -> bool:
        return bool(refused() or await asyncio.to_thread(let_go))

    async with Storm(cluster, apis, REFUSALS) as storm, asyncio.TaskGroup() as group:
        storming = group.create_task(storm.run(jobs))
        async with asyncio.timeout(PATIENCE + stops * 2 * STOPPED_SECONDS):
            while count < stops or not await was_late():
                await asyncio.sleep(chance.random())
                pid = await victim(apis[0], workers, chance)
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(STOPPED_SECONDS)
                os.kill(pid, signal.SIGCONT)
                count += 1
        storm.over.set()
        await storming
        assert (await storm.broker.stats()).reclaimed > 0
        print(f"{refused()} late results were refused, {let_go():.0f} late rows let go of, {count} stops")
        await whole_again(storm, apis, workers)
    assert not any("a new one starts" in worker.log for worker in workers)
