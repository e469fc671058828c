"""A real Redis for what several processes share."""

from __future__ import annotations

from tests.service.broker.redis_server import redis_server, shared_redis  # noqa: F401 (fixtures)
