"""The API's connections to Redis: scripts and reads, with what goes wrong as the service's errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, NoScriptError, RedisError  # noqa: A004

from service.broker.redis.connecting import BLOCK_SECONDS, OPTIONS, SOCKET_SECONDS, service_errors
from service.broker.redis.keys import Keys, milliseconds
from service.broker.redis.scripts import script

CONNECTIONS = 16
"""Commands that one process has on their way at once; reads that wait for events have connections of their own."""

LISTENERS = 10_000
"""Reads that wait for events at once, in one process; as many clients as Redis itself allows by default."""

Entry = tuple[bytes, dict[bytes, bytes]]
"""Of a stream: its id, and its fields."""


class Calls:
    """Every method raises ``Unavailable`` where Redis is away or full."""

    def __init__(self, url: str, keys: Keys, common: Sequence[int]) -> None:
        self._keys, self._common = keys, common
        # A connection that a restart of Redis has cut is noticed when it is used: once more, on a new one. Every
        # operation may be sent twice.
        once_more = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
        commands = aioredis.BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=SOCKET_SECONDS, retry=once_more, **OPTIONS
        )
        listening = aioredis.ConnectionPool.from_url(
            url, retry=Retry(NoBackoff(), 0), max_connections=LISTENERS, **OPTIONS
        )
        # However many follow events: results must be heard of.
        news = aioredis.ConnectionPool.from_url(url, retry=Retry(NoBackoff(), 0), max_connections=1, **OPTIONS)
        # Any: replies are typed as what every protocol may give.
        self._redis: Any = aioredis.Redis.from_pool(commands)
        self._listening: Any = aioredis.Redis.from_pool(listening)
        self._news: Any = aioredis.Redis.from_pool(news)

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
        await self._listening.aclose()
        await self._news.aclose()

    async def run(self, name: str, *arguments: str | bytes | int | float) -> Any:
        """The answer of a script."""
        operation = script(name)
        rest = (1, self._keys.base, *self._common, *arguments)
        with service_errors():
            try:
                return await self._redis.execute_command("EVALSHA", operation.sha, *rest)
            except NoScriptError:
                return await self._redis.execute_command("EVAL", operation.source, *rest)

    async def fields(self, job_id: str, names: Sequence[str]) -> list[bytes | None]:
        """Fields of a job."""
        with service_errors():
            return await self._redis.hmget(self._keys.job(job_id), names)

    async def fields_of_many(self, ids: Sequence[str], names: Sequence[str]) -> list[list[bytes | None]]:
        """Fields of many jobs, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hmget(self._keys.job(job_id), names)
        with service_errors():
            return await pipeline.execute()

    async def values(self, keys: Sequence[str]) -> list[bytes | None]:
        """Values of keys."""
        with service_errors():
            return await self._redis.mget(keys)

    async def entries(self, key: str, last: str) -> list[Entry]:
        """What a stream has behind an id."""
        with service_errors():
            return await self._redis.xrange(key, min=f"({last}")

    async def next_entries(self, key: str, last: str | bytes) -> list[Entry]:
        """The same, or else what comes in the next seconds, on a connection of its own."""
        return await self._next(self._listening, key, last)

    async def news(self, inbox: str, last: bytes) -> list[Entry]:
        """The same of this process's inbox; one at a time."""
        return await self._next(self._news, inbox, last)

    async def _next(self, client: Any, key: str, last: str | bytes) -> list[Entry]:
        with service_errors():
            answer = await client.xread({key: last}, count=500, block=milliseconds(BLOCK_SECONDS))
        return answer[0][1] if answer else []

    async def setting(self, name: str) -> str | None:
        """A part of Redis's configuration; ``None`` where it is not told."""
        try:
            found = await self._redis.config_get(name)
        except (RedisError, OSError):
            return None
        value = found.get(name)
        return value.decode() if isinstance(value, bytes) else value
