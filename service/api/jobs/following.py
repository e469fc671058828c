"""A job and what happens to it on the way, for answers that come in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

from service.api.context import Context
from service.api.jobs.keeping import previewing
from service.api.running import timing_of
from service.api.schemas import Timing
from service.broker.base import Event
from service.errors import ServiceError, Unavailable
from service.jobs import Job, JobResult, JobState

KEPT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Completed:
    """The end of a job that was completed."""

    job_id: str
    result: JobResult
    timing: Timing


async def follow(context: Context, job: Job, *, previews: int = 0) -> AsyncGenerator[Event | Completed, None]:
    """Submit a job and tell what happens to it, to its end: the broker's events, and last :class:`Completed`.

    The first event is ``queued``: what refuses the job is raised instead of it. Up to ``previews`` of the events are
    previews. Raises the error of a job that fails. Closing the generator before the end cancels the job, since nobody
    would see its result: use ``contextlib.aclosing``.
    """
    start, ended = time.monotonic(), False
    # Kept no longer than it takes to be read here.
    await context.door.submit(previewing(job, previews), context.terms(keep_seconds=KEPT_SECONDS, detached=True))
    try:
        async with aclosing(context.broker.events(job.id)) as events:
            async for event in events:
                if event.final:
                    ended = True
                if event.kind == JobState.COMPLETED:
                    break
                if event.final:
                    raise ServiceError.from_wire(event.data)
                yield event
        result = await context.broker.result(job.id)
        ended = True
        if result is None:
            raise Unavailable("the queue lost this request; send it again", code="broker_unreachable", retry_after=1.0)
        timing = timing_of(context, job, result, time.monotonic() - start)
        yield Completed(job_id=job.id, result=result, timing=timing)
    finally:
        if not ended:
            await given_up(context, job.id)


async def given_up(context: Context, job_id: str) -> None:
    """Cancel a job that nobody waits for any more, even where the one who waited is being canceled."""
    await asyncio.shield(_canceled(context, job_id))


async def _canceled(context: Context, job_id: str) -> None:
    # Without the broker it ends by itself, at the latest when its time is over.
    with suppress(Unavailable):
        await context.broker.cancel(job_id)
