"""GET and DELETE below /v1/jobs: jobs that outlive their connections, and what happens to them."""

from __future__ import annotations

import math
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from service.api.context import Context, ContextDependency
from service.api.jobs.documents import JobDocument, JobList, document_of
from service.api.jobs.keeping import ended_within, own_job
from service.api.jobs.streaming import EventStream
from service.api.jobs.wishes import EVENT_STREAM
from service.api.recipes.stored import recipe_of, stored_answer
from service.api.schemas import ErrorResponse
from service.broker.base import JobStatus
from service.errors import Conflict, InvalidRequest
from service.jobs import FINAL, JobResult, JobState

MOST_JOBS = 100
RETRY_AFTER_SECONDS = 1.0
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorResponse, "description": "Why it cannot be told now"},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": JobDocument,
        "description": "JSON, or with `Accept: image/png` (jpeg, webp) the picture that the job has made",
        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
    }
}
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}, "id": {"type": "string"}},
    "required": ["event", "data"],
}
"""A server-sent event; its data is JSON."""
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `queued`, `started`, `progress`, `preview`, `requeued`, and last `completed`, `failed` "
        "or `canceled`; `reconnect` when this process leaves",
        "content": {EVENT_STREAM: {"schema": EVENT}},
    },
    204: {"description": "There is nothing behind Last-Event-ID, and never will be"},
}

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=ERRORS)


@router.get("", response_model=JobList, summary="The caller's jobs")
async def jobs(context: ContextDependency, limit: Annotated[int, Query(ge=1, le=MOST_JOBS)] = 20) -> JobList:
    """Those that were asked for with `Prefer: respond-async`, as streams, or with an Idempotency-Key; no results."""
    found = await context.broker.jobs(context.caller.name, limit)
    return JobList(data=[document_of(status) for status in found])


@router.get("/{job_id}", response_model=JobDocument, responses=ANSWERS, summary="Where a job stands, and its result")
async def job(
    job_id: str, context: ContextDependency, wait: Annotated[float, Query(ge=0)] = 0.0
) -> Response | BaseModel:
    """State, progress and place in the queue; the result when it is completed, as the synchronous call gives it.

    With `wait` the answer comes when the job has ended, or after so many seconds; sooner where the service's own time
    for a request is over.
    """
    status = await own_job(context, job_id)
    if not math.isfinite(wait):
        raise InvalidRequest(f"wait: got {wait:g}, allowed are seconds from 0 on", param="wait")
    result: JobResult | None = None
    if wait and status.state not in FINAL:
        status, result = await ended_within(context, job_id, min(wait, context.timeout))
    return await _shown(context, status, result)


async def _shown(context: Context, status: JobStatus, result: JobResult | None) -> Response | BaseModel:
    """The document of a job, or the picture that it has made where that is preferred."""
    accept = context.request.headers.get("accept")
    if status.state is not JobState.COMPLETED:
        wants_picture = "image/" in (accept or "") and (await recipe_of(context, status)).file_format(accept)
        if not wants_picture:
            return document_of(status)
        # A document is not what was asked for, and there is no picture.
        raise status.error or Conflict(
            f"job: {status.id!r} is {status.state}; its picture is there when it is completed (wait=60 waits for it)",
            param="job",
            code="job_not_completed",
            retry_after=RETRY_AFTER_SECONDS,
        )
    result = result or await context.broker.result(status.id)
    if result is None:
        raise AssertionError("a job that was completed has a result")
    answer = await stored_answer(context, status, result, accept)
    if isinstance(answer, Response):
        return answer
    # Written as what it is: a document may hold the answer of any operation.
    return JSONResponse(document_of(status, answer).model_dump(mode="json", by_alias=True))


@router.delete("/{job_id}", response_model=JobDocument, summary="Cancel a job")
async def cancel(job_id: str, context: ContextDependency) -> JobDocument:
    """Give a job up that has not ended; one that has stays as it is, until it expires. Either way this is where it
    stands now."""
    await own_job(context, job_id)
    await context.broker.cancel(job_id)
    return document_of(await context.broker.status(job_id))


@router.get("/{job_id}/events", response_class=Response, responses=STREAMS, summary="What happens to a job")
async def events(job_id: str, context: ContextDependency) -> Response:
    """Server-sent events from the beginning, or behind the header Last-Event-ID, to the job's end."""
    status = await own_job(context, job_id)
    after = context.request.headers.get("last-event-id")
    if after is not None and status.state in FINAL and not await _has_events(context, job_id, after):
        # A browser would connect again and again.
        return Response(status_code=204)
    return EventStream(context, job_id, after=after)


async def _has_events(context: Context, job_id: str, after: str) -> bool:
    async with aclosing(context.broker.events(job_id, after)) as found:
        return await anext(found, None) is not None
