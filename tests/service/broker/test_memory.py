"""What only the embedded broker does: sweeping by itself, draining, models that are announced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from service.broker.base import Terms
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
    broker = MemoryBroker(replace(AMPLE, max_kept_bytes=3000))
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
