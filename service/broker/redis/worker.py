"""A worker's face of the Redis broker."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from service.broker.base import BrokerGone, Command, Held, Limits, Orders, WorkerBroker
from service.broker.redis.connecting import BLOCK_SECONDS, OPTIONS, is_away, is_full, public
from service.broker.redis.keys import Keys, common_arguments, milliseconds
from service.broker.redis.scripts import script
from service.errors import InternalError, ServiceError
from service.jobs import Job, JobResult, JobState, Lane, Op, WorkerInfo
from service.messages import MessageError, pack, unpack

log = logging.getLogger(__name__)

Arguments = tuple[str | bytes | int | float, ...]
PAUSE_SECONDS = 0.25
"""After a failure nothing is asked for so long, so that a worker with work is not held up by a dead connection."""
LONGEST_PAUSE_SECONDS = 1.0
"""Between two attempts to deliver an outcome."""


class _Away(Exception):
    """Redis cannot be reached or is full; it may be asked again later."""


class RedisWorkerBroker(WorkerBroker):
    """One connection; outages of Redis are waited for."""

    def __init__(
        self,
        url: str,
        worker_id: str,
        limits: Limits,
        *,
        prefix: str = "tarflow",
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """``waiting`` is called again and again while an outcome, or what the worker serves, waits for Redis."""
        self._waiting = waiting
        self._url, self._id, self._limits, self._keys = url, worker_id, limits, Keys(prefix)
        # Another process of the same name is another owner.
        self._owner = f"{worker_id}/{uuid.uuid4().hex}"
        self._common = common_arguments(limits)
        # Any: replies are typed as what every protocol may give.
        self._redis: Any = redis.Redis(
            connection_pool=redis.ConnectionPool.from_url(
                url, max_connections=1, retry=Retry(NoBackoff(), 0), **OPTIONS
            )
        )
        self._info: WorkerInfo | None = None
        self._detached: dict[str, bool] = {}  # of the jobs that this worker has, whether they have events
        self._in_doubt = False  # whether a claim's answer was lost
        self._away_until = 0.0
        self._reachable = True
        self._registered = self._closed = False

    def _call(self, name: str, *arguments: str | bytes | int | float) -> Any:
        operation = script(name)
        rest = (1, self._keys.base, *self._common, *arguments)
        try:
            try:
                answer = self._redis.execute_command("EVALSHA", operation.sha, *rest)
            except NoScriptError:
                answer = self._redis.execute_command("EVAL", operation.source, *rest)
        except (RedisError, OSError) as error:
            raise self._away(error) from error
        if not self._reachable:
            log.warning("redis at %s is back", public(self._url))
        self._reachable = True
        return answer

    def _call_each(self, name: str, calls: Sequence[Arguments]) -> list[Any] | None:
        """The answers of a script to several calls in one round trip; ``None`` when one of them failed."""
        sha, pipeline = script(name).sha, self._redis.pipeline(transaction=False)
        for arguments in calls:
            pipeline.execute_command("EVALSHA", sha, 1, self._keys.base, *self._common, *arguments)
        try:
            return list(pipeline.execute())
        except (RedisError, OSError):
            return None  # one at a time, what is wrong is looked at

    def _away(self, error: Exception) -> Exception:
        """The error to raise, with one line in the log an outage."""
        if not is_away(error) and not is_full(error):
            return error
        if self._reachable:
            log.error("redis at %s: %s", public(self._url), error)
        self._reachable = False
        self._away_until = time.monotonic() + PAUSE_SECONDS
        return _Away(str(error))

    def register(self, info: WorkerInfo) -> None:
        self._info = info
        pause = 0.05
        while not self._closed:
            try:
                return self._register(info)
            except _Away:
                self._waiting()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _register(self, info: WorkerInfo) -> None:
        first, states = int(not self._registered), pack((dict(info.states), dict(info.loads)))
        arguments: list[str | bytes | int] = [self._id, self._owner, info.device, first, states]
        for model in info.models:
            packed = pack(model.to_wire())
            arguments += [model.name, hashlib.sha256(packed).hexdigest(), packed]
        if not self._call("register", *arguments):
            raise self._replaced()
        self._registered = True

    def _replaced(self) -> BrokerGone:
        return BrokerGone(f"another process is now the worker {self._id!r}")

    # Work.

    def claim(self, lanes: Collection[Lane], max_rows: int, timeout: float) -> list[Job]:
        deadline = time.monotonic() + timeout
        while True:
            remaining = deadline - time.monotonic()
            if (away := self._away_until - time.monotonic()) > 0:
                time.sleep(max(0.0, min(away, remaining)))
                return []
            try:
                bell, jobs = self._take(lanes, max_rows)
                remaining = deadline - time.monotonic()
                if jobs or remaining <= 0:
                    return jobs
                self._listen(bell, min(remaining, BLOCK_SECONDS, self._limits.ready_seconds / 3))
            except _Away:
                pass

    def _listen(self, bell: bytes, seconds: float) -> None:
        """Until somebody rings, or rang since the look for work."""
        try:
            self._redis.xread({self._keys.doorbell: bell}, block=max(1, milliseconds(seconds)))
        except (RedisError, OSError) as error:
            raise self._away(error) from error

    def _take(self, lanes: Collection[Lane], max_rows: int) -> tuple[bytes, list[Job]]:
        if self._info is None:
            return b"0-0", []
        if self._in_doubt:
            self._call("disown", self._owner, *self._detached)
            self._in_doubt = False
        wanted = [lane for lane in (Lane.URGENT, Lane.LONG) if lane in lanes]
        names = [model.name for model in self._info.models]
        arguments: tuple[str | int, ...] = (self._id, self._owner, max_rows, len(wanted), *wanted, *names)
        try:
            answer = self._call("claim", *arguments)
            if answer[0] == b"unknown":  # forgotten, after an outage of this worker or of Redis
                self._register(self._info)
                answer = self._call("claim", *arguments)
        except _Away:
            self._in_doubt = True
            raise
        if answer[0] == b"replaced":
            raise self._replaced()
        if answer[0] == b"unknown":
            return b"0-0", []
        jobs = [job for values in answer[1] if (job := self._job_of(values)) is not None]
        return answer[0], jobs

    def _job_of(self, values: Sequence[bytes]) -> Job | None:
        job_id, op, model, rows, cost, attempt, detached, waited, request_id, payload = values
        self._detached[job_id.decode()] = detached == b"1"
        known: dict[str, Any] = {
            "id": job_id.decode(), "model": model.decode(), "rows": int(rows), "cost": int(cost),
            "attempt": int(attempt), "request_id": request_id.decode(),
            "waited": None if waited == b"" else int(waited) / 1000,
        }  # fmt: skip
        try:
            return Job(op=Op(op.decode()), payload=unpack(payload), **known)
        except (MessageError, ValueError) as error:
            about = {"job_id": known["id"], "request_id": known["request_id"], "model": known["model"]}
            log.error("job %s cannot be read: %s", known["id"], error, extra=about)
            unread = Job(op=Op.SCORE, payload={}, **known)
            self.fail(unread, InternalError("the worker cannot read the job; its version may be another"))
            return None

    def heartbeat(self, held: Sequence[Held], measurements: Sequence[Mapping[str, Any]] = ()) -> Orders:
        if time.monotonic() < self._away_until:
            return Orders()
        arguments: list[str | bytes | int | float] = [
            self._id, self._owner, pack(list(measurements)) if measurements else b"",
        ]  # fmt: skip
        for job in held:
            progress = json.dumps({"fraction": job.fraction, "block": job.block})
            block = "" if job.block is None else job.block
            arguments += [job.job_id, job.attempt, job.fraction, block, progress]
        try:
            known, lost, commands = self._call("heartbeat", *arguments)
            if known == b"replaced":
                raise self._replaced()
            if known == b"unknown" and self._info is not None:
                self._register(self._info)
        except _Away:
            return Orders()
        for job_id in lost:
            self._detached.pop(job_id.decode(), None)
        return Orders(
            lost=frozenset(job_id.decode() for job_id in lost),
            commands=tuple(Command(**json.loads(command)) for command in commands),
        )

    def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        if not self._detached.get(job.id) or time.monotonic() < self._away_until:
            return
        with suppress(_Away):  # a preview is not worth waiting for
            self._call("publish", self._owner, job.id, job.attempt, kind, pack(dict(data)))

    def complete(self, job: Job, result: JobResult) -> bool:
        return self._deliver(job, self._completion(job, result))

    def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        deliveries = [(job, self._completion(job, result)) for job, result in results]
        answers = self._call_each("deliver", [arguments for _, arguments in deliveries])
        if answers is None:
            # What has arrived of it is recognized by its token.
            return [self._deliver(job, arguments) for job, arguments in deliveries]
        for job, _ in deliveries:
            self._detached.pop(job.id, None)
        return [bool(answer) for answer in answers]

    def fail(self, job: Job, error: ServiceError) -> bool:
        return self._deliver(job, self._delivery(job, JobState.FAILED, json.dumps(error.to_wire()), b""))

    def _completion(self, job: Job, result: JobResult) -> Arguments:
        return self._delivery(job, JobState.COMPLETED, b"", pack(result.to_wire()))

    def _delivery(self, job: Job, state: JobState, error: str | bytes, result: bytes) -> Arguments:
        return (self._owner, job.id, job.attempt, uuid.uuid4().hex, state, error, result)

    def _deliver(self, job: Job, arguments: Arguments) -> bool:
        """However long Redis is away: the lease, or the attempt of who has the job then, decides what it is worth."""
        return bool(self._insist("deliver", *arguments, job=job))

    def release(self, job: Job) -> None:
        self._insist("release", self._owner, job.id, job.attempt, "handed back", job=job)

    def _insist(self, name: str, *arguments: str | bytes | int | float, job: Job) -> Any:
        pause = 0.05
        while True:
            try:
                answer = self._call(name, *arguments)
            except _Away:
                if self._closed:
                    return None
                self._waiting()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._detached.pop(job.id, None)
                return answer

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._info is not None:
                self._call("unregister", self._id, self._owner)
        except _Away:
            pass  # its leases run out
        finally:
            self._redis.close()
