"""What every broker promises, whichever way workers reach it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from service.broker.base import Command
from service.errors import Canceled, InternalError, Overloaded, TimedOut, Unavailable, WorkerLost
from service.jobs import LONG, URGENT, Lane, Op
from tests.service.broker.conftest import Bench, held, info, job, model, result

pytestmark = pytest.mark.anyio
LONG_ENOUGH = 60.0


async def test_a_result_reaches_the_one_who_waits(bench: Bench) -> None:
    worker, sent = await bench.worker(), job("a", rows=3)
    await bench.broker.submit(sent)
    [got] = await worker.claim()
    assert (got.id, got.op, got.model, got.rows, got.cost, got.attempt) == ("a", Op.SAMPLE, "m", 3, 1, 1)
    assert got.payload["seeds"] == [0, 1, 2]
    np.testing.assert_array_equal(got.payload["array"], sent.payload["array"])
    assert await worker.complete(got, result(7.0))
    answer = await bench.broker.wait("a", LONG_ENOUGH)
    assert answer.arrays["value"][0] == 7.0
    assert answer.inference_seconds == 0.5
    assert answer.queue_seconds >= 0


async def test_a_failure_reaches_the_one_who_waits(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"))
    [got] = await worker.claim()
    assert await worker.fail(got, InternalError("too bad", code="bad", param="p"))
    with pytest.raises(InternalError, match="too bad") as caught:
        await bench.broker.wait("a", LONG_ENOUGH)
    assert (caught.value.code, caught.value.param) == ("bad", "p")


async def test_there_is_one_result(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"))
    [got] = await worker.claim()
    assert await worker.complete(got, result(1.0))
    assert not await worker.complete(got, result(2.0))
    assert not await worker.fail(got, InternalError("late"))
    assert (await bench.broker.wait("a", LONG_ENOUGH)).arrays["value"][0] == 1.0


async def test_results_of_a_batch_arrive_together(bench: Bench) -> None:
    worker = await bench.worker()
    for name in "abc":
        await bench.broker.submit(job(name))
    claimed = await worker.claim()
    await bench.broker.cancel("b")
    results = [(got, result(number)) for number, got in enumerate(claimed)]
    assert await worker.complete_all(results) == [True, False, True]
    assert (await bench.broker.wait("a", LONG_ENOUGH)).arrays["value"][0] == 0
    assert (await bench.broker.wait("c", LONG_ENOUGH)).arrays["value"][0] == 2
    with pytest.raises(Canceled):
        await bench.broker.wait("b", LONG_ENOUGH)
    assert await worker.complete_all([]) == []


async def test_jobs_are_claimed_in_their_order(bench: Bench) -> None:
    worker = await bench.worker()
    for name in "abc":
        await bench.broker.submit(job(name))
    assert [j.id for j in await worker.claim()] == ["a", "b", "c"]
    assert await worker.claim() == []


async def test_a_claim_asks_for_lanes_and_urgent_work_goes_first(bench: Bench) -> None:
    worker = await bench.worker()
    for op in [*LONG, *URGENT]:
        await bench.broker.submit(job(str(op), op))
    [long] = await worker.claim({Lane.LONG}, max_rows=1)
    assert long.op in LONG
    assert {j.op for j in await worker.claim()} == URGENT
    assert {j.op for j in await worker.claim()} == LONG - {long.op}
    assert await worker.claim() == []


async def test_a_worker_gets_jobs_of_its_models_only(bench: Bench) -> None:
    first, second = await bench.worker("w1", ["m"]), await bench.worker("w2", ["m", "n"])
    await bench.broker.submit(job("a", model="n"))
    await bench.broker.submit(job("b", model="m"))
    assert [j.id for j in await first.claim()] == ["b"]
    assert [j.id for j in await second.claim()] == ["a"]


async def test_a_claim_is_bounded_but_never_starves_a_large_job(bench: Bench) -> None:
    worker = await bench.worker()
    for name, rows in (("a", 2), ("b", 2), ("c", 9), ("d", 1)):
        await bench.broker.submit(job(name, rows=rows))
    assert [j.id for j in await worker.claim(max_rows=4)] == ["a", "b"]
    assert [j.id for j in await worker.claim(max_rows=4)] == ["c"]
    assert [j.id for j in await worker.claim(max_rows=4)] == ["d"]


async def test_a_waiting_claim_wakes_up(bench: Bench) -> None:
    worker = await bench.worker()
    claim = asyncio.create_task(worker.claim({Lane.URGENT}, timeout=LONG_ENOUGH))
    await asyncio.sleep(0.05)
    await bench.broker.submit(job("other", Op.SAMPLE))
    await asyncio.sleep(0.05)
    assert not claim.done()
    await bench.broker.submit(job("a", Op.SCORE))
    async with asyncio.timeout(LONG_ENOUGH / 2):
        assert [j.id for j in await claim] == ["a"]


async def test_two_waiting_claims_share_the_work(bench: Bench) -> None:
    workers = [await bench.worker("w1"), await bench.worker("w2")]
    claims = [asyncio.create_task(w.claim(max_rows=1, timeout=LONG_ENOUGH)) for w in workers]
    await asyncio.sleep(0.05)
    await bench.broker.submit(job("a"))
    await bench.broker.submit(job("b"))
    async with asyncio.timeout(LONG_ENOUGH / 2):
        got = [j.id for jobs in await asyncio.gather(*claims) for j in jobs]
    assert sorted(got) == ["a", "b"]


async def test_a_heartbeat_tells_what_is_lost(bench: Bench) -> None:
    worker, other = await bench.worker("w1"), await bench.worker("w2")
    for name in "abc":
        await bench.broker.submit(job(name))
    a, b = await worker.claim(max_rows=2)
    [c] = await other.claim()
    await bench.broker.cancel("b")
    said = held(a, b, c, job("unknown"))
    assert (await worker.heartbeat(said)).lost == {"b", "c", "unknown"}


async def test_a_canceled_job_that_waits_is_not_claimed(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a", cost=5))
    await bench.broker.submit(job("b", cost=7))
    await bench.broker.cancel("a")
    assert (await bench.broker.stats()).waiting_cost == 7
    assert [j.id for j in await worker.claim()] == ["b"]
    with pytest.raises(Canceled):
        await bench.broker.wait("a", LONG_ENOUGH)


async def test_the_result_of_a_canceled_job_is_refused(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"))
    [got] = await worker.claim()
    await bench.broker.cancel("a")
    await bench.broker.cancel("a")
    await bench.broker.cancel("unknown")
    assert not await worker.complete(got, result())
    with pytest.raises(Canceled):
        await bench.broker.wait("a", LONG_ENOUGH)


async def test_an_expired_lease_fences_its_holder(bench: Bench) -> None:
    broker = await bench.open(lease_seconds=0.05)
    slow, quick = await bench.worker("slow"), await bench.worker("quick")
    await broker.submit(job("a"))
    [stale] = await slow.claim()
    await asyncio.sleep(0.1)
    await bench.sweep()
    assert (await slow.heartbeat(held(stale))).lost == {"a"}
    [fresh] = await quick.claim()
    assert (stale.attempt, fresh.attempt) == (1, 2)
    assert not await slow.complete(stale, result(1.0))
    assert await quick.complete(fresh, result(2.0))
    assert (await broker.wait("a", LONG_ENOUGH)).arrays["value"][0] == 2.0


async def test_the_attempt_fences_a_worker_that_has_the_job_again(bench: Bench) -> None:
    broker = await bench.open(lease_seconds=0.05)
    worker = await bench.worker()
    await broker.submit(job("a"))
    [stale] = await worker.claim()
    await asyncio.sleep(0.1)
    await bench.sweep()
    [fresh] = await worker.claim()
    assert (await worker.heartbeat(held(stale))).lost == {"a"}
    assert not await worker.complete(stale, result(1.0))
    assert await worker.complete(fresh, result(2.0))


async def test_heartbeats_keep_a_lease(bench: Bench) -> None:
    broker = await bench.open(lease_seconds=0.5)
    worker = await bench.worker()
    await broker.submit(job("a"))
    await broker.submit(job("b"))
    a, _ = await worker.claim()
    await asyncio.sleep(0.6)
    await worker.heartbeat(held(a))
    await bench.sweep()
    assert (await broker.stats()).reclaimed == 1
    assert [j.id for j in await worker.claim()] == ["b"]


async def test_what_a_lost_worker_had_comes_first_and_in_order(bench: Bench) -> None:
    worker = await bench.worker("w1")
    for name in "abcd":
        await bench.broker.submit(job(name))
    await worker.claim(max_rows=3)
    await worker.leave()
    other = await bench.worker("w2")
    # Each alone: one of them may be what the worker died of, and must not take the others along.
    for expected in (("a", 2), ("b", 2), ("c", 2), ("d", 1)):
        assert [(j.id, j.attempt) for j in await other.claim()] == [expected]


async def test_a_job_that_loses_its_workers_fails(bench: Bench) -> None:
    broker = await bench.open(max_attempts=2)
    await bench.worker("other", ["m"])
    first = await bench.worker("w1")
    await broker.submit(job("a"))
    await first.claim()
    await first.leave()
    second = await bench.worker("w2")
    [got] = await second.claim()
    assert got.attempt == 2
    await second.leave()
    with pytest.raises(WorkerLost, match="2 workers"):
        await broker.wait("a", LONG_ENOUGH)
    stats = await broker.stats()
    assert (sum(stats.waiting.values()), sum(stats.running.values()), stats.reclaimed, stats.dead) == (0, 0, 2, 1)


async def test_a_released_job_counts_no_attempt(bench: Bench) -> None:
    worker = await bench.worker()
    for name in "abc":
        await bench.broker.submit(job(name))
    first, second = await worker.claim(max_rows=2)
    await worker.release(first)
    await worker.release(second)
    assert not await worker.complete(first, result())
    assert [(j.id, j.attempt) for j in await worker.claim()] == [("a", 1), ("b", 1), ("c", 1)]


async def test_the_door_is_shut_when_too_much_waits(bench: Bench) -> None:
    broker = await bench.open(max_queue_cost=10)
    worker = await bench.worker()
    await broker.submit(job("large", cost=50))  # alone it is let in, or it never could be
    with pytest.raises(Overloaded, match="queue is full") as caught:
        await broker.submit(job("b", cost=1))
    assert caught.value.retry_after is not None
    await worker.claim()
    await broker.submit(job("c", cost=6))
    await broker.submit(job("d", cost=4))
    with pytest.raises(Overloaded):
        await broker.submit(job("e", cost=1))
    assert (await broker.stats()).waiting_cost == 10


async def test_without_a_live_worker_nothing_is_accepted(bench: Bench) -> None:
    broker = await bench.open(ready_seconds=0.3)
    with pytest.raises(Unavailable, match="no worker"):
        await broker.submit(job("a"))
    worker = await bench.worker("w1", ["other"])
    with pytest.raises(Unavailable, match="no worker"):
        await broker.submit(job("a"))
    await bench.worker("w2", ["m"])
    await asyncio.sleep(0.4)
    with pytest.raises(Unavailable):
        await broker.submit(job("a"))
    await worker.heartbeat()
    await broker.submit(job("a", model="other"))


async def test_waiting_ends_and_cancels(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"))
    await bench.broker.submit(job("b"))
    claimed = await worker.claim(max_rows=1)
    for name in "ab":
        with pytest.raises(TimedOut, match="canceled"):
            await bench.broker.wait(name, 0.05)
    assert (await worker.heartbeat(held(*claimed))).lost == {"a"}
    assert await worker.claim() == []


async def test_stats_count_by_op(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a", Op.SCORE, cost=2))
    await bench.broker.submit(job("b", Op.SAMPLE, cost=3))
    await bench.broker.submit(job("c", Op.SAMPLE, cost=4))
    await worker.claim({Lane.URGENT})
    stats = await bench.broker.stats()
    assert (dict(stats.waiting), dict(stats.running), stats.waiting_cost) == ({Op.SAMPLE: 2}, {Op.SCORE: 1}, 7)
    assert stats.oldest_wait_seconds >= 0


async def test_workers_and_models_are_known(bench: Bench) -> None:
    worker = await bench.worker("w1", ["m", "b"])
    figures = [{"name": "n", "type": "gauge", "documentation": "", "samples": [["n", {}, 1.0]]}]
    await worker.heartbeat(figures=figures)
    await worker.heartbeat()
    [status] = await bench.broker.workers()
    assert (status.info.id, status.info.device, list(status.measurements)) == ("w1", "cpu", figures)
    assert status.heartbeat_age >= 0
    assert await bench.broker.models() == [model("b"), model("m")]
    await worker.leave()
    assert await bench.broker.workers() == []
    assert [m.name for m in await bench.broker.models()] == ["b", "m"]


async def test_a_worker_may_change_its_models(bench: Bench) -> None:
    worker, other = await bench.worker("w1", ["m", "b"]), await bench.worker("w2", ["b"])
    await bench.broker.submit(job("waits", model="b"))
    await worker.register(info("w1", ["m", "c"]))
    assert [m.name for m in await bench.broker.models()] == ["b", "c", "m"]
    await other.register(info("w2", ["c"]))
    assert [m.name for m in await bench.broker.models()] == ["c", "m"]
    assert await other.claim() == []
    with pytest.raises(Unavailable, match="no worker"):
        await bench.broker.submit(job("b", model="b"))
    await other.register(info("w2", ["b", "c"]))
    assert [j.id for j in await other.claim()] == ["waits"]


async def test_a_worker_tells_how_its_models_stand(bench: Bench) -> None:
    worker = await bench.worker("w1", ["m"])
    states = {"m": "ready", "n": "failed: too large"}
    await worker.register(replace(info("w1", ["m"]), states=states, loads={"n": 2}))
    [status] = await bench.broker.workers()
    assert dict(status.info.states) == states
    assert dict(status.info.loads) == {"n": 2}


async def test_commands_reach_every_worker_once(bench: Bench) -> None:
    first, second = await bench.worker("w1"), await bench.worker("w2")
    load, unload = Command(action="load", model="n"), Command(action="unload", model="m")
    assert await bench.broker.command(load) == 2
    assert await bench.broker.command(unload) == 2
    for worker in (first, second):
        assert (await worker.heartbeat()).commands == (load, unload)
        assert (await worker.heartbeat()).commands == ()
