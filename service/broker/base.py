"""The broker's two faces.

Promise: a job is executed at least once and has exactly one visible result; none that was accepted is lost. A
worker owns a job under a lease that heartbeats renew; the attempt number fences late results of workers that lost
theirs. Every time and age is told by the broker's own clock, never by comparing the clocks of two processes.

Jobs wait by virtual finish time (:mod:`service.broker.fairness`): each caller gets its share, by priority.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.errors import ServiceError
from service.jobs import Job, JobResult, JobState, Lane, ModelInfo, Op, Priority, WorkerInfo

RETRY_AFTER_SECONDS = 2.0
"""What a caller is told where nothing better is known."""


class BrokerGone(ConnectionError):
    """A worker's broker closed the connection or died and will not come back; the worker has nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a broker holds to; the same for every process that uses one."""

    max_queue_cost: int
    """Most waiting work, in units of cost."""
    caller_share: float
    """Most of it that a single named caller may have waiting, 0 to 1."""
    lease_seconds: float
    """Without a heartbeat for so long, a job is given on."""
    ready_seconds: float
    """A worker that was not heard for so long does not count as live."""
    max_attempts: int
    """Workers that a job may lose before it fails."""
    max_kept_bytes: int = 2**30
    """Results of detached jobs that the embedded broker keeps at once; a Redis has its own bound."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a caller wants a job to be treated. Workers do not see this."""

    caller: str = ""
    """Whose share the job counts against; empty for callers without a name, who share one."""
    caller_cost: int = 0
    """Most cost of the caller's jobs that have not ended; 0 for no limit. One that alone is beyond it is let in when
    there is no other."""
    priority: Priority = Priority.NORMAL
    timeout: float = 600.0
    """Seconds from acceptance until the job is ended with ``TimedOut``, whether it waits or runs."""
    keep_seconds: float = 60.0
    """How long the result stays after the job has ended."""
    detached: bool = False
    """An asynchronous job: it outlives the connection and the API process that submitted it, is listed, and its
    events are kept. Others are ended when their API process is gone."""
    idempotency_key: str | None = None
    """A repetition with this key (of the same caller) is the same job, not a new one, while that waits or runs and
    as long as its result stays; one that failed or was canceled frees the key."""
    fingerprint: str = ""
    """Digest of the request; a repetition of the key with another one is refused."""
    recipe: bytes = b""
    """What is needed to make the answer of the result, for whichever process is asked for it; kept as long as the job,
    and never looked at."""


USUAL = Terms()


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What :meth:`Broker.submit` did."""

    job_id: str
    repeated: bool = False
    """Whether an earlier job answers, by the idempotency key."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job as its caller sees it."""

    id: str
    op: Op
    model: str
    caller: str
    rows: int
    state: JobState
    attempt: int
    progress: float
    """Fraction of the work that is done."""
    position: int | None
    """Jobs that are before it in its lane, while it waits."""
    created: float
    """Unix time of acceptance, by the broker's clock; so are the next three."""
    started: float | None = None
    """When its first worker took it."""
    ended: float | None = None
    expires: float | None = None
    """When a job that has ended is forgotten."""
    error: ServiceError | None = None
    """Why it failed or was canceled."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a detached job.

    Kinds: queued, started {attempt}, progress {fraction, block}, preview {block, blocks, start, pixels}, requeued
    {attempt, reason}, and last one of completed, failed {error, message, code, param}, canceled (as failed). A
    preview's ``pixels`` (n, C, H, W) uint8 are images ``start``…``start + n − 1`` of the job after ``block`` of
    ``blocks``.
    """

    id: str
    """For ``after``, to be told of later ones only."""
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0
    """Unix time by the broker's clock."""

    @property
    def final(self) -> bool:
        """Whether it is the job's last."""
        return self.kind in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELED)


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """A registered worker as the API sees it."""

    info: WorkerInfo
    heartbeat_age: float
    """Seconds since the worker's inference loop was last heard."""
    measurements: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """The worker's metrics, as :mod:`service.metrics` renders them; empty where workers export their own."""


@dataclass(frozen=True)
class Ending:
    """How jobs ended: counted together."""

    model: str
    op: Op
    outcome: str
    """``ok``, or that of :class:`~service.errors.ServiceError`."""


@dataclass(frozen=True, kw_only=True)
class QueueStats:
    """What waits and what runs, by op, and what has come to pass."""

    waiting: Mapping[Op, int]
    running: Mapping[Op, int]
    waiting_cost: int
    oldest_wait_seconds: float
    callers: int = 0
    """Named callers with work that waits."""
    reclaimed: int = 0
    """Leases that ran out, or whose workers left without handing back, since the beginning."""
    dead: int = 0
    """Jobs that failed because too many workers were lost on them, since the beginning."""
    ended: Mapping[Ending, int] = field(default_factory=dict)
    """Jobs that have ended, each counted once, since the beginning."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A job that a worker has, in its heartbeat."""

    job_id: str
    attempt: int
    fraction: float = 0.0
    block: int | None = None
    """Blocks that are finished, of a job that goes through blocks."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What an operator wants a worker to do."""

    action: str
    """``load`` or ``unload``."""
    model: str
    """The bundle's name; to load it again replaces it once the new one is warm."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The answer to a heartbeat."""

    lost: frozenset[str] = frozenset()
    """Jobs that are no longer the worker's: canceled, expired, ended or given on."""
    commands: tuple[Command, ...] = ()
    """Each is told once."""


class Broker(Protocol):
    """The API's face; every method runs on its event loop.

    Where the broker is a process of its own, every method may raise ``Unavailable`` (code ``broker_unreachable``, or
    ``broker_full`` when it has no memory left) with the seconds after which to try again.
    """

    async def start(self) -> None:
        """Begin to listen for results and to look after leases."""

    async def close(self) -> None:
        """End what :meth:`start` began; jobs that others wait for stay."""

    async def check(self, model: str, cost: int, caller: str = "", caller_cost: int = 0) -> None:
        """Raise what :meth:`submit` would for such a job, before work is spent on preparing it."""

    async def submit(self, job: Job, terms: Terms = USUAL) -> Accepted:
        """Accept a job.

        Raises at the door: :class:`~service.errors.Overloaded` (code ``queue_full``, ``share_full``,
        ``concurrency_limit_exceeded`` or ``results_full``),
        ``Unavailable`` (``no_worker``), ``InvalidRequest`` (``idempotency_key_reused``).
        """

    async def wait(self, job_id: str, timeout: float) -> JobResult:
        """The job's result, when it is there. Raises the job's error, ``TimedOut``, or ``NotFound``.

        Any number may wait for a detached job, without an effect on it. For another only the one who submitted it
        can: it is canceled when ``timeout`` seconds were not enough, and forgotten once it was answered.
        """

    async def cancel(self, job_id: str) -> bool:
        """Give a job up; workers drop its rows at their next slice. Its idempotency key is free again.

        ``False`` when there is no such job that has not ended.
        """

    async def status(self, job_id: str) -> JobStatus:
        """Where a job stands; raises :class:`~service.errors.NotFound` for an unknown or forgotten one."""

    async def result(self, job_id: str) -> JobResult | None:
        """The result of a job that was completed, ``None`` while it waits or runs; raises the error of one that
        failed or was canceled, and ``NotFound``. May be asked any number of times."""

    async def recipe(self, job_id: str) -> bytes:
        """What was given with the job to make its answer of; raises ``NotFound``."""

    async def jobs(self, caller: str, limit: int = 100) -> Sequence[JobStatus]:
        """The caller's detached jobs that are not forgotten, newest first."""

    def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[Event, None]:
        """A detached job's events behind the one with id ``after``, or all, to its last; raises ``NotFound``."""

    async def models(self) -> Sequence[ModelInfo]:
        """Every model that is known to be served, by name."""

    async def workers(self) -> Sequence[WorkerStatus]:
        """The workers that are registered now."""

    async def stats(self) -> QueueStats:
        """Queue depth and age, and counts."""

    async def command(self, command: Command) -> int:
        """Tell every worker that is registered now; returns how many."""


class WorkerBroker(Protocol):
    """The worker's face; every method blocks, and only one thread calls.

    A broker that is away for a while is waited for: :meth:`claim` returns nothing, :meth:`heartbeat` an empty answer,
    and outcomes are delivered when it is back. Raises ``BrokerGone`` when it will not come back.
    """

    def register(self, info: WorkerInfo) -> None:
        """Announce a worker that has loaded and warmed up its models; again when these change."""

    def claim(self, lanes: Collection[Lane], max_rows: int, timeout: float) -> list[Job]:
        """Take waiting jobs of these lanes, in the order of their virtual finish times, up to ``max_rows`` images
        (but at least one job). A job that was lost before comes alone: it may be what its worker died of.

        Waits up to ``timeout`` seconds for the first. All jobs of a claim are of one lane, urgent ones first.
        """

    def heartbeat(self, held: Sequence[Held], measurements: Sequence[Mapping[str, Any]] = ()) -> Orders:
        """Show that the inference loop runs, and renew the leases of what the worker has."""

    def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        """Add an event to a detached job's, such as a preview; nothing happens where nobody could see it."""

    def complete(self, job: Job, result: JobResult) -> bool:
        """Deliver a result; ``False`` when the job's attempt is no longer this worker's."""

    def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        """As :meth:`complete` of each, at less cost: what a batch gave."""

    def fail(self, job: Job, error: ServiceError) -> bool:
        """End a job with an error; ``False`` as for :meth:`complete`."""

    def release(self, job: Job) -> None:
        """Hand a job back unfinished, for another worker, without counting an attempt."""

    def close(self) -> None:
        """Leave; jobs still owned are given on at once."""
