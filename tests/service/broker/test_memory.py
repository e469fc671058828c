"""What only the embedded broker does: sweeping by itself, draining, models that are announced."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest

from service.broker.base import Held, Terms
from service.broker.kept import ENTRY_BYTES, EVENT_BYTES
from service.broker.ledger import MOST_EVENTS
from service.broker.memory import MemoryBroker
from service.errors import Overloaded, Unavailable
from service.jobs import JobResult, Lane
from tests.service.broker.conftest import AMPLE, info, job, model

pytestmark = pytest.mark.anyio


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    broker = MemoryBroker(replace(AMPLE, lease_seconds=0.1), sweep_seconds=0.02)
    broker.register(info("w1", ["m"]))
    await broker.start()
    yield broker
    await broker.close()


async def test_leases_are_watched(broker: MemoryBroker) -> None:
    await broker.submit(job("a"))
    [first] = await broker.claim("w1", set(Lane), 1, 0)
    [again] = await broker.claim("w1", set(Lane), 1, 30)
    assert (first.attempt, again.id, again.attempt) == (1, "a", 2)


async def test_what_is_left_at_the_end_gets_an_answer(broker: MemoryBroker) -> None:
    await broker.submit(job("a"))
    waiting = asyncio.create_task(broker.wait("a", 60))
    await asyncio.sleep(0)
    broker.abandon()
    with pytest.raises(Unavailable, match="shutting down"):
        await asyncio.wait_for(waiting, 5)


async def test_announced_models_are_known_before_their_worker(broker: MemoryBroker) -> None:
    broker.announce([model("z")])
    assert [m.name for m in await broker.models()] == ["m", "z"]
    broker.unregister("w1")
    assert [m.name for m in await broker.models()] == ["m", "z"]


async def test_kept_results_have_a_bound() -> None:
    # Of each job 500 bytes of recipe, 500 of a preview, 700 or 800 of the result; and the job and its four events.
    room = 3000 + 2 * (ENTRY_BYTES + 4 * EVENT_BYTES)
    broker = MemoryBroker(replace(AMPLE, max_kept_bytes=room))
    broker.register(info("w1", ["m"]))
    kept = Terms(detached=True, keep_seconds=0.05, recipe=bytes(500), idempotency_key="a")
    for name, size in (("a", 700), ("b", 800)):
        await broker.submit(job(name), replace(kept, idempotency_key=name))
        [got] = await broker.claim("w1", set(Lane), 1, 0)
        # Previews are kept with the events.
        pixels = np.zeros(500, np.uint8)
        broker.publish("w1", name, got.attempt, "preview", {"block": 1, "pixels": pixels})
        result = JobResult(arrays={"x": np.zeros(size, np.uint8)}, inference_seconds=0)
        assert broker.complete("w1", name, got.attempt, result)
    with pytest.raises(Overloaded) as caught:
        await broker.submit(job("c"), replace(kept, idempotency_key="c"))
    assert (caught.value.code, caught.value.retry_after is None) == ("results_full", False)
    # What is there already may be asked for, and nobody need wait who takes the answer at once.
    assert (await broker.submit(job("d"), kept)).job_id == "a"
    await broker.submit(job("e"))
    async with asyncio.timeout(60):
        while await broker.jobs(""):
            broker.sweep()
            await asyncio.sleep(0.01)
    await broker.submit(job("c"), kept)


async def keep(broker: MemoryBroker, name: str) -> None:
    """A small job that is done and kept."""
    terms = Terms(
        caller=f"caller of {name}",
        detached=True,
        keep_seconds=3600,
        idempotency_key=f"key of {name}",
        fingerprint=f"{name:>64}",
    )
    await broker.submit(job(name), terms)
    [got] = await broker.claim("w1", set(Lane), 1, 0)
    for block in range(8):
        broker.heartbeat("w1", [Held(job_id=name, attempt=1, fraction=block / 8, block=block)])
    result = JobResult(arrays={"x": np.zeros(1), "y": np.ones(1)}, inference_seconds=float(len(name)))
    assert broker.complete("w1", name, got.attempt, result)


async def test_small_jobs_that_are_kept_have_a_bound_too() -> None:
    room = 2**20
    broker = MemoryBroker(replace(AMPLE, max_kept_bytes=room))
    broker.register(info("w1", ["m"]))
    await keep(broker, "first")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        with pytest.raises(Overloaded, match="results"):  # noqa: PT012 (which of them is refused is not said)
            for number in range(room // 1000):
                await keep(broker, f"job-{number}")
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken < room
    # Yet what is counted has to do with what it takes.
    assert taken > room / 8


async def test_events_that_are_kept_no_more_do_not_count() -> None:
    broker = MemoryBroker(replace(AMPLE, max_kept_bytes=2 * MOST_EVENTS * (EVENT_BYTES + 1000)))
    broker.register(info("w1", ["m"]))
    await broker.submit(job("a"), Terms(detached=True, keep_seconds=3600))
    [got] = await broker.claim("w1", set(Lane), 1, 0)
    pixels = np.zeros(1000, np.uint8)
    for _ in range(4 * MOST_EVENTS):
        broker.publish("w1", "a", got.attempt, "preview", {"pixels": pixels})
    await broker.submit(job("b"), Terms(detached=True))


async def test_what_is_kept_costs_no_time_until_it_goes() -> None:
    broker = MemoryBroker(AMPLE)
    broker.register(info("w1", ["m"]))

    async def steps() -> int:
        """Lines that are gone through to look after everything."""
        count = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            broker.sweep()
            await broker.stats()
            assert broker.idle
        finally:
            sys.settrace(before)
        return count

    await keep(broker, "first")
    one = await steps()
    for number in range(300):
        await keep(broker, f"job-{number}")
    # The interpreter itself may have a few lines to run in between.
    assert await steps() < one + 100
