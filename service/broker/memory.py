"""The embedded broker: all state in the API process, one event loop, no locks.

Workers reach it through :mod:`service.broker.socket`. The state machine below is synchronous; time is
read from one monotonic clock.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.broker.base import Broker, QueueStats, WorkerStatus
from service.errors import Canceled, Overloaded, ServiceError, TimedOut, Unavailable, WorkerLost
from service.jobs import Job, JobResult, ModelInfo, Op, WorkerInfo

RETRY_AFTER_SECONDS = 2.0


@dataclass
class _Entry:
    """A job that has not ended."""

    job: Job
    submitted: float
    outcome: asyncio.Future[JobResult]
    owner: str | None = None
    lease_until: float = 0.0
    started: float | None = None
    progress: float = 0.0


@dataclass
class _Worker:
    info: WorkerInfo
    heard: float
    measurements: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


class MemoryBroker(Broker):
    """Broker of one host. Methods without ``async`` are the worker's face, called by the socket server."""

    def __init__(self, *, max_queue_cost: int, lease_seconds: float, ready_seconds: float, max_attempts: int) -> None:
        self._max_queue_cost = max_queue_cost
        self._lease_seconds = lease_seconds
        self._ready_seconds = ready_seconds
        self._max_attempts = max_attempts
        self._entries: dict[str, _Entry] = {}
        self._outcomes: dict[str, asyncio.Future[JobResult]] = {}  # until they are fetched
        self._waiting: list[str] = []  # ids in the order of their first submission
        self._waiting_cost = 0
        self._workers: dict[str, _Worker] = {}
        self._models: dict[str, ModelInfo] = {}
        self._arrival = asyncio.Event()
        self._draining = False

    # The API's face.

    async def check(self, model: str, cost: int) -> None:
        """Raises ``Overloaded`` when the queue is full, ``Unavailable`` without a worker or when draining."""
        if self._draining:
            raise Unavailable("the service is shutting down", code="draining", retry_after=RETRY_AFTER_SECONDS)
        if not any(model in (m.name for m in w.info.models) for w in self._live_workers()):
            raise Unavailable(
                f"no worker is ready for model {model!r}; one is starting, busy or being replaced",
                retry_after=RETRY_AFTER_SECONDS,
            )
        # A job that alone exceeds the bound is let in when nothing waits: refusing it always would be a lie.
        if self._waiting and self._waiting_cost + cost > self._max_queue_cost:
            raise Overloaded(
                f"the queue is full ({self._waiting_cost} of {self._max_queue_cost} units wait, this request costs "
                f"{cost}); try again later",
                retry_after=RETRY_AFTER_SECONDS,
            )

    async def submit(self, job: Job) -> None:
        """Accept a job; raises as :meth:`check` does."""
        await self.check(job.model, job.cost)
        outcome: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self._outcomes[job.id] = outcome
        self._entries[job.id] = _Entry(job, time.monotonic(), outcome)
        self._enqueue(self._entries[job.id])

    async def wait(self, job_id: str, timeout: float) -> JobResult:
        """The job's result; cancels the job when it takes longer than ``timeout`` seconds."""
        outcome = self._outcomes[job_id]
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(outcome)
        except TimeoutError:
            await self.cancel(job_id)
            raise TimedOut(f"not finished within {timeout:g} seconds; the work was canceled") from None
        finally:
            self._outcomes.pop(job_id, None)

    async def cancel(self, job_id: str) -> None:
        """Give a job up."""
        entry = self._entries.get(job_id)
        if entry is not None:
            self._end(entry, Canceled("the request was canceled"))

    async def models(self) -> Sequence[ModelInfo]:
        """Every known model, by name; a model stays known while its worker restarts."""
        return [self._models[name] for name in sorted(self._models)]

    async def workers(self) -> Sequence[WorkerStatus]:
        """Registered workers with the age of their heartbeat."""
        now = time.monotonic()
        return [
            WorkerStatus(info=w.info, heartbeat_age=now - w.heard, measurements=w.measurements)
            for w in self._workers.values()
        ]

    async def stats(self) -> QueueStats:
        """Queue depth and age."""
        waiting = [self._entries[i] for i in self._waiting]
        now = time.monotonic()
        return QueueStats(
            waiting=Counter(e.job.op for e in waiting),
            running=Counter(e.job.op for e in self._entries.values() if e.owner is not None),
            waiting_cost=self._waiting_cost,
            oldest_wait_seconds=max((now - e.submitted for e in waiting), default=0.0),
        )

    def announce(self, models: Sequence[ModelInfo]) -> None:
        """Make models known before a worker has registered them."""
        self._models.update({m.name: m for m in models})

    def drain(self) -> None:
        """Accept nothing more; what was accepted goes on."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        return not self._entries

    def abandon(self) -> None:
        """End every job that is left, because the service stops."""
        for entry in list(self._entries.values()):
            self._end(entry, Unavailable("the service is shutting down", code="draining"))

    @property
    def draining(self) -> bool:
        """Whether :meth:`drain` was called."""
        return self._draining

    # The worker's face, by worker id.

    def register(self, info: WorkerInfo) -> None:
        """Add or replace a worker."""
        self._workers[info.id] = _Worker(info, time.monotonic())
        self.announce(info.models)

    def unregister(self, worker_id: str) -> None:
        """Remove a worker that left or died; what it owned is given on."""
        self._workers.pop(worker_id, None)
        for entry in [e for e in self._entries.values() if e.owner == worker_id]:
            self._give_on(entry)

    async def claim(self, worker_id: str, ops: Collection[Op], max_rows: int, timeout: float) -> list[Job]:
        """Lease the oldest waiting jobs that this worker can do; waits up to ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            worker = self._workers.get(worker_id)
            if worker is None:
                return []
            worker.heard = time.monotonic()
            self._arrival.clear()
            jobs = self._take(worker, ops, max_rows)
            remaining = deadline - time.monotonic()
            if jobs or remaining <= 0:
                return jobs
            try:
                async with asyncio.timeout(remaining):
                    await self._arrival.wait()
            except TimeoutError:
                return []

    def _take(self, worker: _Worker, ops: Collection[Op], max_rows: int) -> list[Job]:
        names = {m.name for m in worker.info.models}
        now, rows = time.monotonic(), 0
        jobs: list[Job] = []
        for job_id in list(self._waiting):
            entry = self._entries[job_id]
            if entry.job.op not in ops or entry.job.model not in names:
                continue
            if jobs and (rows + entry.job.rows > max_rows or entry.job.attempt > 1):
                break
            self._waiting.remove(job_id)
            self._waiting_cost -= entry.job.cost
            entry.owner, entry.lease_until = worker.info.id, now + self._lease_seconds
            entry.started = now
            rows += entry.job.rows
            jobs.append(entry.job)
            if entry.job.attempt > 1:
                # It may be what its worker died of, and must not take others along again.
                break
        return jobs

    def heartbeat(
        self, worker_id: str, progress: Mapping[str, float], measurements: Sequence[Mapping[str, Any]]
    ) -> set[str]:
        """Renew leases; returns the ids this worker does not own."""
        now = time.monotonic()
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.heard = now
            if measurements:
                worker.measurements = measurements
        lost = set()
        for job_id, fraction in progress.items():
            entry = self._entries.get(job_id)
            if entry is None or entry.owner != worker_id:
                lost.add(job_id)
                continue
            entry.lease_until, entry.progress = now + self._lease_seconds, fraction
        return lost

    def complete(self, worker_id: str, job_id: str, attempt: int, result: JobResult) -> bool:
        """Accept a result from the job's present owner only."""
        entry = self._owned(worker_id, job_id, attempt)
        if entry is None:
            return False
        queued = (entry.started or entry.submitted) - entry.submitted
        self._end(entry, replace(result, queue_seconds=queued))
        return True

    def fail(self, worker_id: str, job_id: str, attempt: int, error: ServiceError) -> bool:
        """End a job with an error from its present owner only."""
        entry = self._owned(worker_id, job_id, attempt)
        if entry is None:
            return False
        self._end(entry, error)
        return True

    def release(self, worker_id: str, job_id: str, attempt: int) -> None:
        """Put a job back to the front of the queue without counting the attempt."""
        entry = self._owned(worker_id, job_id, attempt)
        if entry is not None:
            self._enqueue(entry)

    def reclaim_expired(self) -> int:
        """Give on the jobs whose leases have run out; called regularly. Returns how many."""
        now = time.monotonic()
        expired = [e for e in self._entries.values() if e.owner is not None and e.lease_until < now]
        for entry in expired:
            self._give_on(entry)
        return len(expired)

    # State transitions.

    def _live_workers(self) -> list[_Worker]:
        oldest = time.monotonic() - self._ready_seconds
        return [w for w in self._workers.values() if w.heard >= oldest]

    def _owned(self, worker_id: str, job_id: str, attempt: int) -> _Entry | None:
        entry = self._entries.get(job_id)
        if entry is None or entry.owner != worker_id or entry.job.attempt != attempt:
            return None
        return entry

    def _enqueue(self, entry: _Entry) -> None:
        entry.owner = None
        # Of several jobs that come back, the one that was submitted first is the first again.
        place = bisect(self._waiting, entry.submitted, key=lambda i: self._entries[i].submitted)
        self._waiting.insert(place, entry.job.id)
        self._waiting_cost += entry.job.cost
        self._arrival.set()

    def _give_on(self, entry: _Entry) -> None:
        """Another attempt for a job whose worker is gone, or its end when there were too many."""
        if entry.job.attempt >= self._max_attempts:
            self._end(entry, WorkerLost(f"{entry.job.attempt} workers in a row were lost while doing this request"))
            return
        entry.job = replace(entry.job, attempt=entry.job.attempt + 1)
        self._enqueue(entry)

    def _end(self, entry: _Entry, outcome: JobResult | ServiceError) -> None:
        del self._entries[entry.job.id]
        if entry.job.id in self._waiting:
            self._waiting.remove(entry.job.id)
            self._waiting_cost -= entry.job.cost
        if isinstance(outcome, ServiceError):
            entry.outcome.set_exception(outcome)
            # The waiter may have gone; an error that nobody retrieves is not worth a log line.
            entry.outcome.exception()
        else:
            entry.outcome.set_result(outcome)
