"""Urgent work: batches of scores, encodings and classifications, between two slices of sampling."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from model.device import is_out_of_memory
from service.jobs import Job
from service.worker.ceilings import Ceilings
from service.worker.faults import BATCH_FAULTS, check_device, make_room
from service.worker.loading import MOST_SLICE_ROWS, LoadedModel
from service.worker.outcomes import Finished, Outcomes
from service.worker.parts import Part
from service.worker.scoring import RUN, Arrays, network_rows

Claimed = tuple[LoadedModel, Job]


def stage_of(job: Job) -> str:
    """The kind of work a job is: its op, but gradients take more memory, and time, than bare passes."""
    wants_gradient = bool((job.payload.get("statistics") or {}).get("gradient"))
    return f"{job.op}_gradient" if wants_gradient else str(job.op)


def batches(claimed: Sequence[Claimed], most_rows: int) -> list[list[Claimed]]:
    """Jobs of one model and stage together, in their order, up to ``most_rows`` rows of the network.

    A job that fills a batch alone goes after those that do not, so that they need not wait for it.
    """
    full: list[list[Claimed]] = []
    open_batches: dict[tuple[str, str], tuple[list[Claimed], int]] = {}
    closed: list[list[Claimed]] = []
    for model, job in claimed:
        rows = network_rows(model, job)
        if rows >= most_rows:
            full.append([(model, job)])
            continue
        batch, taken = open_batches.get((job.model, stage_of(job)), ([], 0))
        if taken + rows > most_rows:
            closed.append(batch)
            batch, taken = [], 0
        batch.append((model, job))
        open_batches[job.model, stage_of(job)] = (batch, taken + rows)
    return [*closed, *(batch for batch, _ in open_batches.values()), *full]


class Unwanted(Exception):
    """Raised in the midst of a batch of which no job is wanted any more."""


class UrgentWork:
    """Runs what was claimed to its end, or until nobody wants it."""

    def __init__(self, outcomes: Outcomes, ceilings: Ceilings, batch_rows: int) -> None:
        self._outcomes, self._ceilings, self._batch_rows = outcomes, ceilings, batch_rows
        self._jobs: dict[str, Job] = {}
        self._computing: Sequence[Job] = ()

    @property
    def jobs(self) -> list[Job]:
        """Those that are not done yet, for heartbeats in the meantime."""
        return list(self._jobs.values())

    def run(self, claimed: Sequence[Claimed]) -> float:
        """Do these jobs; returns the seconds it took."""
        start = time.perf_counter()
        self._jobs = {job.id: job for _, job in claimed}
        for batch in batches(claimed, self._batch_rows):
            self._batch(batch[0][0], [job for _, job in batch])
        return time.perf_counter() - start

    def drop(self, job_ids: Collection[str]) -> None:
        """Let go of jobs that are not wanted here any more. Called from within a batch that has no others, raises
        :class:`Unwanted`, which ends it; rows that share a batch with others are just not delivered."""
        for job_id in self._jobs.keys() & set(job_ids):
            job = self._jobs.pop(job_id)
            self._outcomes.dropped(job, job.rows)
        if self._computing and not self._wanted(self._computing):
            raise Unwanted

    def _wanted(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if job.id in self._jobs]

    def _batch(self, model: LoadedModel, jobs: Sequence[Job]) -> None:
        """A batch; one that fails is done again job by job, and the one that fails alone ends with an error."""
        jobs = self._wanted(jobs)
        if not jobs:
            return
        start = time.perf_counter()
        self._computing = jobs
        try:
            with self._outcomes.computing(jobs[0]):
                results, out_of_memory = self._attempt(model, jobs)
        except Unwanted:
            return
        finally:
            self._computing = ()
        seconds = time.perf_counter() - start
        if results is not None:
            self._outcomes.batch(jobs, sum(job.rows for job in jobs), seconds)
            pairs = zip(jobs, results, strict=True)
            wanted = [(job, arrays) for job, arrays in pairs if job.id in self._jobs]
            self._outcomes.deliver([Finished(Part.whole(job), arrays, seconds) for job, arrays in wanted])
            for job, _ in wanted:
                del self._jobs[job.id]
        elif len(jobs) > 1:
            for job in jobs:
                self._batch(model, [job])
        elif self._wanted(jobs):
            self._outcomes.fail(jobs[0], out_of_memory=out_of_memory)
            del self._jobs[jobs[0].id]

    def _attempt(self, model: LoadedModel, jobs: Sequence[Job]) -> tuple[list[Arrays] | None, bool]:
        """Results, with as many rows in a pass as the memory has room for; or none, and whether that was for it."""
        name, stage = model.info.name, stage_of(jobs[0])
        most = min(self._batch_rows, sum(network_rows(model, job) for job in jobs))
        if stage != jobs[0].op:
            most = min(most, MOST_SLICE_ROWS[model.device.type])
        rows = model.pass_rows(self._ceilings.most(name, stage, most))
        while True:
            try:
                return RUN[jobs[0].op](model, jobs, rows), False
            except BATCH_FAULTS as error:
                out_of_memory = is_out_of_memory(error)
                self._outcomes.fault(jobs, error, out_of_memory=out_of_memory)
            # Out here the exception is gone, and with it what its frames held.
            if not out_of_memory:
                check_device(model.device)
                return None, False
            make_room(model.device)
            if rows == 1:
                self._ceilings.forget(name, stage)
                return None, True
            rows = self._ceilings.failed(name, stage, rows)
