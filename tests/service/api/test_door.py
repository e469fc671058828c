"""The door asks the broker once for many requests, and never lets in what the broker refuses."""

from __future__ import annotations

import pytest

from service.api import door as door_module
from service.api.door import Door
from service.broker.base import USUAL
from service.errors import Overloaded, Unavailable
from tests.service.broker.conftest import Bench, MemoryBench, job

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bench() -> Bench:
    bench = MemoryBench(None)
    await bench.open(max_queue_cost=10)
    return bench


async def test_a_refusal_closes_it_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "OPEN_SECONDS", 3600)
    door = Door(bench.broker)
    with pytest.raises(Unavailable):
        await door.check("m", 1)
    worker = await bench.worker()
    await door.check("m", 1)
    await door.submit(job("a", cost=10), USUAL)
    # It stands open, but what comes in is judged all the same.
    await door.check("m", 1)
    with pytest.raises(Overloaded):
        await door.submit(job("b", cost=1), USUAL)
    with pytest.raises(Overloaded):
        await door.check("m", 1)
    await worker.claim()
    await door.check("m", 1)


async def test_it_does_not_stay_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "OPEN_SECONDS", 0)
    await bench.worker()
    door = Door(bench.broker)
    await door.submit(job("a", cost=10), USUAL)
    with pytest.raises(Overloaded):
        await door.check("m", 1)
