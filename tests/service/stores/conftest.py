"""Faces of what one Redis has, a process each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from service.state import State
from service.stores import redis
from tests.service.broker.redis_server import RedisServer, redis_server, shared_redis  # noqa: F401 (fixtures)

LEASE_SECONDS = 60.0
Connect = Callable[..., State]


@pytest.fixture
def anyio_backend() -> str:
    """Tests of coroutines run on asyncio alone."""
    return "asyncio"


@pytest.fixture
def connect(redis_server: RedisServer) -> Iterator[Connect]:  # noqa: F811
    """One more process's face of what the Redis has: ``connect(lease_seconds)``."""
    connections: list[redis.Connection] = []

    def connect(lease_seconds: float = LEASE_SECONDS) -> State:
        connections.append(redis.Connection(redis_server.url, "test"))
        return redis.state_in(connections[-1], lease_seconds)

    yield connect
    for connection in connections:
        connection.close()
