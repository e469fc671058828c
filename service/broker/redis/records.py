"""What the scripts answer, read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.broker.base import Ending, Event, JobStatus, QueueStats
from service.errors import ServiceError
from service.jobs import JobResult, JobState, Op
from service.messages import unpack


def pairs(flat: Sequence[bytes]) -> dict[str, bytes]:
    """Names and values that Redis gives in turn; values stay bytes."""
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def error_of(data: bytes) -> ServiceError:
    """An error that a script or a worker stored."""
    return ServiceError.from_wire(json.loads(data))


def _seconds(value: bytes | None) -> float | None:
    return int(value) / 1000 if value else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended; ``data`` is the packed result, or ``None`` when it did not come along."""

    state: JobState
    queue_seconds: float = 0.0
    error: ServiceError | None = None
    data: bytes | None = None

    @classmethod
    def of_news(cls, news: Mapping[str, bytes]) -> Outcome:
        """From an entry of an inbox."""
        error = news.get("error")
        return cls(
            state=JobState(news["state"].decode()),
            queue_seconds=int(float(news["queue"])) / 1000,
            error=error_of(error) if error else None,
            data=news.get("result"),
        )

    @classmethod
    def of_job(cls, values: Sequence[bytes | None]) -> Outcome | None:
        """From a job's OUTCOME_FIELDS; ``None`` for an unknown job."""
        state, error, result, created, started = values
        if state is None or created is None:
            return None
        queued = (int(started) - int(created)) / 1000 if started else 0.0
        return cls(
            state=JobState(state.decode()),
            queue_seconds=queued,
            error=error_of(error) if error else None,
            data=result,
        )

    def result(self) -> JobResult:
        """The result that came along; raises the error of a job that failed or was canceled."""
        if self.error is not None:
            raise self.error
        if self.data is None:
            raise RuntimeError("asked for a result that did not come along")
        return replace(JobResult.from_wire(unpack(self.data)), queue_seconds=self.queue_seconds)


OPERATIONS = frozenset(map(str, Op))
OUTCOME_FIELDS = ("state", "error", "result", "created", "started")


def status_of(values: Sequence[Any]) -> JobStatus:
    """One job of ``status.lua``."""
    state, op, model, caller, rows, attempt, progress, created, started, ended, expires, error, position, job_id = (
        values
    )
    return JobStatus(
        id=job_id.decode(),
        op=Op(op.decode()),
        model=model.decode(),
        caller=caller.decode(),
        rows=int(rows),
        state=JobState(state.decode()),
        attempt=int(attempt),
        progress=float(progress),
        position=position if position >= 0 else None,
        created=int(created) / 1000,
        started=_seconds(started),
        ended=_seconds(ended),
        expires=_seconds(expires),
        error=error_of(error) if error else None,
    )


def event_of(event_id: bytes, fields: Mapping[bytes, bytes]) -> Event:
    """An entry of a job's stream: plain data as JSON, arrays packed."""
    kind = fields[b"k"].decode()
    data = unpack(fields[b"d"]) if b"d" in fields else json.loads(fields[b"j"])
    if "error" in data:
        data = ServiceError.from_wire(data).to_wire()
    return Event(id=event_id.decode(), kind=kind, data=data, time=int(fields[b"t"]) / 1000)


def stats_of(values: Sequence[Any]) -> QueueStats:
    """The answer of ``stats.lua``."""
    flat, callers, oldest = values
    counters = pairs(flat)

    def by_op(what: str) -> dict[Op, int]:
        counts = {op: int(counters.get(f"{what}:{op}", 0)) for op in Op}
        return {op: count for op, count in counts.items() if count}

    return QueueStats(
        waiting=by_op("waiting"),
        running=by_op("running"),
        waiting_cost=int(counters.get("cost", 0)),
        oldest_wait_seconds=max(0, oldest) / 1000,
        callers=callers,
        reclaimed=int(counters.get("reclaimed", 0)),
        dead=int(counters.get("dead", 0)),
        ended=_endings(counters),
    )


def _endings(counters: Mapping[str, bytes]) -> dict[Ending, int]:
    """Those that ``finish`` of ``lifecycle.lua`` counted, as they are counted everywhere."""
    found: Counter[Ending] = Counter()
    for name, count in counters.items():
        if name.startswith("ended:"):
            _, op, how, model = name.split(":", 3)
            if op not in OPERATIONS:  # a later version's, while it takes over
                continue
            kind, _, code = how.partition("/")
            error = None if kind == JobState.COMPLETED else ServiceError.from_wire({"error": kind, "code": code})
            outcome = "ok" if error is None else error.outcome
            found[Ending(model, Op(op), outcome)] += int(count)
    return dict(found)
