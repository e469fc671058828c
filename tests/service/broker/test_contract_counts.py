"""What every broker tells of its jobs for logs and metrics: how they ended, how long they waited, who asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.broker.base import Ending, Terms
from service.errors import OUT_OF_MEMORY, InternalError, InvalidRequest, ServiceError
from service.jobs import Op
from tests.service.broker.conftest import Bench, job, result

pytestmark = pytest.mark.anyio
KEPT = Terms(detached=True)
FAULTS: dict[str, ServiceError] = {
    "error": InternalError("a fault"),
    "oom": InternalError("no room", code=OUT_OF_MEMORY),
    "invalid": InvalidRequest("too large", code="result_too_large"),
}


async def test_each_job_is_counted_once_by_how_it_ended(bench: Bench) -> None:
    broker = await bench.open(max_attempts=1)
    assert (await broker.stats()).ended == {}
    worker = await bench.worker("w1", ["m", "a:b"])
    for name in ("ok", *FAULTS, "canceled", "worker_lost"):
        await broker.submit(job(name, Op.SCORE), KEPT)
    await broker.submit(job("odd", Op.SCORE, model="a:b"), KEPT)
    await broker.submit(job("timeout", Op.SAMPLE), replace(KEPT, timeout=0.05))
    claimed = {}
    while len(claimed) < 7:
        claimed |= {got.id: got for got in await worker.claim() if got.op is Op.SCORE}
    for name in ("ok", "odd"):
        assert await worker.complete(claimed[name], result())
        assert not await worker.complete(claimed[name], result())
    for name, error in FAULTS.items():
        assert await worker.fail(claimed[name], error)
    assert await broker.cancel("canceled")
    assert not await broker.cancel("canceled")
    await worker.leave()
    while (await broker.stats()).waiting or (await broker.stats()).running:
        await asyncio.sleep(0.02)
        await bench.sweep()
    outcomes = ("ok", *FAULTS, "canceled", "worker_lost")
    assert (await broker.stats()).ended == {
        **{Ending("m", Op.SCORE, outcome): 1 for outcome in outcomes},
        Ending("a:b", Op.SCORE, "ok"): 1,
        Ending("m", Op.SAMPLE, "timeout"): 1,
    }


async def test_the_first_worker_is_told_how_long_a_job_has_waited(bench: Bench) -> None:
    first, second = await bench.worker("w1"), await bench.worker("w2")
    await bench.broker.submit(job("a"))
    await asyncio.sleep(0.1)
    [got] = await first.claim()
    assert got.waited is not None
    assert got.waited >= 0.09
    await first.release(got)
    [again] = await second.claim()
    assert again.waited is None
    await second.leave()
    [lost] = await first.claim()
    assert (lost.attempt, lost.waited) == (2, None)


async def test_the_worker_learns_whose_request_a_job_is_of(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(replace(job("a"), request_id="r-1"))
    await bench.broker.submit(job("b"))
    assert [(got.id, got.request_id) for got in await worker.claim()] == [("a", "r-1"), ("b", "")]
