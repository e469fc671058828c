"""``tarflow serve``: the app, the embedded broker and the workers of one host, in one command."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from model.bundle import find_bundles
from service.app import create_app
from service.broker.memory import MemoryBroker
from service.broker.socket import BrokerServer
from service.jobs import ModelInfo
from service.pool import Pool
from service.settings import Settings
from service.state import claimed

log = logging.getLogger(__name__)
DRAIN_POLL_SECONDS = 0.1
ANSWER_SECONDS = 5


class _Server(uvicorn.Server):
    """Says that it drains before it stops listening, so that balancers and callers hear of it."""

    def __init__(self, config: uvicorn.Config, broker: MemoryBroker, pool: Pool, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._broker, self._pool = broker, pool

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave in order; the second Ctrl-C leaves at once.

        Unlike uvicorn's own, it does not raise the signal again in the end: a shutdown that was asked for is a
        success, and the temporary directory is to be removed.
        """
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; also when no worker can ever start."""
        return self._pool.unusable or await super().on_tick(counter)

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Refuse new jobs while the running ones finish and /readyz says so; then close."""
        self._broker.drain()
        deadline = time.monotonic() + self._drain_seconds
        # Polled, because a second Ctrl-C is a signal and no event of the loop.
        while not (self._broker.idle or self.force_exit) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        # What is left gets an answer, too.
        self._broker.abandon()
        await super().shutdown(sockets)  # type: ignore[arg-type]


def build(settings: Settings, socket: Path) -> tuple[FastAPI, MemoryBroker, Pool]:
    """The app with everything that runs beside it; raises a ``BundleError`` for unusable models."""
    infos = [ModelInfo.of(bundle) for bundle in find_bundles(settings.models)]
    names = [info.name for info in infos]
    if settings.default_model is not None and settings.default_model not in names:
        raise ValueError(f"default_model: got {settings.default_model!r}, allowed are {', '.join(names)}")
    broker = MemoryBroker(
        max_queue_cost=settings.max_queue_cost,
        lease_seconds=settings.lease_seconds,
        ready_seconds=settings.ready_seconds,
        max_attempts=settings.max_attempts,
    )
    broker.announce(infos)
    server, pool = BrokerServer(broker, socket), Pool(settings, socket)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await server.start()
        await pool.start()
        log.info("serving %s from %s", ", ".join(names), settings.models)
        try:
            yield
        finally:
            await pool.stop()
            await server.stop()

    app = create_app(
        settings,
        broker,
        lifespan=lifespan,
        draining=lambda: broker.draining,
        restarts=lambda: pool.restarts,
    )
    return app, broker, pool


def serve(settings: Settings) -> None:
    """Run until SIGINT or SIGTERM; raises ``BundleError`` or ``ValueError`` for what cannot be served."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory(prefix="tarflow-") as directory:
        app, broker, pool = build(settings, Path(directory) / "broker.sock")
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            access_log=settings.log_level == "debug",
            # Jobs have ended by then; this is for answers that are still being written.
            timeout_graceful_shutdown=ANSWER_SECONDS,
        )
        with claimed(settings.state):
            asyncio.run(_Server(config, broker, pool, settings.drain_seconds).serve())
    if pool.unusable:
        raise ValueError("a worker cannot start; its last line in the log says why")
