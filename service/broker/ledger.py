"""The embedded broker's state machine: what waits, who has what, what came of it. No I/O, no asyncio.

``lua/*.lua`` is the same for Redis; the contract suite holds both to the same behaviour.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

from service.broker.base import RETRY_AFTER_SECONDS, Accepted, Ending, Event, Held, JobStatus, Limits, QueueStats, Terms
from service.broker.fairness import Turn, VirtualClock
from service.broker.kept import ENTRY_BYTES, EVENT_BYTES, Kept, size_of
from service.errors import Canceled, InvalidRequest, Overloaded, ServiceError, TimedOut, WorkerLost
from service.jobs import FINAL, Job, JobResult, JobState, Lane, lane_of

MOST_EVENTS = 1000
"""Events of one job that are kept; the oldest go first."""
URGENT_FIRST = (Lane.URGENT, Lane.LONG)


@dataclass
class Entry:
    """A job from its acceptance until it is forgotten."""

    job: Job
    terms: Terms
    turn: Turn
    created: float
    """Unix time; the next ones are on the ledger's clock."""
    submitted: float
    state: JobState = JobState.QUEUED
    owner: str | None = None
    lease_until: float = 0.0
    started: float | None = None
    fraction: float = 0.0
    block: int | None = None
    ended: float | None = None
    outcome: JobResult | ServiceError | None = None
    events: list[Event] = field(default_factory=list)
    num_events: int = 0

    @property
    def deadline(self) -> float:
        """When it is ended, done or not."""
        return self.submitted + self.terms.timeout

    @property
    def forgotten(self) -> float:
        """When an entry that has ended goes."""
        return (self.ended or 0.0) + self.terms.keep_seconds

    @property
    def key(self) -> tuple[str, str] | None:
        """Under which a repetition finds it."""
        name = self.terms.idempotency_key
        return None if name is None else (self.terms.caller, name)


class Ledger:
    """All jobs of one broker."""

    def __init__(
        self, limits: Limits, changed: Callable[[Entry], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``changed`` is called when a job has ended or has a new event."""
        self.limits, self._changed, self._clock = limits, changed, clock
        self.entries: dict[str, Entry] = {}
        self._live: dict[str, Entry] = {}  # those that have not ended: what is kept must cost no time
        self._ends: list[tuple[float, str]] = []  # heap of the others, by when they are forgotten at the latest
        self._queues: dict[Lane, list[tuple[Turn, str]]] = {lane: [] for lane in Lane}
        self._clocks = {lane: VirtualClock() for lane in Lane}
        self._keys: dict[tuple[str, str], str] = {}
        self._cost_of: Counter[str] = Counter()  # waiting, by caller
        self._open_cost_of: Counter[str] = Counter()  # waiting and running, by caller
        self._waiting_cost = 0
        self._open: Counter[Lane] = Counter()  # jobs that have not ended
        self._number = 0
        self._kept = Kept(limits.max_kept_bytes)
        self._reclaimed = self._dead = 0
        self._endings: Counter[Ending] = Counter()

    # What callers do.

    def check(self, cost: int, caller: str, caller_cost: int = 0) -> None:
        """Raise ``Overloaded`` where a job of that cost is not let in."""
        limit, waiting = self.limits.max_queue_cost, self._waiting_cost
        # A job that alone exceeds a bound is let in when nothing waits: refusing it always would be a lie.
        if waiting and waiting + cost > limit:
            raise Overloaded(
                f"the queue is full ({waiting} of {limit} units wait, this request costs {cost}); try again later",
                retry_after=RETRY_AFTER_SECONDS,
            )
        own, share = self._cost_of[caller], int(limit * self.limits.caller_share)
        if caller and own and own + cost > share:
            raise Overloaded(
                f"your share of the queue is full ({own} of {share} units wait, this request costs {cost}); "
                "try again when some of your requests are done",
                code="share_full",
                retry_after=RETRY_AFTER_SECONDS,
            )
        flying = self._open_cost_of[caller] if caller_cost else 0
        if flying and flying + cost > caller_cost:
            raise Overloaded(
                f"your key allows {caller_cost} units at once ({flying} are waiting or running, this request costs "
                f"{cost}); try again when some of your requests are done",
                code="concurrency_limit_exceeded",
                retry_after=RETRY_AFTER_SECONDS,
            )

    def repeated(self, terms: Terms) -> Accepted | None:
        """The earlier job that these terms repeat; raises ``InvalidRequest`` for another request under its key."""
        if terms.idempotency_key is None:
            return None
        job_id = self._keys.get((terms.caller, terms.idempotency_key))
        if job_id is None:
            return None
        if self.entries[job_id].terms.fingerprint != terms.fingerprint:
            raise InvalidRequest(
                f"Idempotency-Key: {terms.idempotency_key[:100]!r} was used for another request; take a new key",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return Accepted(job_id=job_id, repeated=True)

    def submit(self, job: Job, terms: Terms) -> Accepted:
        """Accept a job, or find the one it repeats."""
        if earlier := self.repeated(terms):
            return earlier
        if terms.detached:
            self._kept.check()
        self.check(job.cost, terms.caller, terms.caller_cost)
        self._number += 1
        lane = lane_of(job.op)
        if not self._open[lane]:
            self._clocks[lane].rest()
        self._open[lane] += 1
        turn = self._clocks[lane].turn(terms.caller, terms.priority, job.cost, self._number)
        entry = Entry(job, terms, turn, created=time.time(), submitted=self._clock())
        self.entries[job.id] = self._live[job.id] = entry
        if terms.detached:
            self._kept.add(job.id, ENTRY_BYTES + len(terms.recipe))
        self._open_cost_of[terms.caller] += job.cost
        if entry.key is not None:
            self._keys[entry.key] = job.id
        self._enqueue(entry)
        self.tell(entry, "queued")
        return Accepted(job_id=job.id)

    def cancel(self, job_id: str) -> bool:
        """End a job that nobody wants any more."""
        return self._end_open(job_id, Canceled("the request was canceled"))

    def end_all(self, error: ServiceError) -> None:
        """End every job that has not ended."""
        for job_id in list(self._live):
            self._end_open(job_id, error)

    def _end_open(self, job_id: str, error: ServiceError) -> bool:
        entry = self._live.get(job_id)
        if entry is None:
            return False
        self._end(entry, error)
        return True

    # What workers do.

    def take(self, owner: str, models: Collection[str], lanes: Collection[Lane], max_rows: int) -> list[Job]:
        """Lease the next jobs of one lane; see :meth:`~service.broker.base.WorkerBroker.claim`."""
        for lane in URGENT_FIRST:
            if lane in lanes and (jobs := self._take(owner, models, lane, max_rows)):
                return jobs
        return []

    def _take(self, owner: str, models: Collection[str], lane: Lane, max_rows: int) -> list[Job]:
        now, rows = self._clock(), 0
        chosen: list[Entry] = []
        for _, job_id in list(self._queues[lane]):
            entry = self.entries[job_id]
            if entry.deadline <= now:
                self._time_out(entry)
                continue
            if entry.job.model not in models:
                continue
            lost_before = entry.job.attempt > 1
            if chosen and (lost_before or rows + entry.job.rows > max_rows):
                break
            chosen.append(entry)
            rows += entry.job.rows
            # What was lost may be what its worker died of, and must not take others along again.
            if lost_before or rows >= max_rows:
                break
        for entry in chosen:
            self._dequeue(entry)
            self._clocks[lane].took(entry.turn)
            entry.state, entry.owner, entry.lease_until = JobState.RUNNING, owner, now + self.limits.lease_seconds
            waited = None if entry.started else now - entry.submitted
            entry.job, entry.started = replace(entry.job, waited=waited), entry.started or now
            self.tell(entry, "started", attempt=entry.job.attempt)
        return [entry.job for entry in chosen]

    def renew(self, owner: str, held: Sequence[Held]) -> frozenset[str]:
        """Extend leases; the ids that the worker has no more."""
        now, lost = self._clock(), set()
        for job in held:
            entry = self._owned(owner, job.job_id, job.attempt)
            if entry is not None and entry.deadline <= now:
                self._time_out(entry)
                entry = None
            if entry is None:
                lost.add(job.job_id)
                continue
            entry.lease_until, entry.fraction = now + self.limits.lease_seconds, job.fraction
            if job.block != entry.block:
                entry.block = job.block
                self.tell(entry, "progress", fraction=job.fraction, block=job.block)
        return frozenset(lost)

    def publish(self, owner: str, job_id: str, attempt: int, kind: str, data: Mapping[str, Any]) -> None:
        """An event of a job, by its owner only."""
        entry = self._owned(owner, job_id, attempt)
        if entry is not None:
            self.tell(entry, kind, **data)

    def finish(self, owner: str, job_id: str, attempt: int, outcome: JobResult | ServiceError) -> bool:
        """Accept an outcome from the job's present owner only."""
        entry = self._owned(owner, job_id, attempt)
        if entry is None:
            return False
        if isinstance(outcome, JobResult):
            outcome = replace(outcome, queue_seconds=(entry.started or entry.submitted) - entry.submitted)
        self._end(entry, outcome)
        return True

    def release(self, owner: str, job_id: str, attempt: int) -> None:
        """Put a job back to its old place; the attempt does not count."""
        entry = self._owned(owner, job_id, attempt)
        if entry is not None:
            self._enqueue(entry)
            self.tell(entry, "requeued", attempt=attempt, reason="handed back")

    def give_on_all(self, owner: str) -> None:
        """The jobs of a worker that left or died are given on."""
        for entry in [e for e in self._live.values() if e.owner == owner]:
            self._give_on(entry)

    # What time does.

    def sweep(self) -> int:
        """Give on what has lost its worker, end what took too long, forget what is old. Returns the given on."""
        now = self._clock()
        expired = [e for e in self._live.values() if e.owner is not None and e.lease_until < now]
        for entry in expired:
            self._give_on(entry)
        for entry in [e for e in self._live.values() if e.deadline <= now]:
            self._time_out(entry)
        while self._ends and self._ends[0][0] <= now:
            _, job_id = heappop(self._ends)
            # One that was answered may be gone already, and its id in use again.
            old = self.entries.get(job_id)
            if old is not None and old.state in FINAL and old.forgotten <= now:
                self.forget(job_id)
        return len(expired)

    def forget(self, job_id: str) -> None:
        """Remove a job that has ended."""
        entry = self.entries.pop(job_id)
        self._kept.forget(job_id)
        if entry.key is not None and self._keys.get(entry.key) == job_id:
            del self._keys[entry.key]

    # What one may know.

    def status(self, entry: Entry) -> JobStatus:
        """Where a job stands."""

        def unix(at: float | None) -> float | None:
            return None if at is None else entry.created + at - entry.submitted

        queue = self._queues[lane_of(entry.job.op)]
        waits = entry.state is JobState.QUEUED
        return JobStatus(
            id=entry.job.id,
            op=entry.job.op,
            model=entry.job.model,
            caller=entry.terms.caller,
            rows=entry.job.rows,
            state=entry.state,
            attempt=entry.job.attempt,
            progress=1.0 if entry.state is JobState.COMPLETED else entry.fraction,
            position=bisect_left(queue, (entry.turn, entry.job.id)) if waits else None,
            created=entry.created,
            started=unix(entry.started),
            ended=unix(entry.ended),
            expires=None if entry.ended is None else unix(entry.forgotten),
            error=entry.outcome if isinstance(entry.outcome, ServiceError) else None,
        )

    def stats(self) -> QueueStats:
        """Depths, ages and counts."""
        waiting = list(self._waiting())
        now = self._clock()
        return QueueStats(
            waiting=Counter(e.job.op for e in waiting),
            running=Counter(e.job.op for e in self._live.values() if e.state is JobState.RUNNING),
            waiting_cost=self._waiting_cost,
            oldest_wait_seconds=max((now - e.submitted for e in waiting), default=0.0),
            callers=sum(1 for caller, cost in self._cost_of.items() if caller and cost),
            reclaimed=self._reclaimed,
            dead=self._dead,
            ended=dict(self._endings),
        )

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        return not self._live

    # Transitions.

    def _waiting(self) -> Iterator[Entry]:
        return (self.entries[job_id] for queue in self._queues.values() for _, job_id in queue)

    def _owned(self, owner: str, job_id: str, attempt: int) -> Entry | None:
        entry = self.entries.get(job_id)
        if entry is None or entry.owner != owner or entry.job.attempt != attempt:
            return None
        return entry

    def _enqueue(self, entry: Entry) -> None:
        entry.state, entry.owner, entry.fraction, entry.block = JobState.QUEUED, None, 0.0, None
        insort(self._queues[lane_of(entry.job.op)], (entry.turn, entry.job.id))
        self._waiting_cost += entry.job.cost
        self._cost_of[entry.terms.caller] += entry.job.cost

    def _dequeue(self, entry: Entry) -> None:
        queue, place = self._queues[lane_of(entry.job.op)], (entry.turn, entry.job.id)
        del queue[bisect_left(queue, place)]
        self._waiting_cost -= entry.job.cost
        self._cost_of[entry.terms.caller] -= entry.job.cost
        if not self._cost_of[entry.terms.caller]:
            del self._cost_of[entry.terms.caller]

    def _give_on(self, entry: Entry) -> None:
        """Another attempt for a job whose worker is gone, or its end when there were too many."""
        attempt = entry.job.attempt
        self._reclaimed += 1
        if attempt >= self.limits.max_attempts:
            self._dead += 1
            self._end(entry, WorkerLost(f"{attempt} workers in a row were lost while doing this request"))
            return
        entry.job = replace(entry.job, attempt=attempt + 1)
        self._enqueue(entry)
        self.tell(entry, "requeued", attempt=attempt + 1, reason="its worker was lost")

    def _time_out(self, entry: Entry) -> None:
        timeout = entry.terms.timeout
        self._end(entry, TimedOut(f"not finished within {timeout:g} seconds; the work was canceled"))

    def _end(self, entry: Entry, outcome: JobResult | ServiceError) -> None:
        if entry.state is JobState.QUEUED:
            self._dequeue(entry)
        self._open[lane_of(entry.job.op)] -= 1
        self._open_cost_of[entry.terms.caller] -= entry.job.cost
        if not self._open_cost_of[entry.terms.caller]:
            del self._open_cost_of[entry.terms.caller]
        entry.owner, entry.ended, entry.outcome = None, self._clock(), outcome
        del self._live[entry.job.id]
        heappush(self._ends, (entry.forgotten, entry.job.id))
        # What it needed as input is not kept with its result.
        entry.job = replace(entry.job, payload={})
        how = outcome.outcome if isinstance(outcome, ServiceError) else "ok"
        self._endings[Ending(entry.job.model, entry.job.op, how)] += 1
        if isinstance(outcome, JobResult):
            if entry.terms.detached:
                self._kept.add(entry.job.id, size_of(outcome.arrays.values()))
            entry.state = JobState.COMPLETED
            self.tell(entry, entry.state)
        else:
            entry.state = JobState.CANCELED if isinstance(outcome, Canceled) else JobState.FAILED
            if entry.key is not None:
                # A repetition of what came to nothing is a new attempt.
                self._keys.pop(entry.key, None)
            self.tell(entry, entry.state, **outcome.to_wire())

    def tell(self, entry: Entry, kind: str, /, **data: Any) -> None:
        """Add an event, where events are kept, and let those who wait look."""
        if entry.terms.detached:
            self._kept.add(entry.job.id, EVENT_BYTES + size_of(data.values()))
            entry.num_events += 1
            entry.events.append(Event(id=str(entry.num_events), kind=str(kind), data=data, time=time.time()))
            if len(entry.events) > MOST_EVENTS:
                self._kept.add(entry.job.id, -EVENT_BYTES - size_of(entry.events.pop(0).data.values()))
        self._changed(entry)
