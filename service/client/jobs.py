"""Jobs that outlive their connections."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any, Generic, TypeVar

from service.client import errors
from service.client.answers import Answer, JobDocument
from service.client.caller import Caller, canceling, document_of, reader_of
from service.client.calls import Call, path
from service.client.errors import Unfinished
from service.client.events import Event
from service.jobs import FINAL

T = TypeVar("T")
WAIT_SECONDS = 5.0
"""The service is asked again after so long; it answers before, when the job ends."""


class AsyncJob(Generic[T]):
    """A job, and where it stood when it was last asked about."""

    def __init__(self, caller: Caller, data: dict[str, Any]) -> None:
        self._caller, self._data = caller, data
        self.document = document_of(data)

    @property
    def id(self) -> str:
        """By which any client with the same key finds it again."""
        return self.document.id

    async def refresh(self) -> JobDocument:
        """Ask where it stands."""
        return self._set(await self._caller.job(self.id))

    async def wait(self, timeout: float | None = None) -> JobDocument:
        """Return when it has ended, however it did, or after so many seconds: where it stands then."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.document.state not in FINAL:
            left = WAIT_SECONDS if deadline is None else min(WAIT_SECONDS, deadline - time.monotonic())
            if left <= 0:
                break
            self._set(await self._caller.job(self.id, wait=left))
        return self.document

    async def result(self, timeout: float | None = None) -> T:
        """Its answer, when it is there; raises its error, or ``Unfinished`` after so many seconds."""
        await self.wait(timeout)
        if self.document.error is not None:
            raise errors.of_body(self.document.error.model_dump())
        if self.document.state not in FINAL:
            raise Unfinished(f"job {self.id!r} is {self.document.state} after {timeout:g} seconds; it goes on")
        if self._data.get("result") is None:
            await self.refresh()
        value: T = reader_of(self.document.op)(self._data["result"])
        return value

    async def cancel(self) -> JobDocument:
        """Give it up, unless it has ended; returns where it stands."""
        return self._set(await self._caller.answer(canceling(self.id)))

    def events(self, after: str | None = None) -> AsyncGenerator[Event[T], None]:
        """All that happened and happens to it, from the beginning or behind the event with this id, to its end."""
        return self._caller.events(self.id, reader_of(self.document.op), after)

    def _set(self, data: dict[str, Any]) -> JobDocument:
        self._data, self.document = data, document_of(data)
        return self.document


class AsyncJobs:
    """The caller's jobs."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def get(self, job_id: str) -> AsyncJob[Answer]:
        """A job by its id; raises ``NotFound`` when it is not the caller's, or was forgotten."""
        return AsyncJob(self._caller, await self._caller.job(job_id))

    async def list(self, limit: int = 20) -> list[JobDocument]:
        """The latest jobs, the newest first."""
        return await self._caller.answer(
            Call(
                method="GET",
                path=path("jobs"),
                params={"limit": limit},
                read=lambda answer: [document_of(data) for data in answer["data"]],
            )
        )

    async def wait(self, job_id: str, timeout: float | None = None) -> JobDocument:
        """See :meth:`AsyncJob.wait`."""
        return await (await self.get(job_id)).wait(timeout)

    async def result(self, job_id: str, timeout: float | None = None) -> Answer:
        """See :meth:`AsyncJob.result`."""
        return await (await self.get(job_id)).result(timeout)

    async def cancel(self, job_id: str) -> JobDocument:
        """See :meth:`AsyncJob.cancel`."""
        found = await self._caller.answer(canceling(job_id))
        return document_of(found)

    async def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[Event[Answer], None]:
        """See :meth:`AsyncJob.events`."""
        job = await self.get(job_id)
        async for event in job.events(after):
            yield event
