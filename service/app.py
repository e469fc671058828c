"""The FastAPI application. Importing this module imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import anyio
from fastapi import FastAPI

from service.access.binding import is_loopback
from service.access.caller import Scope
from service.access.gate import Gate
from service.access.keyring import keyring_of
from service.access.rates import Rates
from service.api import administering, calibrating, classifying, docs, envelope, health, models, sampling, scoring
from service.api.cross_origin import CrossOrigin
from service.api.door import Door
from service.api.entrance import Entrance
from service.api.inference_protocol.routes import PARTS as INFERENCE_PROTOCOL
from service.api.jobs import routes as jobs
from service.api.observing import BodyLimit, BodyLimits, Observing
from service.api.openai_images import generating
from service.api.scopes import Part, RouteScopes
from service.api.security_headers import SecurityHeaders
from service.broker.base import Broker
from service.calibrations import CalibrationStore
from service.calibrator import Calibrator
from service.drain import Drain, Draining
from service.drift import Drift
from service.metrics import ServiceMetrics
from service.page.routes import page_router
from service.settings import Settings
from service.state import State

DECODING_THREADS = 4
"""Requests whose images are decoded at the same time."""
OPERATIONS: tuple[Part, ...] = ((health.router, None), (health.metrics_router, Scope.METRICS))
"""What orchestrators and Prometheus ask."""
PARTS: tuple[Part, ...] = (
    (sampling.router, Scope.INFER),
    (scoring.router, Scope.INFER),
    (classifying.router, Scope.INFER),
    (calibrating.router, Scope.INFER),
    (jobs.router, Scope.INFER),
    (models.router, Scope.INFER),
    (generating.router, Scope.INFER),
    *INFERENCE_PROTOCOL,
    *OPERATIONS,
    (docs.router, None),
)
"""Every router, and the scope that a key needs for its routes; None for what is open to anyone."""
ADMINISTRATION: tuple[Part, ...] = ((administering.router, Scope.ADMIN),)
EXPOSED = (
    *(
        "x-request-id",
        "retry-after",
        "location",
        "preference-applied",
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
    ),
    *("x-ratelimit-reset-requests", "x-tarflow-model", "x-tarflow-job", "x-tarflow-seed", "x-tarflow-plan"),
    *("x-tarflow-backward-error", "x-tarflow-certified", "x-tarflow-warnings", "x-tarflow-verdicts"),
    "inference-header-content-length",
)
"""Headers of answers that scripts of other origins may read."""
DESCRIPTION = """
Images from TarFlow normalizing flows, and exactly how likely an image is.

Draw images with **/v1/sample**, score uploads with **/v1/score**, and ask it whether they are normal, ask which class
they are of with **/v1/classify**, go to latents and back with **/v1/encode** and **/v1/decode**, clean noisy images
with **/v1/denoise**. Say what is normal with **/v1/calibrations**. Every error is
`{"error": {"message", "type", "param", "code"}}`. Clients of Triton and KServe find the same under **/v2**, where it is
`{"error": "message"}`.

Headers that any request may have: `X-Request-Timeout` (seconds, up to the service's own limit), `X-Request-Id`
(returned, and in the log). Those of operations: `Prefer: respond-async` (202, and a job to ask for), `Accept:
text/event-stream` (progress as it happens), `Idempotency-Key` (safe to repeat). With a key whose rate is limited every
answer has `x-ratelimit-limit-requests`, `-remaining-requests` and `-reset-requests`; 429 and 503 have `Retry-After`.
"""


def create_app(
    settings: Settings,
    broker: Broker,
    state: State,
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    drain: Drain | None = None,
    restarts: Callable[[], int] = lambda: 0,
    rates: Rates | None = None,
) -> FastAPI:
    """Build the app over a broker and a state; raises ``InvalidKeys`` where there should be keys.

    ``lifespan`` starts and stops what runs beside it, and ``restarts`` reports on that; ``drain`` lets the process
    leave in order; ``rates`` are those that other processes count with, too. Calibrations that an earlier process
    accepted go on within the lifespan, and so does the watch over the keys.
    """
    drain, keyring = drain or Drain(), keyring_of(settings)
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
            watch = None if keyring is None else asyncio.create_task(keyring.watch())
            try:
                yield
            finally:
                if watch is not None:
                    watch.cancel()
                await calibrator.stop()

    app = FastAPI(
        title="TarFlow",
        summary="Normalizing flows in production",
        description=DESCRIPTION,
        version=version("tarflow"),
        lifespan=with_calibrator,
        # They are among the parts, as open routes.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings, app.state.broker, app.state.spool = settings, broker, state.spool
    app.state.door = Door(broker)
    app.state.calibrations, app.state.calibrator, app.state.drift = store, calibrator, drift
    app.state.metrics = ServiceMetrics(drift)
    app.state.decoding = anyio.CapacityLimiter(DECODING_THREADS)
    app.state.drain, app.state.restarts = drain, restarts
    parts = (*PARTS, *ADMINISTRATION) if settings.administers else PARTS
    if settings.page:
        parts = (*parts, (page_router(), None))
    limits = BodyLimits(settings.max_body_bytes, {calibrating.PATH: settings.max_calibration_bytes})
    # Inside of Entrance and Observing, which answer in the envelope where FastAPI's own limit would not.
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Draining, drain=drain)
    app.state.gate = None if keyring is None else Gate(keyring, rates or Rates.in_memory())
    guard(app, parts, settings)
    return app


def guard(app: FastAPI, parts: tuple[Part, ...], settings: Settings) -> None:
    """Include routers in an app whose state is set, behind everything that keeps others out of them.

    Raises ``LookupError`` where the app has a route that no part tells the scope of.
    """
    for router, _ in parts:
        app.include_router(router)
    envelope.install(app)
    scopes, gate = RouteScopes(app, parts), app.state.gate
    if gate is not None:
        _describe_keys(app, scopes)
    app.add_middleware(
        Entrance,
        settings=settings,
        scopes=scopes,
        metrics=app.state.metrics,
        gate=gate,
        checks_host=is_loopback(settings.host) and not settings.anonymous,
    )
    if settings.origins:
        # Outside of what refuses, so that a page can read why; inside of what gives the id.
        app.add_middleware(
            CrossOrigin,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
        )
    app.add_middleware(Observing, metrics=app.state.metrics, scopes=scopes)
    app.add_middleware(SecurityHeaders)


def _describe_keys(app: FastAPI, scopes: RouteScopes) -> None:
    """Make the app's OpenAPI document tell which keys are needed."""
    described = app.openapi

    def with_keys() -> dict[str, Any]:
        if app.openapi_schema is None:
            scopes.describe(described())
        return described()

    app.openapi = with_keys  # type: ignore[method-assign]
