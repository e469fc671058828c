"""Who waits in this process for the end of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from service.broker.redis.records import Outcome


@dataclass
class _Wait:
    ended: asyncio.Future[Outcome]
    since: float
    waiters: int = 0
    attached: bool = False
    """The job was submitted here, and ends when nobody waits."""
    accepted: bool = False
    """Until then it is no wonder that the broker knows no such job."""


class Waits:
    """One future a job, however many wait for it."""

    def __init__(self) -> None:
        self._waits: dict[str, _Wait] = {}

    def add(self, job_id: str, *, attached: bool) -> None:
        """Expect a job's end, before it can come."""
        if job_id not in self._waits:
            loop = asyncio.get_running_loop()
            self._waits[job_id] = _Wait(loop.create_future(), loop.time())
        self._waits[job_id].waiters += 1
        self._waits[job_id].attached |= attached

    def accepted(self, job_id: str) -> None:
        """The broker has it."""
        if job_id in self._waits:
            self._waits[job_id].accepted = True

    def drop(self, job_id: str) -> None:
        """One waiter less."""
        wait = self._waits.get(job_id)
        if wait is not None:
            wait.waiters -= 1
            if wait.waiters <= 0:
                del self._waits[job_id]

    def ended(self, job_id: str) -> asyncio.Future[Outcome]:
        """Resolved when the job has ended, of one that is expected."""
        return self._waits[job_id].ended

    def resolve(self, job_id: str, outcome: Outcome) -> None:
        """Tell all who wait."""
        wait = self._waits.get(job_id)
        if wait is not None and not wait.ended.done():
            wait.ended.set_result(outcome)

    def open(self, older_than: float = 0.0) -> list[str]:
        """Jobs whose end has not been heard of for so many seconds."""
        oldest = asyncio.get_running_loop().time() - older_than
        return [
            job_id
            for job_id, wait in self._waits.items()
            if wait.accepted and not wait.ended.done() and wait.since <= oldest
        ]

    @property
    def empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waits

    def is_attached(self, job_id: str) -> bool:
        """Whether the job was submitted here to be waited for, and has not been answered."""
        return job_id in self._waits and self._waits[job_id].attached


def chunks(ids: list[str], size: int) -> Iterable[list[str]]:
    """The ids, some at a time."""
    return (ids[i : i + size] for i in range(0, len(ids), size))
