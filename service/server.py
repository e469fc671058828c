"""``tarflow serve``: the app, the embedded broker and the workers of one host; ``tarflow api``: the app alone."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics

from model.bundle import find_bundles
from service import logs
from service.access.binding import check_binding
from service.access.rates import Rates
from service.allocator import give_back_large_blocks
from service.app import OPERATIONS, create_app, guard
from service.broker.memory import MemoryBroker
from service.broker.socket import BrokerServer
from service.connections import BoundedHttp
from service.drain import Drain
from service.jobs import ModelInfo
from service.pool import Pool
from service.settings import ApiSettings, ServeSettings, Settings
from service.state import claimed
from service.stores import directory

log = logging.getLogger(__name__)
DRAIN_POLL_SECONDS = 0.1
MODELS_SECONDS = 1.0
"""The most that a replica's list of models is behind: requests need not ask for it each."""
KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep an idle connection: who closes first must not be the one who is about to be asked."""
ANSWER_SECONDS = 5
TICKS_OF_A_LOOK = 20
"""Between two looks for connections on which nobody asks; a tick is a tenth of a second."""


class _Bounded(uvicorn.Server):
    """Looks for connections on which nobody asks."""

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop."""
        if counter % TICKS_OF_A_LOOK == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedHttp):
                    connection.close_if_late()
        return await super().on_tick(counter)


class _Server(_Bounded):
    """Says that it drains before it stops listening, so that balancers and callers hear of it."""

    def __init__(
        self, config: uvicorn.Config, drain: Drain, drain_seconds: float, hopeless: Callable[[], bool]
    ) -> None:
        super().__init__(config)
        self._drain, self._drain_seconds, self._hopeless = drain, drain_seconds, hopeless

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave in order; the second Ctrl-C leaves at once.

        Unlike uvicorn's own, it does not raise the signal again in the end: a shutdown that was asked for is a
        success, and the temporary directory is to be removed.
        """
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; also when no worker can ever start."""
        return self._hopeless() or await super().on_tick(counter)

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Refuse new work while what runs finishes and /readyz says so; then close."""
        self._drain.begin()
        deadline = time.monotonic() + self._drain_seconds
        # Polled, because a second Ctrl-C is a signal and no event of the loop.
        while not (self._drain.idle or self.force_exit) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        # What is left gets an answer, too.
        self._drain.abandon()
        await super().shutdown(sockets)  # type: ignore[arg-type]


class _Beside(_Bounded):
    """A second server in one process; signals are the first one's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    def _log_started_message(self, listeners: Sequence[socket.SocketType]) -> None:
        """Not as the service: who reads "running on" wants its address."""
        for listener in listeners:
            log.info("metrics on port %d", listener.getsockname()[1])


def _run(settings: Settings, app: FastAPI, drain: Drain, hopeless: Callable[[], bool] = lambda: False) -> None:
    """Answer until SIGINT or SIGTERM, or until there is no hope."""
    give_back_large_blocks()
    # When a counter was first counted is nobody's question, and would be a series for each.
    disable_created_metrics()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Its lines are rendered as all others are, and requests are told of by service.api.observing.
        log_config=None,
        access_log=False,
        server_header=False,
        http=BoundedHttp,
        # Work has ended by then; this is for answers that are still being written.
        timeout_graceful_shutdown=ANSWER_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_Server(config, drain, settings.drain_seconds, hopeless).serve())


# serve


def build(settings: ServeSettings, path: Path) -> tuple[FastAPI, Drain, Pool]:
    """The app with everything that runs beside it; raises a ``BundleError`` for unusable models."""
    infos = [ModelInfo.of(bundle) for bundle in find_bundles(settings.models)]
    names = [info.name for info in infos]
    if settings.default_model is not None and settings.default_model not in names:
        raise ValueError(f"default_model: got {settings.default_model!r}, allowed are {', '.join(names)}")
    broker = MemoryBroker(settings.limits)
    # Jobs that were accepted for later are finished, too, if there is time: nothing but this process has them.
    drain = Drain(lambda: broker.idle)
    broker.announce(infos)
    server, pool = BrokerServer(broker, path), Pool(settings, ("--socket", str(path)))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await broker.start()
        await server.start()
        await pool.start()
        log.info("serving %s from %s", ", ".join(names), settings.models)
        try:
            yield
        finally:
            broker.abandon()
            await pool.stop()
            await server.stop()
            await broker.close()

    app = create_app(
        settings,
        broker,
        directory.state_in(settings.state),
        lifespan=lifespan,
        drain=drain,
        restarts=lambda: pool.restarts,
    )
    return app, drain, pool


def serve(settings: ServeSettings) -> None:
    """Run until SIGINT or SIGTERM; raises ``BundleError`` or ``ValueError`` for what cannot be served."""
    check_binding(settings)
    logs.configure(settings.log_level, settings.log_format)
    with tempfile.TemporaryDirectory(prefix="tarflow-") as directory:
        app, drain, pool = build(settings, Path(directory) / "broker.sock")
        with claimed(settings.state):
            _run(settings, app, drain, lambda: pool.unusable)
    if pool.unusable:
        raise ValueError("a worker cannot start; its last line in the log says why")


# api


@asynccontextmanager
async def _metrics_beside(app: FastAPI, settings: ApiSettings) -> AsyncIterator[None]:
    """/metrics, /healthz and /readyz on a port of their own, where one is wanted."""
    if not settings.metrics_port:
        yield
        return
    operations = FastAPI(openapi_url=None)
    operations.state = app.state
    guard(operations, OPERATIONS, settings)
    config = uvicorn.Config(
        operations,
        host=settings.host,
        port=settings.metrics_port,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        http=BoundedHttp,
    )
    server = _Beside(config)
    task = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await task


def api(settings: ApiSettings) -> None:
    """Answer requests, with the work done by workers of the same Redis, until SIGINT or SIGTERM."""
    from service.broker.redis.api import RedisBroker
    from service.stores.redis import Connection, state_in

    check_binding(settings)
    logs.configure(settings.log_level, settings.log_format)
    broker = RedisBroker(settings.redis, settings.limits, prefix=settings.redis_prefix, models_seconds=MODELS_SECONDS)
    connection, drain = Connection(settings.redis, settings.redis_prefix), Drain()
    rates = Rates.in_redis(settings.redis, settings.redis_prefix)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Redis need not be there yet; until it is, /readyz and every request say so.
        await broker.start()
        try:
            async with _metrics_beside(app, settings):
                yield
        finally:
            await broker.close()
            await rates.close()
            connection.close()

    state = state_in(connection, settings.lease_seconds)
    _run(settings, create_app(settings, broker, state, lifespan=lifespan, drain=drain, rates=rates), drain)
