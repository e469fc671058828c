"""Jobs that are kept: submitted to outlive their connection, found by their callers alone, waited for."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import anyio.to_thread

from service import logs
from service.api.context import Context
from service.api.jobs.wishes import Wishes, fingerprint
from service.api.recipes.base import Prepared
from service.api.recipes.stored import packed, unknown_job
from service.api.running import disconnected
from service.broker.base import Accepted, JobStatus
from service.drain import Drain
from service.ending import ended
from service.errors import Canceled, TimedOut, Unavailable
from service.jobs import FINAL, Job, JobResult

KEPT_SECONDS = 60.0
"""Long enough to be read by who follows a job on one connection, and nobody later."""


def previewing(job: Job, previews: int) -> Job:
    """The job, asked for so many states on the way."""
    return replace(job, payload={**job.payload, "previews": previews}) if previews else job


def drain_of(context: Context) -> Drain:
    """Whether this process leaves."""
    drain: Drain = context.request.app.state.drain
    return drain


async def keep(context: Context, prepared: Prepared, wishes: Wishes) -> Accepted:
    """Submit a job to be kept with its recipe, or find the one that it repeats."""
    settings, key = context.settings, wishes.idempotency_key
    recipe = await anyio.to_thread.run_sync(packed, prepared)
    # Who goes away with the connection has no more time than it.
    timeout = settings.job_timeout if wishes.outlives else context.timeout
    terms = context.terms(timeout=timeout, keep_seconds=settings.result_seconds, detached=True, recipe=recipe)
    if key is not None:
        digest = await anyio.to_thread.run_sync(fingerprint, context.request, prepared, wishes.mode)
        terms = replace(terms, idempotency_key=key, fingerprint=digest)
    return await context.door.submit(previewing(prepared.job, prepared.previews), terms)


async def own_job(context: Context, job_id: str) -> JobStatus:
    """Where a job of this caller stands; those of others are not there."""
    status = await context.broker.status(job_id)
    if status.caller != context.caller.name:
        raise unknown_job(job_id)
    logs.bind(job_id=job_id)
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
        await ended(*tasks)
    status = await context.broker.status(job_id)
    if work.cancelled() or (isinstance(work.exception(), TimedOut) and status.state not in FINAL):
        return status, None
    error = work.exception()
    if error is not None and status.state not in FINAL:
        raise error
    return status, None if error is not None else work.result()


async def given_up(context: Context, job_id: str) -> None:
    """Cancel a job that nobody waits for any more, even where the one who waited is being canceled."""
    await asyncio.shield(_canceled(context, job_id))


async def _canceled(context: Context, job_id: str) -> None:
    # Without the broker it ends by itself, at the latest when its time is over.
    with suppress(Unavailable):
        await context.broker.cancel(job_id)
