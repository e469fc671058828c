"""The FastAPI application. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib.metadata import version

import anyio
from fastapi import FastAPI

from service.api import administering, calibrating, classifying, envelope, health, models, sampling, scoring
from service.api.door import Door
from service.api.jobs import routes as jobs
from service.api.observing import BodyLimit, BodyLimits, Observing
from service.broker.base import Broker
from service.calibrations import CalibrationStore
from service.calibrator import Calibrator
from service.drain import Drain, Draining
from service.drift import Drift
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.state import State

DECODING_THREADS = 4
"""Requests whose images are decoded at the same time."""
DESCRIPTION = """
Images from TarFlow normalizing flows, and exactly how likely an image is.

Draw images with **/v1/sample**, score uploads with **/v1/score**, and ask it whether they are normal, ask which class
they are of with **/v1/classify**, go to latents and back with **/v1/encode** and **/v1/decode**, clean noisy images
with **/v1/denoise**. Say what is normal with **/v1/calibrations**. Every error is
`{"error": {"message", "type", "param", "code"}}`.
"""


def create_app(
    settings: Settings,
    broker: Broker,
    state: State,
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    drain: Drain | None = None,
    restarts: Callable[[], int] = lambda: 0,
) -> FastAPI:
    """Build the app over a broker and a state.

    ``lifespan`` starts and stops what runs beside it, and ``restarts`` reports on that; ``drain`` lets the process
    leave in order. Calibrations that an earlier process accepted go on within the lifespan.
    """
    drain = drain or Drain()
    store, drift = CalibrationStore(state.calibrations), Drift(settings.drift_window)
    calibrator = Calibrator(
        broker,
        store,
        state.pending,
        batch_rows=settings.batch_rows,
        most=settings.max_calibrations,
        changed=drift.forget,
    )

    @asynccontextmanager
    async def with_calibrator(app: FastAPI) -> AsyncIterator[None]:
        async with nullcontext() if lifespan is None else lifespan(app):
            await calibrator.start()
            try:
                yield
            finally:
                await calibrator.stop()

    app = FastAPI(
        title="TarFlow",
        summary="Normalizing flows in production",
        description=DESCRIPTION,
        version=version("tarflow"),
        lifespan=with_calibrator,
    )
    app.state.settings, app.state.broker, app.state.spool = settings, broker, state.spool
    app.state.door = Door(broker)
    app.state.calibrations, app.state.calibrator, app.state.drift = store, calibrator, drift
    app.state.metrics = ServiceMetrics(drift)
    app.state.decoding = anyio.CapacityLimiter(DECODING_THREADS)
    app.state.drain, app.state.restarts = drain, restarts
    for part in (sampling, scoring, classifying, calibrating, jobs, models, health):
        app.include_router(part.router)
    if settings.admin:
        app.include_router(administering.router)
    envelope.install(app)
    # Inside of Observing, which answers in the envelope where FastAPI's own limit would not.
    limits = BodyLimits(settings.max_body_bytes, {calibrating.PATH: settings.max_calibration_bytes})
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Draining, drain=drain)
    app.add_middleware(Observing, metrics=app.state.metrics, limits=limits)
    return app
