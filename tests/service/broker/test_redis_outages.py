"""Redis goes away and comes back: nothing accepted is lost, and everybody is told in time."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.broker.base import Orders, Terms
from service.broker.redis.api import RedisBroker
from service.broker.redis.worker import RedisWorkerBroker
from service.errors import Unavailable
from service.jobs import Lane, Op
from tests.service.broker.conftest import AMPLE, held, info, job, result
from tests.service.broker.redis_server import RedisServer

pytestmark = pytest.mark.anyio
LONG_ENOUGH = 60.0
LANES = frozenset(Lane)
DETACHED = Terms(caller="a", detached=True)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of the test's own, with an append-only file."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        server = RedisServer(Path(directory), appendonly=True).start()
        yield server
        server.stop()


@pytest.fixture
async def broker(server: RedisServer) -> AsyncIterator[RedisBroker]:
    broker = RedisBroker(server.url, AMPLE)
    await broker.start()
    yield broker
    await broker.close()


@pytest.fixture
def worker(server: RedisServer) -> Iterator[RedisWorkerBroker]:
    worker = RedisWorkerBroker(server.url, "w", AMPLE)
    worker.register(info("w", ["m"]))
    yield worker
    worker.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_nothing_is_lost_when_redis_is_restarted(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker, how: signal.Signals
) -> None:
    ids = [f"job-{number}" for number in range(40)]
    for job_id in ids:
        await broker.submit(job(job_id, Op.SCORE))
    waiting = [asyncio.create_task(broker.wait(job_id, LONG_ENOUGH)) for job_id in ids]
    running = worker.claim(LANES, 10, 0)
    server.stop(how)
    with pytest.raises(Unavailable) as refused:
        await broker.submit(job("refused"))
    assert (refused.value.code, refused.value.retry_after is not None) == ("broker_unreachable", True)
    assert worker.heartbeat(held(*running)) == Orders()
    assert worker.claim(LANES, 10, 0) == []
    await asyncio.sleep(0.5)
    assert not any(task.done() for task in waiting)
    server.start()
    for got in running:
        assert worker.complete(got, result(1.0))

    def work() -> None:
        while sum(task.done() for task in waiting) < len(ids):
            for got in worker.claim(LANES, 10, 0.2):
                assert got.attempt == 1
                assert worker.complete(got, result(2.0))

    await asyncio.wait_for(asyncio.to_thread(work), LONG_ENOUGH)
    values = [done.arrays["value"][0] for done in await asyncio.gather(*waiting)]
    assert values == [1.0] * 10 + [2.0] * 30
    stats = await broker.stats()
    assert (stats.waiting, stats.running, stats.reclaimed) == ({}, {}, 0)


async def test_an_outcome_is_delivered_when_redis_is_back(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker
) -> None:
    await broker.submit(job("a"))
    [got] = worker.claim(LANES, 1, 0)
    waiting = asyncio.create_task(broker.wait("a", LONG_ENOUGH))
    server.stop()
    delivery = asyncio.create_task(asyncio.to_thread(worker.complete, got, result(4.0)))
    await asyncio.sleep(0.5)
    assert not delivery.done()
    server.start()
    assert await delivery
    assert (await waiting).arrays["value"][0] == 4.0


async def test_what_was_given_up_in_an_outage_is_canceled_after_it(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker
) -> None:
    await broker.submit(job("a"))
    [got] = worker.claim(LANES, 1, 0)
    server.stop()
    with pytest.raises(Unavailable):
        await broker.cancel("a")
    server.start()
    async with asyncio.timeout(LONG_ENOUGH):
        while "a" not in (await asyncio.to_thread(worker.heartbeat, held(got))).lost:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_what_ended_while_a_replica_could_not_listen_is_asked_for(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker
) -> None:
    await broker.submit(job("a"))
    waiting = asyncio.create_task(broker.wait("a", LONG_ENOUGH))
    [got] = worker.claim(LANES, 1, 0)
    with server.client() as client:
        # The news is lost with its stream, and the connection that waits for it is cut.
        worker.complete(got, result(4.0))
        keys = [key for key in client.scan_iter() if b":inbox:" in key]
        client.delete(*keys)
        client.client_kill_filter(_type="normal", skipme=True)
    assert (await waiting).arrays["value"][0] == 4.0


async def test_an_outage_does_not_count_against_workers(server: RedisServer) -> None:
    limits = replace(AMPLE, lease_seconds=1.0)
    broker, worker = RedisBroker(server.url, limits), RedisWorkerBroker(server.url, "w", limits)
    worker.register(info("w", ["m"]))
    await broker.submit(job("a"), DETACHED)
    [got] = worker.claim(LANES, 1, 0)
    server.stop()
    await asyncio.sleep(5.5)  # far longer than the lease
    server.start()
    await broker.sweep(every=0)
    assert await asyncio.to_thread(worker.complete, got, result())
    assert (await broker.stats()).reclaimed == 0
    worker.close()
    await broker.close()


async def test_what_a_lost_answer_leased_is_given_back(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker
) -> None:
    await broker.submit(job("known"), DETACHED)
    [known] = worker.claim(LANES, 1, 0)
    await broker.submit(job("a"), DETACHED)
    server.send(signal.SIGSTOP)  # the claim is sent and will be carried out, but its answer comes too late
    try:
        assert await asyncio.to_thread(worker.claim, LANES, 1, 0) == []
    finally:
        server.send(signal.SIGCONT)
    jobs = await asyncio.to_thread(worker.claim, LANES, 1, 10)
    while not jobs:
        jobs = await asyncio.to_thread(worker.claim, LANES, 1, 10)
    assert [(j.id, j.attempt) for j in jobs] == [("a", 1)]
    assert worker.heartbeat(held(known, *jobs)).lost == frozenset()


async def test_a_redis_that_hangs_is_answered_for_in_time(server: RedisServer, broker: RedisBroker) -> None:
    server.send(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(Unavailable) as caught:
            await broker.check("m", 1)
    finally:
        server.send(signal.SIGCONT)
    assert caught.value.code == "broker_unreachable"
    assert time.monotonic() - began < LONG_ENOUGH / 3


async def test_an_unknown_script_is_sent_again(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker
) -> None:
    with server.client() as client:
        client.script_flush()
        await broker.submit(job("a"), DETACHED)
        client.script_flush()
        assert len(worker.claim(LANES, 1, 0)) == 1


async def test_a_full_memory_refuses_new_work_and_finishes_the_old(
    server: RedisServer, broker: RedisBroker, worker: RedisWorkerBroker
) -> None:
    for name in "abc":
        await broker.submit(job(name), DETACHED)
    [first] = worker.claim(LANES, 1, 0)
    with server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(Unavailable) as caught:
            await broker.submit(job("d"), DETACHED)
        assert caught.value.code == "broker_full"
        assert worker.heartbeat(held(first)).lost == frozenset()
        worker.register(info("w", ["m"]))
        assert worker.complete(first, result())
        assert await broker.result("a") is not None
        [second] = worker.claim(LANES, 1, 0)
        worker.release(second)
        assert await broker.cancel("c")
        await broker.sweep(every=0)
        client.config_set("maxmemory", 0)
    await broker.submit(job("d"), DETACHED)
    assert [j.id for j in worker.claim(LANES, 8, 0)] == ["b", "d"]


async def test_one_line_is_logged_of_an_outage(
    server: RedisServer, worker: RedisWorkerBroker, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            worker.heartbeat([])
            worker.claim(LANES, 1, 0.3)
        assert len(caplog.records) == 1
        server.start()
        await asyncio.sleep(0.3)
        worker.heartbeat([])
        assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_an_api_process_starts_without_redis(server: RedisServer) -> None:
    server.stop()
    broker = RedisBroker(server.url, AMPLE)
    await broker.start()
    with pytest.raises(Unavailable):
        await broker.models()
    worker = RedisWorkerBroker(server.url, "w", AMPLE)
    thread = threading.Thread(target=worker.register, args=(info("w", ["m"]),))
    thread.start()
    await asyncio.sleep(0.3)
    server.start()
    await asyncio.to_thread(thread.join, LONG_ENOUGH)
    assert [model.name for model in await broker.models()] == ["m"]
    worker.close()
    await broker.close()


async def test_a_dangerous_configuration_is_told_at_the_start(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
    broker = RedisBroker(server.url, AMPLE)
    with caplog.at_level(logging.WARNING):
        await broker.start()
    await broker.close()
    assert [("maxmemory-policy" in r.message, "appendonly" in r.message) for r in caplog.records] == [
        *((True, False), (False, True)),
    ]
