"""What the Redis broker promises beyond the contract: atomicity, several replicas, nothing that stays for ever."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from unittest.mock import AsyncMock

import numpy as np
import pytest

from service.broker.base import BrokerGone, Command, Ending, Limits, Terms
from service.broker.redis.api import RedisBroker
from service.broker.redis.keys import name_of
from service.broker.redis.records import stats_of
from service.broker.redis.worker import RedisWorkerBroker
from service.errors import Canceled, InternalError, Overloaded, TimedOut, Unavailable, WorkerLost
from service.jobs import JobResult, JobState, Lane, Op, WorkerInfo
from tests.service.broker.conftest import AMPLE, held, info, job, result
from tests.service.broker.redis_server import RedisServer

pytestmark = pytest.mark.anyio
LONG_ENOUGH = 60.0
LANES = frozenset(Lane)
DETACHED = Terms(caller="a", detached=True)

Replica = Callable[..., RedisBroker]
NewWorker = Callable[..., RedisWorkerBroker]


@pytest.fixture
async def replica(redis_server: RedisServer) -> AsyncIterator[Replica]:
    """Makes API processes' faces."""
    async with AsyncExitStack() as stack:

        def new(limits: Limits = AMPLE, **options: float) -> RedisBroker:
            broker = RedisBroker(redis_server.url, limits, **options)  # type: ignore[arg-type]
            stack.push_async_callback(broker.close)
            return broker

        yield new


@pytest.fixture
async def new_worker(redis_server: RedisServer) -> AsyncIterator[NewWorker]:
    """Makes registered workers."""
    async with AsyncExitStack() as stack:

        def new(worker_id: str = "w", limits: Limits = AMPLE) -> RedisWorkerBroker:
            worker = RedisWorkerBroker(redis_server.url, worker_id, limits)
            stack.callback(worker.close)
            worker.register(info(worker_id, ["m"]))
            return worker

        yield new


async def until(condition: Callable[[], object]) -> None:
    """Polls until it is so."""
    async with asyncio.timeout(LONG_ENOUGH):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_no_job_goes_to_two_claimers(replica: Replica, new_worker: NewWorker) -> None:
    broker, workers = replica(), [new_worker(f"w{number}") for number in range(4)]
    await broker.start()
    ids = [f"job-{number}" for number in range(200)]
    claimed: Counter[str] = Counter()
    done = threading.Event()

    def work(worker: RedisWorkerBroker) -> None:
        while not done.is_set():
            for got in worker.claim(LANES, 3, 0.1):
                claimed[got.id] += 1
                worker.complete(got, result())

    loops = [asyncio.create_task(asyncio.to_thread(work, worker)) for worker in workers]
    try:
        for job_id in ids:
            await broker.submit(job(job_id, Op.SCORE))
        await asyncio.gather(*(broker.wait(job_id, LONG_ENOUGH) for job_id in ids))
    finally:
        done.set()
        await asyncio.gather(*loops)
    assert claimed == Counter(ids)
    stats = await broker.stats()
    assert (stats.waiting, stats.running, stats.waiting_cost, stats.reclaimed) == ({}, {}, 0, 0)


async def test_many_wait_over_few_connections(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, worker = replica(), new_worker()
    await broker.start()
    ids = [f"job-{number}" for number in range(64)]
    for job_id in ids:
        await broker.submit(job(job_id))
    waiting = [asyncio.create_task(broker.wait(job_id, LONG_ENOUGH)) for job_id in ids]
    await asyncio.sleep(0.1)
    with redis_server.client() as client:
        assert len(client.client_list()) < 8
    for got in worker.claim(LANES, 64, 0):
        worker.complete(got, result(float(got.id.removeprefix("job-"))))
    values = [done.arrays["value"][0] for done in await asyncio.gather(*waiting)]
    assert values == list(range(64))


async def test_large_results_arrive_whole(replica: Replica, new_worker: NewWorker) -> None:
    broker, worker = replica(), new_worker()
    await broker.start()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 500, 500), np.uint8)
    await broker.submit(replace(job("a"), payload={"pixels": pixels}))
    [got] = worker.claim(LANES, 1, 0)
    np.testing.assert_array_equal(got.payload["pixels"], pixels)
    worker.complete(got, JobResult(arrays={"pixels": pixels}, inference_seconds=1.0, plan=("a", "b")))
    answer = await broker.wait("a", LONG_ENOUGH)
    np.testing.assert_array_equal(answer.arrays["pixels"], pixels)


async def test_a_job_that_two_replicas_wait_for_answers_both(replica: Replica, new_worker: NewWorker) -> None:
    first, second, worker = replica(), replica(), new_worker()
    await first.start()
    await second.start()
    terms = Terms(idempotency_key="k")
    await first.submit(job("a"), terms)
    assert (await second.submit(job("b"), terms)).job_id == "a"
    await first.close()  # the other still waits, so the job stays
    [got] = worker.claim(LANES, 1, 0)
    worker.complete(got, result(3.0))
    assert (await second.wait("a", LONG_ENOUGH)).arrays["value"][0] == 3.0


async def test_another_replica_can_wait_for_a_detached_job(replica: Replica, new_worker: NewWorker) -> None:
    first, second, worker = replica(), replica(), new_worker()
    await second.start()
    await first.submit(job("a"), DETACHED)
    await first.close()
    waiting = asyncio.create_task(second.wait("a", LONG_ENOUGH))
    await asyncio.sleep(0.05)
    [got] = worker.claim(LANES, 1, 0)
    worker.complete(got, result(3.0))
    assert (await waiting).arrays["value"][0] == 3.0


async def test_who_sweeps_cancels_the_jobs_of_a_dead_replica(replica: Replica, new_worker: NewWorker) -> None:
    dead, alive, worker = replica(replica_seconds=0.3), replica(replica_seconds=0.3), new_worker()
    await dead.sweep(every=0)  # it was heard once, and never again
    await dead.submit(job("attached"))
    await dead.submit(job("detached"), DETACHED)
    [got] = worker.claim(LANES, 1, 0)
    await alive.start()
    await asyncio.sleep(0.4)
    await alive.sweep(every=0)
    assert worker.heartbeat(held(got)).lost == {"attached"}
    assert (await alive.status("attached")).state is JobState.CANCELED
    assert [j.id for j in worker.claim(LANES, 8, 0)] == ["detached"]


async def test_workers_sweep_too(replica: Replica, new_worker: NewWorker) -> None:
    limits = replace(AMPLE, lease_seconds=0.2)
    broker, dead, alive = replica(limits), new_worker("dead", limits), new_worker("alive", limits)
    await broker.submit(job("a"), DETACHED)
    [lost] = dead.claim(LANES, 1, 0)
    got = await asyncio.to_thread(alive.claim, LANES, 1, LONG_ENOUGH)
    assert [(j.id, j.attempt) for j in got] == [("a", 2)]
    assert not dead.complete(lost, result())


async def test_a_worker_that_begins_anew_has_nothing(replica: Replica, new_worker: NewWorker) -> None:
    broker, before = replica(), new_worker("w")
    await broker.submit(job("a"), DETACHED)
    [old] = before.claim(LANES, 1, 0)
    after = new_worker("w")
    assert not before.complete(old, result())
    assert [(j.id, j.attempt) for j in after.claim(LANES, 1, 0)] == [("a", 2)]
    for ask in (lambda: before.claim(LANES, 1, 0), lambda: before.heartbeat([])):
        with pytest.raises(BrokerGone):
            ask()


async def test_a_forgotten_worker_registers_again(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, worker = replica(), new_worker()
    with redis_server.client() as client:
        client.flushall()
    worker.heartbeat([])
    assert [status.info.id for status in await broker.workers()] == ["w"]
    with redis_server.client() as client:
        client.flushall()
    worker.claim(LANES, 1, 0)
    await broker.submit(job("a"), DETACHED)
    assert [j.id for j in worker.claim(LANES, 1, 0)] == ["a"]


async def test_what_lost_too_many_workers_leaves_a_letter(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker = replica(replace(AMPLE, max_attempts=1))
    worker = new_worker("w", replace(AMPLE, max_attempts=1))
    await broker.submit(job("a", rows=3), DETACHED)
    worker.claim(LANES, 3, 0)
    worker.close()
    with pytest.raises(WorkerLost):
        await broker.result("a")
    with redis_server.client() as client:
        [letter] = [json.loads(data) for data in client.lrange("{tarflow}:dead", 0, -1)]
        assert (letter["id"], letter["op"], letter["rows"], letter["reason"]) == (
            *("a", "sample", "3", "its worker was lost"),
        )


async def test_everything_that_is_not_pending_has_an_end(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, worker = replica(), new_worker()
    other = new_worker("w2")
    await broker.start()

    def lasting() -> set[str]:
        with redis_server.client() as client:
            return {key.decode() for key in client.scan_iter() if client.pttl(key) < 0}

    assert lasting() == set()
    for number, op in enumerate([*Op, *Op]):
        detached = Terms(caller=f"c{number % 3}", detached=True, idempotency_key=f"k{number}", fingerprint="f")
        await broker.submit(job(f"d{number}", op), detached)
        await broker.submit(job(f"s{number}", op))
    with redis_server.client() as client:
        for number in range(12):
            assert client.pttl(f"{{tarflow}}:job:d{number}") == -1
    await broker.command(Command(action="load", model="x"))
    await broker.cancel("d0")
    await broker.cancel("s0")
    released, done = worker.claim({Lane.LONG}, 2, 0)
    worker.release(released)
    worker.complete(done, result())
    other.claim({Lane.LONG}, 1, 0)
    other.close()
    assert lasting() != set()
    while jobs := worker.claim(LANES, 64, 0):
        worker.heartbeat(held(*jobs, block=2))
        for got in jobs:
            worker.publish(got, "preview", {"a": 1})
            worker.complete(got, result())
    assert (await broker.stats()).waiting_cost == 0
    assert lasting() == set()
    # And what is put into a rested queue lasts again.
    await broker.submit(job("again"), DETACHED)
    assert "{tarflow}:state" in lasting()


async def test_what_was_answered_goes_at_once(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, worker = replica(), new_worker()
    await broker.start()
    await broker.submit(job("a"), Terms(idempotency_key="k"))
    [got] = worker.claim(LANES, 1, 0)
    worker.complete(got, result())
    await broker.wait("a", LONG_ENOUGH)
    await broker.sweep(every=0)
    with redis_server.client() as client:
        assert not [key for key in client.scan_iter() if b":job:" in key or b":idempotency:" in key]


async def test_the_list_of_a_callers_jobs_loses_what_is_forgotten(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, _ = replica(), new_worker()
    name = f"{{tarflow}}:jobs:{name_of('a')}"
    with redis_server.client() as client:
        # Far more than are looked at in one go, around those that are there.
        await broker.submit(job("oldest"), DETACHED)
        client.zadd(name, {f"gone-{number}": 1.5 + number / 10_000 for number in range(3000)})
        await broker.submit(job("newest"), DETACHED)
        assert [status.id for status in await broker.jobs("a", limit=3)] == ["newest", "oldest"]
        assert client.zrange(name, 0, -1) == [b"oldest", b"newest"]


async def test_the_list_of_a_callers_jobs_stays_short_if_nobody_looks(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, _ = replica(), new_worker()
    name = f"{{tarflow}}:jobs:{name_of('a')}"
    with redis_server.client() as client:
        # The two oldest live, and everything behind them is gone soon.
        for number in range(302):
            await broker.submit(job(f"{number}"), replace(DETACHED, keep_seconds=0))
            if number > 1:
                await broker.cancel(f"{number}")
        assert client.zrange(name, 0, 1) == [b"0", b"1"]
        assert client.zcard(name) < 60


async def test_a_job_ends_and_is_counted_whatever_its_error_says(replica: Replica, new_worker: NewWorker) -> None:
    broker, worker = replica(), new_worker()
    await broker.start()
    await broker.submit(job("a"), DETACHED)
    [got] = worker.claim(LANES, 1, 0)
    # Python writes and reads half a surrogate pair as JSON, the scripts' library refuses it.
    assert worker.fail(got, InternalError("a text with \udcff in it"))
    with pytest.raises(InternalError):
        await broker.wait("a", 5.0)
    assert (await broker.stats()).ended == {Ending("m", Op.SAMPLE, "error"): 1}


def test_what_a_later_version_counts_is_passed_over() -> None:
    counters = [b"ended:paint:completed:m", b"1", b"ended:sample:completed:m", b"2"]
    assert stats_of([counters, 0, 0]).ended == {Ending("m", Op.SAMPLE, "ok"): 2}


async def test_prefixes_are_apart(redis_server: RedisServer, replica: Replica, new_worker: NewWorker) -> None:
    worker = new_worker()
    await replica().submit(job("a"), DETACHED)
    other = RedisBroker(redis_server.url, AMPLE, prefix="other")
    assert await other.models() == []
    assert (await other.stats()).waiting_cost == 0
    await other.close()
    with redis_server.client() as client:
        assert all(key.startswith(b"{tarflow}:") for key in client.scan_iter())
    assert len(worker.claim(LANES, 1, 0)) == 1


async def test_a_refusal_says_when_work_done_will_have_made_room(replica: Replica, new_worker: NewWorker) -> None:
    broker, worker = replica(replace(AMPLE, max_queue_cost=100)), new_worker()
    await broker.submit(job("first", cost=100), DETACHED)
    with pytest.raises(Overloaded) as unknown_rate:
        await broker.check("m", 10)
    assert unknown_rate.value.retry_after == 2.0
    [got] = worker.claim(LANES, 1, 0)
    worker.complete(got, result())  # 100 units in the last half minute
    await broker.submit(job("second", cost=100), DETACHED)
    with pytest.raises(Overloaded) as known_rate:
        await broker.check("m", 40)
    assert known_rate.value.retry_after == pytest.approx(12, rel=0.2)


async def test_waiters_of_a_process_that_stops_are_told(replica: Replica, new_worker: NewWorker) -> None:
    broker, other, worker = replica(), replica(), new_worker()
    await broker.start()
    await broker.submit(job("a"))
    [got] = worker.claim(LANES, 1, 0)
    await broker.close()
    assert worker.heartbeat(held(got)).lost == {"a"}
    with pytest.raises(Canceled):
        await other.result("a")


async def test_a_repetition_that_could_not_be_told_waits_for_nothing(
    replica: Replica, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, worker, terms = replica(), new_worker(), Terms(caller="a", idempotency_key="k")
    await broker.start()
    await broker.submit(job("a"), terms)
    with monkeypatch.context() as patch:
        patch.setattr(broker._calls, "fields", AsyncMock(side_effect=Unavailable("away")))
        with pytest.raises(Unavailable):
            await broker.submit(job("b"), terms)
    [got] = worker.claim(LANES, 1, 0)
    worker.complete(got, result())
    await broker.wait("a", LONG_ENOUGH)
    assert broker.idle


async def test_who_waits_for_an_end_that_redis_forgot_waits_on(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, worker = replica(), new_worker()
    await broker.submit(job("a"))
    [got] = worker.claim(LANES, 1, 0)
    large = JobResult(arrays={"value": np.zeros(10_000)}, inference_seconds=0.5)
    worker.complete(got, large)
    with redis_server.client() as client:  # as a restart does that loses the last second
        client.hset("{tarflow}:job:a", "state", "running")
        client.hdel("{tarflow}:job:a", "result")
    await broker.start()
    waiting = asyncio.create_task(broker.wait("a", 0.5))
    await asyncio.wait({waiting}, timeout=LONG_ENOUGH / 10)
    assert waiting.done()
    assert isinstance(waiting.exception(), TimedOut)


async def test_results_arrive_however_many_follow_events(
    redis_server: RedisServer, replica: Replica, new_worker: NewWorker
) -> None:
    broker, worker = replica(), new_worker()
    await broker.submit(job("followed"), DETACHED)

    async def follow() -> str:
        return [event.kind async for event in broker.events("followed")][-1]

    following = [asyncio.create_task(follow()) for _ in range(120)]
    await broker.start()
    with redis_server.client() as client:
        await until(lambda: client.info("clients")["blocked_clients"] > len(following))
    await broker.submit(job("a"))
    for got in worker.claim(LANES, 2, 0):
        worker.complete(got, result())
    await broker.wait("a", 4.0)  # before anybody asks again by itself
    assert set(await asyncio.gather(*following)) == {"completed"}


async def test_a_worker_that_waits_to_register_says_so() -> None:
    """It may have loaded another model while Redis is away; the watchdog must not take it for stuck."""
    heard: list[int] = []

    def waiting() -> None:
        heard.append(1)
        if len(heard) == 3:
            worker.close()

    # Nobody listens there.
    worker = RedisWorkerBroker("redis://127.0.0.1:1/0", "w", AMPLE, waiting=waiting)
    await asyncio.to_thread(worker.register, WorkerInfo(id="w", device="cpu", models=()))
    assert len(heard) == 3
