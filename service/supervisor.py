"""``tarflow worker``: the workers of one host, a process for each device, kept alive by a parent without torch."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import socket
from dataclasses import asdict

from model.bundle import find_bundles
from service import logs
from service.broker.base import Limits
from service.jobs import REDIS_VARIABLE
from service.pool import Pool
from service.settings import WorkerSettings

log = logging.getLogger(__name__)


def _limits(settings: WorkerSettings) -> Limits:
    """What a worker's broker holds to. Admission is the API's business."""
    return Limits(
        max_queue_cost=1,
        caller_share=1.0,
        lease_seconds=settings.lease_seconds,
        ready_seconds=settings.ready_seconds,
        max_attempts=settings.max_attempts,
    )


def make_pool(settings: WorkerSettings) -> Pool:
    """The workers of these settings, not started."""
    from service.broker.redis.burying import give_on

    limits = _limits(settings)

    def bury(worker_id: str) -> None:
        """Others need not wait until the leases of a worker that is known to be dead run out."""
        give_on(settings.redis, worker_id, limits, prefix=settings.redis_prefix)

    return Pool(
        settings,
        ("--redis", "--redis-prefix", settings.redis_prefix, "--limits", json.dumps(asdict(limits))),
        # Several of these may run on one host.
        name=f"{socket.gethostname()}-{secrets.token_hex(2)}",
        environment={REDIS_VARIABLE: settings.redis},
        grace_seconds=settings.grace_seconds,
        metrics_port=settings.metrics_port,
        buried=bury,
    )


async def _supervise(pool: Pool) -> None:
    """Keep the workers running until SIGINT or SIGTERM, or until there is no hope."""
    leaving = asyncio.Event()

    def leave(sent: signal.Signals) -> None:
        # The second Ctrl-C leaves at once.
        if leaving.is_set() and sent == signal.SIGINT:
            pool.kill()
        leaving.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leave, number)
    await pool.start()
    waits = [asyncio.create_task(leaving.wait()), asyncio.create_task(pool.wait_unusable())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    await pool.stop()


def supervise(settings: WorkerSettings) -> None:
    """Run until SIGINT or SIGTERM; raises ``BundleError`` or ``ValueError`` for what cannot be served."""
    logs.configure(settings.log_level, settings.log_format)
    names = [bundle.name for bundle in find_bundles(settings.models)]
    log.info("workers for %s from %s", ", ".join(names), settings.models)
    pool = make_pool(settings)
    asyncio.run(_supervise(pool))
    if pool.unusable:
        raise ValueError("a worker cannot start; its last line in the log says why")
