"""Long work: sampling cohorts in turn, slice by slice; they merge where they meet, and shrink where memory lacks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from model.device import is_out_of_memory
from service.broker.base import Held
from service.jobs import Job
from service.worker.ceilings import Ceilings
from service.worker.cohort import Cohort, group
from service.worker.faults import BATCH_FAULTS, check_device, make_room
from service.worker.loading import LoadedModel
from service.worker.meeting import Meetings
from service.worker.metrics import WorkerMetrics
from service.worker.outcomes import Finished, Outcomes
from service.worker.parts import Part, pack
from service.worker.room import Room

DENOISE, SAMPLE = "denoise", "sample"
"""Stages of which the memory is of a different kind."""


@dataclass(frozen=True)
class _Load:
    """Parts that are about to be a cohort."""

    model: LoadedModel
    parts: Sequence[Part]
    alone: bool = False
    """Not to be merged: one of them may be what made others fail."""
    solitary: bool = False
    """To be done while nothing else takes memory."""

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


class LongWork:
    """All cohorts in flight, and the loads that wait for a place."""

    def __init__(
        self,
        outcomes: Outcomes,
        metrics: WorkerMetrics,
        ceilings: Ceilings,
        room: Room,
        *,
        batch_rows: int,
        max_cohorts: int,
        alive: Callable[[], None],
    ) -> None:
        self._outcomes, self._metrics, self._ceilings, self._room = outcomes, metrics, ceilings, room
        self._batch_rows, self._max_cohorts, self._alive = batch_rows, max_cohorts, alive
        self._cohorts: deque[Cohort] = deque()
        self._loads: deque[_Load] = deque()
        self._alone: set[Cohort] = set()
        self._solitary: Cohort | None = None
        self._meetings = Meetings(self.most_rows)

    # What there is.

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._cohorts or self._loads)

    @property
    def parts(self) -> Iterator[Part]:
        """All parts that are not finished."""
        yield from (part for cohort in self._cohorts for part in cohort.parts)
        yield from (part for load in self._loads for part in load.parts)

    @property
    def cohorts(self) -> Sequence[Cohort]:
        """Those in flight, the one whose turn is next first."""
        return tuple(self._cohorts)

    @property
    def jobs(self) -> list[Job]:
        """All jobs that are not finished, once each."""
        return list({part.job.id: part.job for part in self.parts}.values())

    def uses(self, model: LoadedModel) -> bool:
        """Whether there is work for a model."""
        there = [*(cohort.model for cohort in self._cohorts), *(load.model for load in self._loads)]
        return any(other is model for other in there)

    def held(self) -> list[Held]:
        """Every job, with the part of its work that is done."""
        fractions = {job.id: self._outcomes.share(job) for job in self.jobs}
        blocks: dict[str, int | None] = {}
        for cohort in self._cohorts:
            for part in cohort.parts:
                fractions[part.job.id] += cohort.fraction * part.rows / part.job.rows
                # Of a job in several cohorts the one that is furthest behind: it does not go back and forth.
                behind = blocks.get(part.job.id, cohort.block)
                blocks[part.job.id] = None if behind is None or cohort.block is None else min(behind, cohort.block)
        return [
            Held(job_id=job.id, attempt=job.attempt, fraction=min(1.0, fractions[job.id]), block=blocks.get(job.id))
            for job in self.jobs
        ]

    def most_rows(self, model: LoadedModel) -> int:
        """Most images of a cohort."""
        return min(self._ceilings.most(model.info.name, SAMPLE, self._batch_rows), self._room.rows(model))

    def _taken(self) -> float:
        """Which share of the room is taken."""
        return sum(cohort.rows / self._room.rows(cohort.model) for cohort in self._cohorts)

    def wanted_rows(self, models: Collection[LoadedModel]) -> int:
        """Images that could be started now, whatever their model; 0 for none."""
        if self._loads or len(self._cohorts) >= self._max_cohorts or self._solitary is not None or not models:
            return 0
        if not self._cohorts:
            self._room.measure()
        free = 1 - self._taken()
        return min(min(self.most_rows(model), int(free * self._room.rows(model))) for model in models)

    # What comes and goes.

    def add(self, claimed: Sequence[tuple[LoadedModel, Job]]) -> None:
        """Take jobs in; one that a worker was lost on goes alone."""
        # After an outage a worker may be given what it still works on, before it hears that its lease ran out.
        self.drop({job.id for _, job in claimed} & {job.id for job in self.jobs})
        models = {job.model: model for model, job in claimed}
        jobs = [job for _, job in claimed]
        for parts in group([Part.whole(job) for job in jobs if job.attempt == 1]):
            model = models[parts[0].job.model]
            self._loads.extend(_Load(model, load) for load in pack(parts, self.most_rows(model)))
        for job in (job for job in jobs if job.attempt > 1):
            model = models[job.model]
            loads = pack([Part.whole(job)], self.most_rows(model))
            self._loads.extend(_Load(model, load, alone=True) for load in loads)

    def drop(self, job_ids: Collection[str]) -> None:
        """Let go of jobs that are not wanted here any more; their rows leave before the next slice."""
        if not job_ids:
            return
        for part in self.parts:
            if part.job.id in job_ids:
                self._outcomes.dropped(part.job, part.rows)
        self._let_go(job_ids)

    def _let_go(self, job_ids: Collection[str]) -> None:
        for job_id in job_ids:
            self._outcomes.forget(job_id)
        for cohort in self._cohorts:
            cohort.drop(job_ids)
        kept = [(load, [part for part in load.parts if part.job.id not in job_ids]) for load in self._loads]
        self._loads = deque(_Load(load.model, parts, load.alone, load.solitary) for load, parts in kept if parts)

    def _start(self) -> None:
        """Make loads to cohorts, as long as there are places and room."""
        while self._loads and len(self._cohorts) < self._max_cohorts and self._solitary is None:
            load = self._loads[0]
            if self._cohorts and (load.solitary or self._taken() + load.rows / self._room.rows(load.model) > 1):
                return
            self._loads.popleft()
            most = self._ceilings.most(load.model.info.name, DENOISE, self._batch_rows)
            cohort = Cohort(load.model, load.parts, most)
            self._cohorts.append(cohort)
            if load.alone:
                self._alone.add(cohort)
            if load.solitary:
                self._solitary = cohort

    # What is done.

    def run(self, seconds: float) -> None:
        """Advance cohorts in turn for so long, or until all are finished."""
        until = time.perf_counter() + seconds
        while self.turn() and time.perf_counter() < until:
            pass

    def turn(self) -> bool:
        """Advance one cohort by one slice; ``False`` when there is nothing to do."""
        self._start()
        if not self._cohorts:
            return False
        self._alive()
        self._slice(self._next())
        return True

    def _next(self) -> tuple[Cohort, Cohort | None]:
        """Whose turn it is, and who is taken in; those that wait for others are passed over."""
        free = [cohort for cohort in self._cohorts if cohort not in self._alone]
        for _ in range(len(self._cohorts)):
            cohort = self._cohorts[0]
            if cohort in self._alone or not cohort.rows:
                return cohort, None
            if not self._meetings.waits(cohort, free):
                return cohort, self._meetings.partner(cohort, free)
            self._cohorts.rotate(-1)
        return self._cohorts[0], None

    def _slice(self, turn: tuple[Cohort, Cohort | None]) -> None:
        # It stays where it is while it works, so that heartbeats in the meantime speak of it.
        cohort, other = turn
        if other is not None:
            self._cohorts.remove(other)
            self._metrics.merges.labels(model=cohort.model.info.name).inc()
        op, name = str(cohort.parts[0].job.op), cohort.model.info.name
        start = time.perf_counter()
        try:
            with self._metrics.computing(name, op):
                done = cohort.advance() if other is None else cohort.join(other)
                results = cohort.results() if done else []
                previews = [] if done else cohort.previews()
        except BATCH_FAULTS as error:
            out_of_memory = is_out_of_memory(error)
            self._outcomes.fault(cohort.jobs, error, out_of_memory=out_of_memory)
        else:
            if cohort.boundary is None:  # coming to one is no work
                self._metrics.slice.labels(model=name, op=op).observe(time.perf_counter() - start)
            if not done:
                self._outcomes.show(previews)
                self._cohorts.rotate(-1)
                return
            self._finish(cohort)
            if results:
                parts = [part for part, _ in results]
                self._outcomes.batch([part.job for part in parts], sum(p.rows for p in parts), cohort.seconds)
            self._outcomes.deliver(
                [Finished(part, arrays, cohort.seconds_of(part), cohort.plan_of(part)) for part, arrays in results]
            )
            return
        # Out here the exception is gone, and with it what its frames held.
        if out_of_memory:
            self._shrink(cohort)
        else:
            self._isolate(cohort)

    def _finish(self, cohort: Cohort) -> None:
        self._cohorts.remove(cohort)
        self._alone.discard(cohort)
        if self._solitary is cohort:
            self._solitary = None

    def _isolate(self, cohort: Cohort) -> None:
        """Do the jobs of a batch that failed again, each alone; one that was alone has failed."""
        self._finish(cohort)
        check_device(cohort.model.device)
        parts = [part for part in cohort.parts if not cohort.dropped(part.job)]
        jobs = {part.job.id: part.job for part in parts}
        if len(jobs) > 1:
            self._loads.extend(_Load(cohort.model, [part], alone=True) for part in parts)
            return
        for job in jobs.values():
            self._outcomes.fail(job, out_of_memory=False)
        self._let_go(jobs.keys())

    def _shrink(self, cohort: Cohort) -> None:
        """Do the rows of a batch that ran out of memory again, in smaller batches; a single row has failed."""
        solitary, alone = self._solitary is cohort, cohort in self._alone
        self._finish(cohort)
        name, stage = cohort.model.info.name, DENOISE if cohort.stage == DENOISE else SAMPLE
        parts = [part for part in cohort.parts if not cohort.dropped(part.job)]
        rows, slice_rows = sum(part.rows for part in parts), cohort.slice_rows
        make_room(cohort.model.device)
        if not rows:
            return
        if slice_rows > 1:
            most = self._ceilings.failed(name, stage, slice_rows)
            # A slice of denoising gets smaller by itself.
            loads = pack(parts, rows if stage == DENOISE else most)
        elif rows > 1:
            loads = pack(parts, rows // 2)
        elif self._cohorts and not solitary:
            # Others may have the memory; without them it may do.
            self._loads.appendleft(_Load(cohort.model, parts, alone=True, solitary=True))
            return
        else:
            self._ceilings.forget(name, stage)
            self._outcomes.fail(parts[0].job, out_of_memory=True)
            self._let_go([parts[0].job.id])
            return
        self._loads.extendleft(_Load(cohort.model, load, alone, solitary) for load in reversed(loads))
