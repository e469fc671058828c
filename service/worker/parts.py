"""Rows, not jobs, are what a device works on: a job with more images than fit is done in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from service.jobs import Job
from service.worker.scoring import Arrays

PER_ROW = ("seeds", "latents", "pixels")
"""What a payload has one of for every row; all else is the same for all."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows ``start``…``stop − 1`` of a job."""

    job: Job
    start: int
    stop: int

    @classmethod
    def whole(cls, job: Job) -> Part:
        """All rows of a job."""
        return cls(job, 0, job.rows)

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start

    @cached_property
    def payload(self) -> Mapping[str, Any]:
        """The job's payload, of these rows only."""
        own = {name: self.job.payload[name][self.start : self.stop] for name in PER_ROW if name in self.job.payload}
        return {**self.job.payload, **own}

    def cut(self, rows: int) -> tuple[Part, Part]:
        """The first rows, and the others."""
        middle = self.start + rows
        return Part(self.job, self.start, middle), Part(self.job, middle, self.stop)


def pack(parts: Sequence[Part], most_rows: int) -> list[list[Part]]:
    """The parts in order, in loads of up to ``most_rows`` rows, each full but the last; parts are cut where needed."""
    loads: list[list[Part]] = []
    room = 0
    for part in parts:
        left: Part | None = part
        while left is not None:
            if not room:
                loads.append([])
                room = most_rows
            now, left = left.cut(room) if left.rows > room else (left, None)
            loads[-1].append(now)
            room -= now.rows
    return loads


@dataclass
class _Finished:
    """What is there of a job."""

    arrays: dict[int, Arrays] = field(default_factory=dict)
    seconds: float = 0.0
    plan: Sequence[str] = ()
    rows: int = 0


@dataclass(frozen=True)
class Whole:
    """A job whose parts have all been finished."""

    job: Job
    arrays: Arrays
    seconds: float
    """Of all parts together."""
    plan: Sequence[str]
    """That of its first part to be finished."""


class Assembly:
    """Puts the results of parts together."""

    def __init__(self) -> None:
        self._finished: dict[str, _Finished] = {}

    def add(self, part: Part, arrays: Arrays, seconds: float, plan: Sequence[str] = ()) -> Whole | None:
        """The result of a part; returns the job's when it was the last."""
        found = self._finished.setdefault(part.job.id, _Finished(plan=plan))
        found.arrays[part.start] = arrays
        found.seconds += seconds
        found.rows += part.rows
        if found.rows < part.job.rows:
            return None
        del self._finished[part.job.id]
        pieces = [found.arrays[start] for start in sorted(found.arrays)]
        whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return Whole(part.job, pieces[0] if len(pieces) == 1 else whole, found.seconds, found.plan)

    def share(self, job: Job) -> float:
        """Which share of the job's rows is finished."""
        return self._finished[job.id].rows / job.rows if job.id in self._finished else 0.0

    def forget(self, job_id: str) -> None:
        """A job that will not be whole."""
        self._finished.pop(job_id, None)
