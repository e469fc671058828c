"""What a supervisor does for a worker that has died: its jobs need not wait until their leases run out."""

from __future__ import annotations

import logging

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.broker.base import Limits
from service.broker.redis.connecting import OPTIONS
from service.broker.redis.keys import Keys, common_arguments
from service.broker.redis.scripts import script

log = logging.getLogger(__name__)


def give_on(url: str, worker_id: str, limits: Limits, *, prefix: str = "tarflow") -> int:
    """Give on the jobs of a worker whose process has ended; returns how many.

    It is tried once: where Redis is away, the leases run out.
    """
    client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **OPTIONS)
    try:
        count = client.eval(script("bury").source, 1, Keys(prefix).base, *common_arguments(limits), worker_id)
    except (RedisError, OSError) as error:
        log.info("the jobs of %s are given on when their leases run out: %s", worker_id, error)
        return 0
    finally:
        client.close()
    if count:
        log.warning("%d jobs of %s are given on: it has died", count, worker_id)
    return int(count)
