"""Rates: exactly so many, of one process or of all that share a Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from service.access.rates import Rates, Window
from service.errors import Unavailable
from tests.service.broker.redis_server import RedisServer

pytestmark = pytest.mark.anyio
NewRates = Callable[[], Rates]


@pytest.fixture(params=["memory", "redis"])
async def new(request: pytest.FixtureRequest) -> AsyncIterator[NewRates]:
    """Makes the rates of a process; in memory all are one process's."""
    async with AsyncExitStack() as stack:
        memory = Rates.in_memory()

        def new() -> Rates:
            if request.param == "memory":
                return memory
            rates = Rates.in_redis(request.getfixturevalue("redis_server").url, "tarflow")
            stack.push_async_callback(rates.close)
            return rates

        yield new


async def test_exactly_so_many_are_let_in(new: NewRates) -> None:
    processes = [new(), new(), new()]
    windows = await asyncio.gather(*(processes[i % 3].hit("a", "20/hour") for i in range(60)))
    allowed = [window for window in windows if window.retry_after is None]
    assert sorted(window.remaining for window in allowed) == list(range(20))
    for window in windows:
        assert window.limit == 20
        if window.retry_after is not None:
            assert window.remaining == 0
            assert 1 <= window.retry_after <= 3600
    # Others, and another rate of the same key, are counted apart.
    assert await processes[0].hit("b", "20/hour") == Window(20, 19, None)
    assert await processes[0].hit("a", "5/day") == Window(5, 4, None)


async def test_there_is_another_window(new: NewRates) -> None:
    rates = new()
    while (await rates.hit("a", "3/second")).retry_after is None:
        pass
    while (window := await rates.hit("a", "3/second")).retry_after is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert window == Window(3, 2, None)


async def test_nothing_stays_for_ever(redis_server: RedisServer) -> None:
    rates = Rates.in_redis(redis_server.url, "tarflow")
    await rates.hit("a", "3/minute")
    await rates.close()
    with redis_server.client() as client:
        [key] = client.keys()
        assert key.startswith(b"{tarflow}:rate")
        assert 0 < client.pttl(key) <= 60_000


async def test_without_redis_nothing_is_let_in(redis_server: RedisServer) -> None:
    rates = Rates.in_redis(redis_server.url + ".none", "tarflow")
    with pytest.raises(Unavailable) as caught:
        await rates.hit("a", "3/minute")
    assert caught.value.code == "broker_unreachable"
    assert caught.value.retry_after
    await rates.close()
