"""How every operation is answered: with the result, later, or as a stream; and a repetition as it was before."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from service.api.context import Context
from service.api.jobs.documents import JobDocument, document_of
from service.api.jobs.keeping import ended_within, keep
from service.api.jobs.streaming import EventStream
from service.api.jobs.wishes import EVENT_STREAM, USUAL, Mode, Wishes, wishes_of
from service.api.recipes.base import Done, Prepared
from service.api.recipes.stored import stored_answer
from service.api.running import run
from service.broker.base import JobStatus
from service.errors import Conflict, InvalidRequest, TimedOut
from service.jobs import FINAL, JobResult

EVENTS: dict[str, Any] = {EVENT_STREAM: {}}
"""What is added to an operation's contents in the documentation."""
HOW: dict[int | str, dict[str, Any]] = {
    200: {"content": EVENTS},
    202: {
        "model": JobDocument,
        "description": "With `Prefer: respond-async`: the job goes on, and is at the address in the header Location",
    },
}
"""What is added to an operation's answers in the documentation."""
RETRY_AFTER_SECONDS = 2.0


async def answer(context: Context, prepared: Prepared) -> Response | BaseModel:
    """Do what was prepared, and answer as the headers of the request want it; raises the job's error."""
    request, job = context.request, prepared.job
    wishes = wishes_of(request)
    if wishes.mode is Mode.SYNC and prepared.previews:
        raise InvalidRequest(
            f"previews: got {prepared.previews}, allowed is 0 where the answer comes at once; ask for a stream "
            f"(Accept: {EVENT_STREAM}) or an asynchronous job (Prefer: respond-async)",
            param="previews",
        )
    accept = request.headers.get("accept")
    if wishes is USUAL:
        file_format = prepared.recipe.file_format(accept)
        result, timing = await run(context, job)
        done = Done(job_id=job.id, model=job.model, result=result, timing=timing, file_format=file_format)
        return await prepared.recipe.render(context, done)
    if wishes.mode is Mode.SYNC or wishes.wait:
        prepared.recipe.file_format(accept)  # before any work is done in vain
    accepted = await keep(context, prepared, wishes)
    if wishes.mode is Mode.STREAM:
        return EventStream(context, accepted.job_id, cancels=not wishes.outlives)
    if wishes.mode is Mode.ASYNC:
        return await _later(context, accepted.job_id, wishes)
    if accepted.repeated:
        await _check_ended(context, accepted.job_id)
    status, found = await ended_within(context, accepted.job_id, context.timeout)
    if status.state not in FINAL:
        raise TimedOut(
            "not finished within the time for the request; the job goes on: send it again with the same Idempotency-Key"
        )
    return await _result(context, status, found)


async def _later(context: Context, job_id: str, wishes: Wishes) -> Response | BaseModel:
    """202 with the job's document; or what comes within the seconds that the client waits."""
    if wishes.wait:
        seconds = min(wishes.wait, context.timeout)
        status, found = await ended_within(context, job_id, seconds)
        if status.state in FINAL:
            return await _result(context, status, found)
    else:
        status = await context.broker.status(job_id)
    document = document_of(status)
    headers = {
        "location": document.links.self_,
        "preference-applied": wishes.applied,
        "x-tarflow-job": job_id,
    }
    return JSONResponse(document.model_dump(mode="json", by_alias=True), status_code=202, headers=headers)


async def _check_ended(context: Context, job_id: str) -> None:
    """Refuse to answer a repetition while the first request is still being worked on."""
    status = await context.broker.status(job_id)
    if status.state not in FINAL:
        raise Conflict(
            "Idempotency-Key: a request with this key is still being worked on; send it again later for its answer",
            param="Idempotency-Key",
            code="idempotency_in_flight",
            retry_after=RETRY_AFTER_SECONDS,
        )


async def _result(context: Context, status: JobStatus, found: JobResult | None) -> Response | BaseModel:
    """The answer of a job that has ended; raises its error."""
    if status.error is not None:
        raise status.error
    # It may have ended just when the time was over.
    found = found or await context.broker.result(status.id)
    if found is None:
        raise AssertionError("a job that was completed has a result")
    return await stored_answer(context, status, found, context.request.headers.get("accept"))
