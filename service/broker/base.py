"""The broker's two faces.

Promise: a job is executed at least once and has exactly one visible result. A worker owns a job under
a lease that heartbeats renew; the attempt number fences late results of workers that lost theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.errors import ServiceError
from service.jobs import Job, JobResult, ModelInfo, Op, WorkerInfo


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """A registered worker as the API sees it."""

    info: WorkerInfo
    heartbeat_age: float
    """Seconds since the worker's inference loop was last heard."""
    measurements: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """The worker's metrics, as :mod:`service.metrics` renders them."""


@dataclass(frozen=True, kw_only=True)
class QueueStats:
    """What waits and what runs, by op."""

    waiting: Mapping[Op, int]
    running: Mapping[Op, int]
    waiting_cost: int
    oldest_wait_seconds: float


class Broker(Protocol):
    """The API's face; every method runs on its event loop."""

    async def check(self, model: str, cost: int) -> None:
        """Raise what :meth:`submit` would for such a job, before work is spent on preparing it."""

    async def submit(self, job: Job) -> None:
        """Accept a job; raises :class:`~service.errors.Overloaded` or ``Unavailable`` at the door."""

    async def wait(self, job_id: str, timeout: float) -> JobResult:
        """The job's result, once. Raises the job's error, or ``TimedOut`` and cancels the job."""

    async def cancel(self, job_id: str) -> None:
        """Give a job up; workers drop its rows at their next slice. Unknown ids are ignored."""

    async def models(self) -> Sequence[ModelInfo]:
        """Every model that is known to be served, by name."""

    async def workers(self) -> Sequence[WorkerStatus]:
        """The workers that are registered now."""

    async def stats(self) -> QueueStats:
        """Queue depth and age."""


class WorkerBroker(Protocol):
    """The worker's face; every method blocks."""

    def register(self, info: WorkerInfo) -> None:
        """Announce a worker that has loaded and warmed up its models."""

    def claim(self, ops: Collection[Op], max_rows: int, timeout: float) -> list[Job]:
        """Take waiting jobs of these ops, oldest first, up to ``max_rows`` images (but at least one job).

        Waits up to ``timeout`` seconds for the first.
        """

    def heartbeat(self, progress: Mapping[str, float], measurements: Sequence[Mapping[str, Any]]) -> set[str]:
        """Renew the leases of the jobs in ``progress`` (id → fraction done).

        Returns the ids that this worker no longer owns: canceled, finished elsewhere, or given on.
        """

    def complete(self, job: Job, result: JobResult) -> bool:
        """Deliver a result; ``False`` when the job's attempt is no longer this worker's."""

    def fail(self, job: Job, error: ServiceError) -> bool:
        """End a job with an error; ``False`` as for :meth:`complete`."""

    def release(self, job: Job) -> None:
        """Hand a job back unfinished, for another worker, without counting an attempt."""

    def close(self) -> None:
        """Leave; jobs still owned are given on at once."""
