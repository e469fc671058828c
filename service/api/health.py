"""Liveness, readiness and metrics: for orchestrators and Prometheus."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel

from service.access.caller import NOBODY
from service.api.context import Context, ContextDependency
from service.broker.base import WorkerStatus
from service.errors import Unavailable

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class ReadyWorker(BaseModel):
    """A worker that can be counted on."""

    id: str
    device: str
    models: list[str]
    heartbeat_age: float


class Ready(BaseModel):
    """Requests can be served."""

    status: Literal["ready"] = "ready"
    workers: list[ReadyWorker]


class NotReady(BaseModel):
    """Requests cannot be served, and why."""

    status: Literal["not_ready"] = "not_ready"
    reason: str
    workers: list[ReadyWorker]


async def ready_workers(context: Context) -> list[WorkerStatus]:
    """Workers that have warmed up and whose inference loop was heard lately."""
    workers = await context.broker.workers()
    return [w for w in workers if w.heartbeat_age <= context.settings.ready_seconds]


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Alive:
    """200 as long as the process answers; says nothing about workers."""
    return Alive()


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    response_model=Ready,
    summary="Can requests be served?",
    responses={503: {"model": NotReady, "description": "Not ready"}},
)
async def readyz(context: ContextDependency) -> JSONResponse:
    """200 when a worker has loaded and warmed up its models and its inference loop is running.

    Where keys are configured, the list of workers stays empty: it is asked without one.
    """
    reason = "no worker is ready; one is starting, busy or being replaced"
    try:
        ready = await ready_workers(context)
    except Unavailable as error:
        ready, reason = [], error.message
    draining = context.request.app.state.drain.draining
    workers = [
        ReadyWorker(
            id=w.info.id,
            device=w.info.device,
            models=[m.name for m in w.info.models],
            heartbeat_age=round(w.heartbeat_age, 3),
        )
        for w in ready
    ]
    if context.caller is NOBODY:
        # With keys this is open to who has none, who is told no names.
        workers = []
    if ready and not draining:
        return JSONResponse(Ready(workers=workers).model_dump())
    refusal = NotReady(reason="shutting down" if draining else reason, workers=workers)
    return JSONResponse(refusal.model_dump(), status_code=503, headers={"Retry-After": "2"})


@metrics_router.head("/metrics", include_in_schema=False)
@metrics_router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(context: ContextDependency) -> Response:
    """The figures of this process, and those of the workers, in Prometheus' text format."""
    try:
        workers, stats = await context.broker.workers(), await context.broker.stats()
        ready, restarts = len(await ready_workers(context)), context.request.app.state.restarts()
    except Unavailable:
        # What this process has counted can be told without a broker.
        return Response(context.metrics.render_own(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
    content = context.metrics.render(stats, workers, ready, restarts)
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)
