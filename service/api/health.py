"""Liveness, readiness and metrics: for orchestrators and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from service.api.context import Context, ContextDependency
from service.broker.base import WorkerStatus

router = APIRouter(tags=["operations"])


async def _ready_workers(context: Context) -> list[WorkerStatus]:
    """Workers that have warmed up and whose inference loop was heard lately."""
    workers = await context.broker.workers()
    return [w for w in workers if w.heartbeat_age <= context.settings.ready_seconds]


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    """200 as long as the process answers; says nothing about workers."""
    return {"status": "alive"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Can requests be served?", responses={503: {"description": "Not ready"}})
async def readyz(context: ContextDependency) -> JSONResponse:
    """200 when a worker has loaded and warmed up its models and its inference loop is running."""
    ready = await _ready_workers(context)
    draining = context.request.app.state.drain.draining
    workers = [
        {
            "id": w.info.id,
            "device": w.info.device,
            "models": [m.name for m in w.info.models],
            "heartbeat_age": round(w.heartbeat_age, 3),
        }
        for w in ready
    ]
    if ready and not draining:
        return JSONResponse({"status": "ready", "workers": workers})
    reason = "shutting down" if draining else "no worker is ready; one is starting, busy or being replaced"
    return JSONResponse(
        {"status": "not_ready", "reason": reason, "workers": workers}, status_code=503, headers={"Retry-After": "2"}
    )


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(context: ContextDependency) -> Response:
    """The figures of this process, and those of the workers, in Prometheus' text format."""
    workers = await context.broker.workers()
    content = context.metrics.render(
        await context.broker.stats(), workers, len(await _ready_workers(context)), context.request.app.state.restarts()
    )
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)
