"""The FastAPI application. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version

import anyio
from fastapi import FastAPI
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from service.api import classifying, envelope, health, models, sampling, scoring
from service.api.observing import Observing
from service.broker.base import Broker
from service.calibrations import CalibrationStore
from service.metrics import ServiceMetrics
from service.settings import Settings

DECODING_THREADS = 4
"""Requests whose images are decoded at the same time."""
DESCRIPTION = """
Images from TarFlow normalizing flows, and exactly how likely an image is.

Draw images with **/v1/sample**, score uploads with **/v1/score**, and ask it whether they are normal, ask which class
they are of with **/v1/classify**, go to latents and back with **/v1/encode** and **/v1/decode**, clean noisy images
with **/v1/denoise**. Every error is `{"error": {"message", "type", "param", "code"}}`.
"""


def create_app(
    settings: Settings,
    broker: Broker,
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    draining: Callable[[], bool] = lambda: False,
    restarts: Callable[[], int] = lambda: 0,
) -> FastAPI:
    """Build the app over a broker.

    ``lifespan`` starts and stops what runs beside it; ``draining`` and ``restarts`` report on that.
    """
    app = FastAPI(
        title="TarFlow",
        summary="Normalizing flows in production",
        description=DESCRIPTION,
        version=version("tarflow"),
        lifespan=lifespan,
    )
    app.state.settings, app.state.broker = settings, broker
    app.state.calibrations = CalibrationStore(settings.state)
    app.state.metrics = ServiceMetrics()
    app.state.decoding = anyio.CapacityLimiter(DECODING_THREADS)
    app.state.draining, app.state.restarts = draining, restarts
    for part in (sampling, scoring, classifying, models, health):
        app.include_router(part.router)
    envelope.install(app)
    # Inside of Observing, which answers in the envelope where FastAPI's own limit would not.
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.max_body_bytes)
    app.add_middleware(Observing, metrics=app.state.metrics, max_body_bytes=settings.max_body_bytes)
    return app
