"""What every broker promises callers: shares, priorities, time limits, repetitions that are recognized."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from service.broker.base import Terms
from service.errors import Canceled, InternalError, InvalidRequest, Overloaded, TimedOut
from service.jobs import Job, JobState, Op, Priority
from tests.service.broker.conftest import Bench, Worker, held, job, result

pytestmark = pytest.mark.anyio
LONG_ENOUGH = 60.0


async def one_by_one(worker: Worker, count: int) -> list[Job]:
    """Claims of one image each."""
    return [claimed for _ in range(count) for claimed in await worker.claim(max_rows=1)]


async def test_a_small_caller_need_not_wait_for_a_large_one(bench: Bench) -> None:
    worker = await bench.worker()
    for number in range(20):
        await bench.broker.submit(job(f"large-{number}", cost=10), Terms(caller="large"))
    await one_by_one(worker, 5)
    await bench.broker.submit(job("small", cost=10), Terms(caller="small"))
    assert "small" in [j.id for j in await one_by_one(worker, 2)]


async def test_callers_share_by_cost(bench: Bench) -> None:
    worker = await bench.worker()
    for number in range(30):
        await bench.broker.submit(job(f"many-{number}", cost=1), Terms(caller="many"))
        if number < 3:
            await bench.broker.submit(job(f"few-{number}", cost=10), Terms(caller="few"))
    done = await one_by_one(worker, 22)
    cost = Counter[str]()
    for claimed in done:
        cost[claimed.id.split("-")[0]] += claimed.cost
    assert cost == {"few": 20, "many": 20}


async def test_priorities_share_by_weight_and_none_starves(bench: Bench) -> None:
    worker = await bench.worker()
    for priority in Priority:
        for number in range(60):
            await bench.broker.submit(job(f"{priority}-{number}"), Terms(priority=priority))
    done = Counter(j.id.split("-")[0] for j in await one_by_one(worker, 63))
    assert done == {"high": 48, "normal": 12, "low": 3}


async def test_who_was_idle_gets_no_credit(bench: Bench) -> None:
    worker = await bench.worker()
    for number in range(10):
        await bench.broker.submit(job(f"a-{number}"), Terms(caller="a"))
    await one_by_one(worker, 10)
    for number in range(10):
        for caller in "ab":
            await bench.broker.submit(job(f"{caller}{number}"), Terms(caller=caller))
    done = Counter(j.id[0] for j in await one_by_one(worker, 10))
    assert done == {"a": 5, "b": 5}


async def test_work_that_nobody_else_wanted_is_not_held_against_its_caller(bench: Bench) -> None:
    worker = await bench.worker()
    for number, ends in enumerate(("completed", "canceled")):
        await bench.broker.submit(job(f"large-{number}", cost=50), Terms(caller="a"))
        if ends == "completed":
            [done] = await worker.claim()
            await worker.complete(done, result())
        else:
            await bench.broker.cancel(f"large-{number}")
        await bench.broker.submit(job(f"a{number}"), Terms(caller="a"))
        await bench.broker.submit(job(f"b{number}"), Terms(caller="b"))
        got = [await worker.claim(max_rows=1) for _ in range(2)]
        assert [jobs[0].id for jobs in got] == [f"a{number}", f"b{number}"]
        for [claimed] in got:
            await worker.complete(claimed, result())


async def test_lanes_have_clocks_of_their_own(bench: Bench) -> None:
    worker = await bench.worker()
    for number in range(10):
        await bench.broker.submit(job(f"sample-{number}", cost=50), Terms(caller="a"))
    await bench.broker.submit(job("score-b", Op.SCORE), Terms(caller="b", priority=Priority.LOW))
    await bench.broker.submit(job("score-a", Op.SCORE), Terms(caller="a"))
    assert [j.id for j in await one_by_one(worker, 2)] == ["score-a", "score-b"]


async def test_models_share_the_clock_of_a_lane(bench: Bench) -> None:
    worker = await bench.worker(models=["m", "n"])
    for number in range(4):
        await bench.broker.submit(job(f"m{number}"), Terms(caller="a"))
    await bench.broker.submit(job("n", model="n"), Terms(caller="b"))
    assert "n" in [j.id for j in await one_by_one(worker, 2)]


async def test_a_job_that_comes_back_takes_its_old_place(bench: Bench) -> None:
    worker = await bench.worker()
    for number in range(3):
        await bench.broker.submit(job(f"a{number}"), Terms(caller="a"))
    [first] = await worker.claim(max_rows=1)
    await bench.broker.submit(job("b"), Terms(caller="b"))
    await worker.release(first)
    assert [j.id for j in await one_by_one(worker, 2)] in (["a0", "b"], ["a0", "a1"])


async def test_a_caller_has_a_share_of_the_queue(bench: Bench) -> None:
    broker = await bench.open(max_queue_cost=100, caller_share=0.5)
    worker = await bench.worker()
    a, b = Terms(caller="a"), Terms(caller="b")
    await broker.submit(job("1", cost=30), a)
    await broker.submit(job("2", cost=20), a)
    with pytest.raises(Overloaded, match="your share") as caught:
        await broker.submit(job("3", cost=1), a)
    assert caught.value.code == "share_full"
    assert caught.value.retry_after is not None
    with pytest.raises(Overloaded, match="your share"):
        await broker.check("m", 1, "a")
    await broker.submit(job("4", cost=40), b)
    with pytest.raises(Overloaded) as caught:
        await broker.submit(job("5", cost=11), b)
    assert caught.value.code == "queue_full"
    assert (await broker.stats()).callers == 2
    await worker.claim(max_rows=64)
    assert (await broker.stats()).callers == 0
    # Alone, a caller is let in with more than its share; callers without a name have no share.
    await broker.submit(job("6", cost=60), a)
    await broker.submit(job("7", cost=20))
    await broker.submit(job("8", cost=20))


async def test_a_canceled_job_frees_its_callers_share(bench: Bench) -> None:
    broker = await bench.open(max_queue_cost=100, caller_share=0.5)
    await bench.worker()
    terms = Terms(caller="a")
    await broker.submit(job("1", cost=50), terms)
    assert await broker.cancel("1")
    await broker.submit(job("2", cost=50), terms)


async def test_time_limits_end_what_waits_and_what_runs(bench: Bench) -> None:
    worker = await bench.worker()
    short = Terms(timeout=0.2, detached=True)
    await bench.broker.submit(job("runs"), short)
    [running] = await worker.claim()
    await bench.broker.submit(job("waits"), short)
    await bench.broker.submit(job("other"))
    await asyncio.sleep(0.3)
    assert (await worker.heartbeat(held(running))).lost == {"runs"}
    assert [j.id for j in await worker.claim()] == ["other"]
    assert not await worker.complete(running, result())
    for name in ("runs", "waits"):
        with pytest.raises(TimedOut, match=r"0\.2 seconds"):
            await bench.broker.result(name)
        assert (await bench.broker.status(name)).state is JobState.FAILED


async def test_time_limits_hold_without_workers(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a"), Terms(timeout=0.05))
    await worker.leave()
    waiting = asyncio.create_task(bench.broker.wait("a", LONG_ENOUGH))
    await asyncio.sleep(0.1)
    await bench.sweep()
    with pytest.raises(TimedOut):
        await asyncio.wait_for(waiting, LONG_ENOUGH)
    assert (await bench.broker.stats()).waiting_cost == 0


async def test_a_repetition_is_recognized(bench: Bench) -> None:
    worker = await bench.worker()
    terms = Terms(caller="a", idempotency_key="k", fingerprint="f", detached=True)
    first = await bench.broker.submit(job("a"), terms)
    assert (first.job_id, first.repeated) == ("a", False)
    again = await bench.broker.submit(job("b"), terms)
    assert (again.job_id, again.repeated) == ("a", True)
    [got] = await worker.claim()
    assert (await bench.broker.submit(job("c"), terms)).job_id == "a"
    await worker.complete(got, result(3.0))
    assert (await bench.broker.submit(job("d"), terms)).job_id == "a"
    done = await bench.broker.result("a")
    assert done is not None
    assert done.arrays["value"][0] == 3.0
    assert await worker.claim() == []


async def test_a_key_is_for_one_request_and_one_caller(bench: Bench) -> None:
    await bench.worker()
    await bench.broker.submit(job("a"), Terms(caller="a", idempotency_key="k", fingerprint="f"))
    with pytest.raises(InvalidRequest, match="another request") as caught:
        await bench.broker.submit(job("b"), Terms(caller="a", idempotency_key="k", fingerprint="g"))
    assert caught.value.code == "idempotency_key_reused"
    other = await bench.broker.submit(job("c"), Terms(caller="b", idempotency_key="k", fingerprint="g"))
    assert (other.job_id, other.repeated) == ("c", False)


async def test_a_repetition_is_recognized_even_when_the_door_is_shut(bench: Bench) -> None:
    broker = await bench.open(max_queue_cost=1)
    worker = await bench.worker()
    terms = Terms(idempotency_key="k")
    await broker.submit(job("a", cost=5), terms)
    assert (await broker.submit(job("b", cost=5), terms)).job_id == "a"
    await worker.leave()
    assert (await broker.submit(job("c", cost=5), terms)).job_id == "a"


async def test_what_came_to_nothing_frees_its_key(bench: Bench) -> None:
    worker = await bench.worker()
    canceled, failed = Terms(idempotency_key="c", detached=True), Terms(idempotency_key="f", detached=True)
    await bench.broker.submit(job("a"), canceled)
    assert await bench.broker.cancel("a")
    with pytest.raises(Canceled):
        await bench.broker.result("a")
    assert (await bench.broker.submit(job("b"), canceled)).job_id == "b"
    await bench.broker.submit(job("c"), failed)
    for claimed in await worker.claim():
        await worker.fail(claimed, InternalError("no"))
    assert (await bench.broker.submit(job("d"), failed)).job_id == "d"
