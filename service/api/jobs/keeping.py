"""Jobs that are kept: submitted to outlive their connection, found by their callers alone, waited for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import anyio.to_thread

from service.api.context import Context
from service.api.jobs.wishes import Mode, fingerprint
from service.api.recipes.base import Prepared
from service.api.recipes.stored import packed
from service.api.running import caller_of, disconnected
from service.broker.base import Accepted, JobStatus, Terms
from service.drain import Drain
from service.errors import Canceled, NotFound, TimedOut
from service.jobs import FINAL, Job, JobResult


def previewing(job: Job, previews: int) -> Job:
    """The job, asked for so many states on the way."""
    return replace(job, payload={**job.payload, "previews": previews}) if previews else job


def drain_of(context: Context) -> Drain:
    """Whether this process leaves."""
    drain: Drain = context.request.app.state.drain
    return drain


def kept(context: Context) -> Terms:
    """How a job is treated that outlives its connection."""
    settings = context.settings
    return Terms(
        caller=caller_of(context), timeout=settings.job_timeout, keep_seconds=settings.result_seconds, detached=True
    )


async def keep(context: Context, prepared: Prepared, mode: Mode, key: str | None) -> Accepted:
    """Submit a job to be kept with its recipe, or find the one that it repeats."""
    recipe = await anyio.to_thread.run_sync(packed, prepared)
    terms = replace(kept(context), recipe=recipe)
    if key is not None:
        digest = await anyio.to_thread.run_sync(fingerprint, context.request, prepared, mode)
        terms = replace(terms, idempotency_key=key, fingerprint=digest)
    return await context.door.submit(previewing(prepared.job, prepared.previews), terms)


async def own_job(context: Context, job_id: str) -> JobStatus:
    """Where a job of this caller stands; those of others are not there."""
    status = await context.broker.status(job_id)
    if status.caller != caller_of(context):
        raise NotFound(
            f"job: {job_id[:100]!r} is not known; results are kept for a limited time",
            code="job_not_found",
            param="job",
        )
    return status


async def ended_within(context: Context, job_id: str, seconds: float) -> tuple[JobStatus, JobResult | None]:
    """Where a job stands when it has ended, or after so many seconds; its result when it was completed.

    The job goes on whatever happens to who waits; raises ``Canceled`` when that is gone.
    """
    work = asyncio.ensure_future(context.broker.wait(job_id, seconds))
    gone = asyncio.ensure_future(disconnected(context.request))
    leaving = asyncio.ensure_future(drain_of(context).abandoned.wait())
    tasks = (work, gone, leaving)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not work.done():
            raise Canceled("the client went away; the job goes on")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    status = await context.broker.status(job_id)
    if work.cancelled() or (isinstance(work.exception(), TimedOut) and status.state not in FINAL):
        return status, None
    error = work.exception()
    if error is not None and status.state not in FINAL:
        raise error
    return status, None if error is not None else work.result()
