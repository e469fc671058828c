"""What only the embedded broker does: sweeping by itself, draining, models that are announced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from service.broker.memory import MemoryBroker
from service.errors import Unavailable
from service.jobs import Lane
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
