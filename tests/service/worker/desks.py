"""Long work on a desk: no loop, no broker, one turn at a time; results and errors are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from service.broker.base import Held, Orders, WorkerBroker
from service.errors import ServiceError
from service.jobs import Job, JobResult, Lane, WorkerInfo
from service.worker.ceilings import Ceilings
from service.worker.cohort import Cohort
from service.worker.loading import LoadedModel
from service.worker.long import LongWork
from service.worker.metrics import WorkerMetrics
from service.worker.outcomes import Outcomes
from service.worker.parts import Part
from service.worker.room import Room
from service.worker.scoring import Arrays
from service.worker.urgent import UrgentWork


class Tray(WorkerBroker):
    """Where outcomes come to lie."""

    def __init__(self) -> None:
        self.results: dict[str, JobResult] = {}
        self.errors: dict[str, ServiceError] = {}
        self.published: list[tuple[str, str, Mapping[str, Any]]] = []

    def complete(self, job: Job, result: JobResult) -> bool:
        assert job.id not in self.results
        assert job.id not in self.errors
        self.results[job.id] = result
        return True

    def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        return [self.complete(job, result) for job, result in results]

    def fail(self, job: Job, error: ServiceError) -> bool:
        assert job.id not in self.results
        assert job.id not in self.errors
        self.errors[job.id] = error
        return True

    def register(self, info: WorkerInfo) -> None:
        raise NotImplementedError

    def claim(self, lanes: Collection[Lane], max_rows: int, timeout: float) -> list[Job]:
        raise NotImplementedError

    def heartbeat(self, held: Sequence[Held], measurements: Sequence[Mapping[str, Any]] = ()) -> Orders:
        raise NotImplementedError

    def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        self.published.append((job.id, kind, data))

    def release(self, job: Job) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Desk:
    """All of an engine but its loop."""

    def __init__(self, model: LoadedModel, *, batch_rows: int = 8, max_cohorts: int = 4) -> None:
        self.model, self.tray, self.metrics = model, Tray(), WorkerMetrics("w")
        self.outcomes, self.ceilings = Outcomes(self.tray, self.metrics), Ceilings(self.metrics)
        self.room = Room(torch.device("cpu"))
        self.long = LongWork(
            self.outcomes,
            self.metrics,
            self.ceilings,
            self.room,
            batch_rows=batch_rows,
            max_cohorts=max_cohorts,
            alive=lambda: None,
        )
        self.urgent = UrgentWork(self.outcomes, self.ceilings, batch_rows)

    def add(self, *jobs: Job) -> None:
        """Jobs of one claim."""
        self.long.add([(self.model, job) for job in jobs])

    def finish(self) -> dict[str, JobResult]:
        """Work until nothing is left."""
        while self.long.turn():
            pass
        assert not self.long.busy
        return self.tray.results

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples over all labels but those given."""
        samples = (sample for family in self.metrics.snapshot() for sample in family["samples"])
        return float(sum(v for n, own, v in samples if n == name and labels.items() <= own.items()))


def alone(model: LoadedModel, job: Job) -> Arrays:
    """What comes of a job that is the only one in the world."""
    cohort = Cohort(model, [Part.whole(job)])
    while not cohort.advance():
        pass
    [(_, arrays)] = cohort.results()
    return arrays
