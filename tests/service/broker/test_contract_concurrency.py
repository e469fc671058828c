"""What every broker promises of a caller's limit of what is in flight: it holds, and whatever ends frees it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from service.broker.base import Terms
from service.broker.redis.api import RedisBroker
from service.broker.redis.worker import RedisWorkerBroker
from service.errors import InternalError, Overloaded
from tests.service.broker.conftest import AMPLE, Bench, info, job, result
from tests.service.broker.redis_server import RedisServer

pytestmark = pytest.mark.anyio
TEN = Terms(caller="a", caller_cost=10, detached=True)


async def refused(bench: Bench, cost: int, terms: Terms = TEN) -> Overloaded:
    """How a job is refused, which check() says, too."""
    with pytest.raises(Overloaded) as caught:
        await bench.broker.submit(job("refused", cost=cost), terms)
    with pytest.raises(Overloaded) as before:
        await bench.broker.check("m", cost, terms.caller, terms.caller_cost)
    assert caught.value.message == before.value.message
    return caught.value


async def test_it_counts_what_waits_and_what_runs(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("a1", cost=6), TEN)
    await worker.claim()
    await bench.broker.submit(job("a2", cost=4), TEN)
    error = await refused(bench, 1)
    assert error.code == "concurrency_limit_exceeded"
    assert "allows 10 units at once (10 are waiting or running, this request costs 1)" in error.message
    assert error.retry_after
    # Others, and the same without a limit, are not meant.
    await bench.broker.submit(job("b", cost=500), Terms(caller="b", caller_cost=10))
    await bench.broker.submit(job("a3", cost=100), Terms(caller="a"))
    await bench.broker.submit(job("nobody's", cost=100))


@pytest.mark.parametrize("end", ["completed", "failed", "canceled", "canceled while it runs", "lost", "timed out"])
async def test_whatever_ends_frees_it(bench: Bench, end: str) -> None:
    await bench.open(max_attempts=1)
    worker = await bench.worker()
    terms = Terms(caller="a", caller_cost=10, detached=True, timeout=0.05 if end == "timed out" else 600)
    await bench.broker.submit(job("a1", cost=10), terms)
    [claimed] = await worker.claim() if end not in ("canceled", "timed out") else [None]
    if end != "timed out":
        await refused(bench, 1)
    if end == "lost":
        await worker.leave()
        await bench.worker("w2")
    elif end == "timed out":
        await _until_it_has_ended(bench, "a1")
    elif claimed is None or end == "canceled while it runs":
        await bench.broker.cancel("a1")
    elif end == "failed":
        await worker.fail(claimed, InternalError("no"))
    else:
        await worker.complete(claimed, result())
    await bench.broker.check("m", 10, "a", 10)
    await bench.broker.submit(job("a2", cost=10), TEN)
    await refused(bench, 1)


async def _until_it_has_ended(bench: Bench, job_id: str) -> None:
    while (await bench.broker.status(job_id)).ended is None:
        await bench.sweep()
        await asyncio.sleep(0.01)


async def test_what_is_given_on_or_repeated_counts_once(bench: Bench) -> None:
    worker = await bench.worker()
    terms = Terms(caller="a", caller_cost=10, detached=True, idempotency_key="k", fingerprint="f")
    await bench.broker.submit(job("a1", cost=6), terms)
    assert (await bench.broker.submit(job("a1-again", cost=6), terms)).repeated
    [claimed] = await worker.claim()
    await worker.release(claimed)
    [claimed] = await worker.claim()
    await bench.broker.submit(job("a2", cost=4), TEN)
    await worker.complete(claimed, result())
    await bench.broker.submit(job("a3", cost=6), TEN)
    assert (await refused(bench, 1)).code == "concurrency_limit_exceeded"


async def test_what_alone_is_too_much_comes_alone(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.broker.submit(job("large", cost=50), TEN)
    await refused(bench, 1)
    [claimed] = await worker.claim()
    await worker.complete(claimed, result())
    await bench.broker.submit(job("small", cost=1), TEN)
    await refused(bench, 50)


async def test_it_holds_exactly_however_many_come_at_once(bench: Bench) -> None:
    await bench.worker()
    came = await asyncio.gather(*(bench.broker.submit(job(f"a{i}"), TEN) for i in range(30)), return_exceptions=True)
    assert Counter(type(one).__name__ for one in came) == {"Accepted": 10, "Overloaded": 20}


async def test_a_replica_that_dies_leaves_nothing_behind(redis_server: RedisServer) -> None:
    """Its synchronous jobs are ended by whoever sweeps, and with them their share."""
    worker = RedisWorkerBroker(redis_server.url, "w", AMPLE)
    dead, alive = (RedisBroker(redis_server.url, AMPLE, replica_seconds=0.3) for _ in range(2))
    try:
        await asyncio.to_thread(worker.register, info("w", ["m"]))
        await dead.sweep(every=0)  # it was heard once, and never again
        terms = Terms(caller="a", caller_cost=10)
        await dead.submit(job("a1", cost=10), terms)
        with pytest.raises(Overloaded):
            await alive.submit(job("a2", cost=10), terms)
        while (await alive.stats()).waiting_cost:
            await asyncio.sleep(0.05)
            await alive.sweep(every=0)
        await alive.submit(job("a3", cost=10), terms)
        with redis_server.client() as client:
            assert client.hgetall("{tarflow}:open") == {b"a": b"10"}
            await alive.cancel("a3")
            assert client.hgetall("{tarflow}:open") == {}
    finally:
        await asyncio.to_thread(worker.close)
        await dead.close()
        await alive.close()
