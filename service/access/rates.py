"""How many requests a key has in a window: counted in this process, or in the Redis that all replicas share.

The windows are fixed: one begins with the first request after the last has ended, and lets exactly so many in. Their
time is Redis' own. A moving window of the library would be by the clocks of the replicas, which need not agree.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import redis.asyncio as aioredis
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError  # noqa: A004

from service.broker.redis.connecting import OPTIONS, SOCKET_SECONDS, service_errors
from service.broker.redis.keys import Keys

CONNECTIONS = 8
"""Of one process; each has one command on its way."""


@dataclass(frozen=True)
class Window:
    """How a caller stands after a request."""

    limit: int
    remaining: int
    retry_after: float | None
    """Seconds until there are requests left; None where this one was."""


class Rates:
    """Counts requests by the name of their key."""

    def __init__(self, storage: MemoryStorage | RedisStorage, pool: aioredis.ConnectionPool | None = None) -> None:
        self._storage, self._pool = storage, pool
        self._items: dict[str, RateLimitItem] = {}

    @classmethod
    def in_memory(cls) -> Rates:
        """Of one process."""
        return cls(MemoryStorage())

    @classmethod
    def in_redis(cls, url: str, prefix: str) -> Rates:
        """Of all processes with the same Redis and prefix; nothing connects before the first request."""
        # A connection that a restart of Redis has cut is noticed when it is used: once more, on a new one.
        once_more = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
        pool = aioredis.BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=SOCKET_SECONDS, retry=once_more, **OPTIONS
        )
        # The URL of the service, which may hold a password, is known to the pool alone.
        options: dict[str, Any] = {"connection_pool": pool}
        storage = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix=f"{Keys(prefix).base}:rate", **options
        )
        return cls(storage, pool)

    async def hit(self, name: str, rate: str) -> Window:
        """Count a request of a key; raises ``Unavailable`` where it cannot be counted."""
        item = self._items.get(rate)
        if item is None:
            item = self._items[rate] = parse(rate)
        key = item.key_for(name)
        with service_errors():
            count = await self._storage.incr(key, item.get_expiry())
            if count <= item.amount:
                return Window(item.amount, item.amount - count, None)
            # Asked only now: what is let in needs no second round trip.
            ends = await self._storage.get_expiry(key)
        return Window(item.amount, 0, max(1, math.ceil(ends - time.time())))

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.aclose()
