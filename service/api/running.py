"""A synchronous call: a job that the handler waits for, and gives up when the client goes away."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from service import logs
from service.api.context import Context
from service.api.schemas import Timing
from service.errors import Canceled, Unavailable
from service.jobs import Job, JobResult, ModelInfo, Op


async def disconnected(request: Request) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def cost_of(model: ModelInfo, rows: int, passes: int = 1) -> int:
    """What admission counts: images × patches × passes."""
    return rows * model.flow.num_patches * passes


def new_job(model: ModelInfo, op: Op, payload: Mapping[str, Any], rows: int, passes: int = 1) -> Job:
    """A job with a fresh id, its cost in images × patches × passes."""
    return Job(
        id=f"{op}_{secrets.token_hex(12)}",
        op=op,
        model=model.name,
        payload=payload,
        rows=rows,
        cost=cost_of(model, rows, passes),
        request_id=logs.known().get("request_id", ""),
    )


async def admit(context: Context, model: ModelInfo, cost: int) -> None:
    """Raise ``Overloaded`` or ``Unavailable`` where it would be in vain to prepare a job of this cost.

    What may be a repetition is always prepared: its answer may be there, however long the queue is.
    """
    if "idempotency-key" not in context.request.headers:
        await context.door.check(model.name, cost)


async def run(context: Context, job: Job) -> tuple[JobResult, Timing]:
    """Submit a job and wait for its result; raises the job's error.

    When the client disconnects the job is canceled: nobody would see its result.
    """
    start = time.monotonic()
    terms = context.terms()
    await context.door.submit(job, terms)
    result = asyncio.create_task(context.broker.wait(job.id, terms.timeout))
    gone = asyncio.create_task(disconnected(context.request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise Canceled("the client went away")
        finished = result.result()
    finally:
        gone.cancel()
        if not result.done():
            try:
                await context.broker.cancel(job.id)
            except Unavailable:
                # The broker cancels the job when it can; what it will come to is not waited for.
                result.cancel()
        # Retrieves the outcome of a job that was just canceled, so that nothing is left behind.
        await asyncio.gather(result, gone, return_exceptions=True)
    return finished, timing(finished, time.monotonic() - start)


def timing(finished: JobResult, seconds: float) -> Timing:
    """Where the time of a job went."""
    return Timing(
        queue_ms=1000 * finished.queue_seconds,
        inference_ms=1000 * finished.inference_seconds,
        total_ms=1000 * seconds,
    )
