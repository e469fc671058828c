"""The embedded broker: all state in the API process, one event loop, no locks.

Workers reach it through :mod:`service.broker.socket`. What becomes of jobs is decided in
:mod:`service.broker.ledger`; this is its event loop: who waits is woken.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from service.broker.base import (
    RETRY_AFTER_SECONDS,
    USUAL,
    Accepted,
    Broker,
    Command,
    Event,
    Held,
    JobStatus,
    Limits,
    Orders,
    QueueStats,
    Terms,
    WorkerStatus,
)
from service.broker.ledger import Entry, Ledger
from service.errors import NotFound, ServiceError, TimedOut, Unavailable
from service.jobs import FINAL, Job, JobResult, JobState, Lane, ModelInfo, WorkerInfo

log = logging.getLogger(__name__)
SWEEP_SECONDS = 0.5
_EVENT_ID = re.compile(r"[0-9]{1,19}")


@dataclass
class _Worker:
    info: WorkerInfo
    heard: float
    measurements: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    commands: list[Command] = field(default_factory=list)


class MemoryBroker(Broker):
    """Broker of one host. The worker's face takes the worker's id first; the socket server calls it."""

    def __init__(self, limits: Limits, *, sweep_seconds: float = SWEEP_SECONDS) -> None:
        self._limits, self._sweep_seconds = limits, sweep_seconds
        self._ledger = Ledger(limits, self._on_change)
        self._workers: dict[str, _Worker] = {}
        self._models: dict[str, ModelInfo] = {}
        self._arrival = asyncio.Event()
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._sweeper: asyncio.Task[None] | None = None

    # The API's face.

    async def start(self) -> None:
        """Look after leases, time limits and what is to be forgotten."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stop looking."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def check(self, model: str, cost: int, caller: str = "", caller_cost: int = 0) -> None:
        """Raises ``Overloaded`` when the queue is full, ``Unavailable`` without a worker."""
        if not any(model in (m.name for m in w.info.models) for w in self._live_workers()):
            raise Unavailable(
                f"no worker is ready for model {model!r}; one is starting, busy or being replaced",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self._ledger.check(cost, caller, caller_cost)

    async def submit(self, job: Job, terms: Terms = USUAL) -> Accepted:
        """Accept a job, or find the one it repeats; raises as :meth:`check` does."""
        if earlier := self._ledger.repeated(terms):
            return earlier
        await self.check(job.model, job.cost, terms.caller, terms.caller_cost)
        return self._ledger.submit(job, terms)

    async def wait(self, job_id: str, timeout: float) -> JobResult:
        """The job's result; a job that is not detached is canceled when it takes longer, and forgotten after."""
        entry = self._entry(job_id)
        try:
            with self._watch(job_id) as changed:
                async with asyncio.timeout(timeout):
                    while entry.state not in FINAL:
                        changed.clear()
                        await changed.wait()
        except TimeoutError:
            if entry.terms.detached:
                raise TimedOut(f"not finished within {timeout:g} seconds; the job goes on") from None
            self._ledger.cancel(job_id)
            raise TimedOut(f"not finished within {timeout:g} seconds; the work was canceled") from None
        finally:
            if not entry.terms.detached and entry.state in FINAL and job_id in self._ledger.entries:
                self._ledger.forget(job_id)
        return self._outcome(entry)

    async def cancel(self, job_id: str) -> bool:
        """Give a job up."""
        return self._ledger.cancel(job_id)

    async def status(self, job_id: str) -> JobStatus:
        """Where a job stands."""
        return self._ledger.status(self._entry(job_id))

    async def result(self, job_id: str) -> JobResult | None:
        """What came of a job that has ended."""
        entry = self._entry(job_id)
        return self._outcome(entry) if entry.state in FINAL else None

    async def recipe(self, job_id: str) -> bytes:
        """What the job's answer is made of."""
        return self._entry(job_id).terms.recipe

    async def jobs(self, caller: str, limit: int = 100) -> Sequence[JobStatus]:
        """The caller's detached jobs, newest first."""
        entries = reversed(self._ledger.entries.values())
        own = (e for e in entries if e.terms.detached and e.terms.caller == caller)
        return [self._ledger.status(entry) for entry in islice(own, limit)]

    async def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[Event, None]:
        """A job's events, to its last."""
        entry = self._entry(job_id)
        if not entry.terms.detached:
            raise self._unknown(job_id)
        seen = int(after) if after is not None and _EVENT_ID.fullmatch(after) else 0
        with self._watch(job_id) as changed:
            while True:
                changed.clear()
                for event in [event for event in entry.events if int(event.id) > seen]:
                    seen = int(event.id)
                    yield event
                if entry.state in FINAL and seen >= entry.num_events:
                    return
                await changed.wait()

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
        """Queue depth and age, and counts."""
        return self._ledger.stats()

    async def command(self, command: Command) -> int:
        """Tell every worker with its next heartbeat."""
        for worker in self._workers.values():
            worker.commands.append(command)
        return len(self._workers)

    def announce(self, models: Sequence[ModelInfo]) -> None:
        """Make models known before a worker has registered them."""
        self._models.update({m.name: m for m in models})

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        return self._ledger.idle

    def abandon(self) -> None:
        """End every job that is left, because the service stops."""
        self._ledger.end_all(Unavailable("the service is shutting down", code="draining"))

    # The worker's face, by worker id.

    def register(self, info: WorkerInfo) -> None:
        """Add a worker, or what one serves now."""
        known = self._workers.get(info.id)
        before = {m.name for m in known.info.models} if known else set()
        if known is None:
            self._workers[info.id] = _Worker(info, time.monotonic())
        else:
            known.info, known.heard = info, time.monotonic()
        self.announce(info.models)
        for name in before - {m.name for w in self._workers.values() for m in w.info.models}:
            # It was unloaded, not lost with its worker.
            self._models.pop(name, None)
        self._arrival.set()

    def unregister(self, worker_id: str) -> None:
        """Remove a worker that left or died; what it owned is given on."""
        self._workers.pop(worker_id, None)
        self._ledger.give_on_all(worker_id)

    async def claim(self, worker_id: str, lanes: Collection[Lane], max_rows: int, timeout: float) -> list[Job]:
        """Lease waiting jobs that this worker can do; waits up to ``timeout`` seconds for the first."""
        deadline = time.monotonic() + timeout
        while True:
            worker = self._workers.get(worker_id)
            if worker is None:
                return []
            worker.heard = time.monotonic()
            self._arrival.clear()
            jobs = self._ledger.take(worker_id, {m.name for m in worker.info.models}, lanes, max_rows)
            remaining = deadline - time.monotonic()
            if jobs or remaining <= 0:
                return jobs
            try:
                async with asyncio.timeout(remaining):
                    await self._arrival.wait()
            except TimeoutError:
                return []

    def heartbeat(self, worker_id: str, held: Sequence[Held], measurements: Sequence[Mapping[str, Any]] = ()) -> Orders:
        """Renew leases; what is lost, and what an operator wants."""
        worker = self._workers.get(worker_id)
        lost = self._ledger.renew(worker_id, held)
        if worker is None:
            return Orders(lost=lost)
        worker.heard = time.monotonic()
        worker.measurements = measurements or worker.measurements
        commands, worker.commands = tuple(worker.commands), []
        return Orders(lost=lost, commands=commands)

    def publish(self, worker_id: str, job_id: str, attempt: int, kind: str, data: Mapping[str, Any]) -> None:
        """Add an event, from the job's present owner only."""
        self._ledger.publish(worker_id, job_id, attempt, kind, data)

    def complete(self, worker_id: str, job_id: str, attempt: int, result: JobResult) -> bool:
        """Accept a result from the job's present owner only."""
        return self._ledger.finish(worker_id, job_id, attempt, result)

    def fail(self, worker_id: str, job_id: str, attempt: int, error: ServiceError) -> bool:
        """End a job with an error from its present owner only."""
        return self._ledger.finish(worker_id, job_id, attempt, error)

    def release(self, worker_id: str, job_id: str, attempt: int) -> None:
        """Put a job back to its place in the queue without counting the attempt."""
        self._ledger.release(worker_id, job_id, attempt)

    def sweep(self) -> None:
        """What time does; called regularly after :meth:`start`."""
        if count := self._ledger.sweep():
            log.warning("%d jobs were given on: their worker has not been heard", count)

    # Waking who waits.

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_seconds)
            self.sweep()

    def _live_workers(self) -> list[_Worker]:
        oldest = time.monotonic() - self._limits.ready_seconds
        return [w for w in self._workers.values() if w.heard >= oldest]

    def _entry(self, job_id: str) -> Entry:
        entry = self._ledger.entries.get(job_id)
        if entry is None:
            raise self._unknown(job_id)
        return entry

    @staticmethod
    def _unknown(job_id: str) -> NotFound:
        return NotFound(
            f"job: {job_id[:100]!r} is not known; results are kept for a limited time",
            code="job_not_found",
            param="job",
        )

    @staticmethod
    def _outcome(entry: Entry) -> JobResult:
        if isinstance(entry.outcome, ServiceError):
            raise entry.outcome
        if entry.outcome is None:
            raise RuntimeError("asked for the outcome of a job that has not ended")
        return entry.outcome

    def _on_change(self, entry: Entry) -> None:
        if entry.state is JobState.QUEUED:
            self._arrival.set()
        for watcher in self._watchers.get(entry.job.id, ()):
            watcher.set()

    @contextmanager
    def _watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something has happened to the job."""
        changed = asyncio.Event()
        self._watchers[job_id].add(changed)
        try:
            yield changed
        finally:
            self._watchers[job_id].discard(changed)
            if not self._watchers[job_id]:
                del self._watchers[job_id]
