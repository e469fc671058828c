"""The inference loop of one device: urgent batches between the slices of sampling cohorts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from service.broker.base import WorkerBroker
from service.errors import InternalError
from service.jobs import LONG, URGENT, Job, JobResult, Op
from service.worker import cohort as cohorts
from service.worker.cohort import Cohort
from service.worker.loading import LoadedModel
from service.worker.metrics import WorkerMetrics
from service.worker.scoring import RUN, Arrays

log = logging.getLogger(__name__)

POLL_SECONDS = 0.005
"""How long slices run before the broker is asked for urgent work again."""
FAIR_SECONDS = 0.2
"""Longest time for slices between two looks for urgent work."""
HEARTBEAT_SECONDS = 0.25
IDLE_SECONDS = 0.5

BATCH_FAULTS = (RuntimeError, ValueError, MemoryError)
"""What torch raises on a batch it cannot do; anything else is a fault of ours and ends the process."""


class Engine:
    """Claims jobs, runs them in batches, delivers the results; one thread, one device."""

    def __init__(
        self,
        broker: WorkerBroker,
        models: Mapping[str, LoadedModel],
        metrics: WorkerMetrics,
        *,
        batch_rows: int,
        max_cohorts: int,
    ) -> None:
        self._broker, self._models, self._metrics = broker, models, metrics
        self._batch_rows, self._max_cohorts = batch_rows, max_cohorts
        self._cohorts: deque[Cohort] = deque()
        self._urgent_jobs: Sequence[Job] = ()
        self._retries: deque[Job] = deque()
        self._retrying: Cohort | None = None
        self._last_heartbeat = 0.0
        self.stopping = False
        for model in models.values():
            for block in model.flow.blocks:
                # A pass of a large model takes longer than a heartbeat may; one block of it does not.
                block.register_forward_hook(lambda *_: self._heartbeat())

    def run(self) -> None:
        """Work until :attr:`stopping` is set; then hand unfinished jobs back."""
        while not self.stopping:
            urgent_seconds = self._urgent(wait=not self._cohorts)
            self._retry_one()
            if len(self._cohorts) < self._max_cohorts:
                jobs = self._broker.claim(LONG, self._batch_rows, timeout=0)
                self._cohorts.extend(Cohort(self._models[jobs[0].model], jobs) for jobs in cohorts.group(jobs))
            self._slices(urgent_seconds)
            self._heartbeat()
        for job in [*self._retries, *(job for cohort in self._cohorts for job in cohort.jobs)]:
            self._broker.release(job)

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat < HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = now
        for model in self._models.values():
            if model.device.type == "cuda":
                held = torch.cuda.memory_reserved(model.device)
                self._metrics.memory.labels(device=str(model.device)).set(held)
        progress = dict.fromkeys((job.id for job in [*self._urgent_jobs, *self._retries]), 0.0)
        progress |= {job.id: cohort.fraction for cohort in self._cohorts for job in cohort.jobs}
        lost = self._broker.heartbeat(progress, self._metrics.snapshot())
        for cohort in self._cohorts:
            cohort.drop(lost)
        self._retries = deque(job for job in self._retries if job.id not in lost)

    # Urgent work.

    def _urgent(self, *, wait: bool) -> float:
        """Do the urgent jobs that wait; returns the seconds it took. An idle worker waits here for any job."""
        ops = URGENT | LONG if wait else URGENT
        jobs = self._broker.claim(ops, self._batch_rows, timeout=IDLE_SECONDS if wait else 0)
        long = [job for job in jobs if job.op in LONG]
        self._cohorts.extend(Cohort(self._models[jobs[0].model], jobs) for jobs in cohorts.group(long))
        batches: dict[tuple[str, Op], list[Job]] = {}
        # All of them are kept alive while the first is worked on.
        start = time.perf_counter()
        self._urgent_jobs = [job for job in jobs if job.op in URGENT]
        for job in self._urgent_jobs:
            batches.setdefault((job.model, job.op), []).append(job)
        for batch in batches.values():
            self._urgent_batch(batch)
        self._urgent_jobs = ()
        return time.perf_counter() - start

    def _urgent_batch(self, jobs: Sequence[Job]) -> None:
        model, op = self._models[jobs[0].model], jobs[0].op
        start = time.perf_counter()
        try:
            results = RUN[op](model, jobs, self._batch_rows)
        except BATCH_FAULTS as error:
            self._batch_failed(jobs, error)
            if len(jobs) > 1:
                for job in jobs:
                    self._urgent_batch([job])
            return
        seconds = time.perf_counter() - start
        self._observe_batch(jobs, seconds)
        for job, arrays in zip(jobs, results, strict=True):
            self._deliver(job, arrays, seconds)

    # Sampling.

    def _retry_one(self) -> None:
        """Start the next job of a failed batch alone; one at a time, since memory may be what they lacked."""
        if self._retries and self._retrying not in self._cohorts:
            job = self._retries.popleft()
            self._retrying = Cohort(self._models[job.model], [job])
            self._cohorts.append(self._retrying)

    def _slices(self, urgent_seconds: float) -> None:
        """Advance cohorts in turn for one polling interval.

        After long urgent work it is as long as that, within bounds: scores without end must not starve samples.
        """
        until = time.perf_counter() + max(POLL_SECONDS, min(urgent_seconds, FAIR_SECONDS))
        while self._cohorts and time.perf_counter() < until:
            # It stays where it is while it works, so that heartbeats in the meantime speak of it.
            cohort = self._cohorts[0]
            start = time.perf_counter()
            op, name = str(cohort.jobs[0].op), cohort.model.info.name
            try:
                done = cohort.advance()
                results = cohort.results() if done else []
            except BATCH_FAULTS as error:
                self._cohorts.popleft()
                self._batch_failed(cohort.jobs, error)
                if len(cohort.jobs) > 1:
                    self._retries.extend(cohort.jobs)
                continue
            self._metrics.slice.labels(model=name, op=op).observe(time.perf_counter() - start)
            if not done:
                self._cohorts.rotate(-1)
                continue
            self._cohorts.popleft()
            if results:
                self._observe_batch([job for job, _ in results], cohort.seconds)
            for job, arrays in results:
                self._deliver(job, arrays, cohort.seconds, plan=cohort.plan.describe() if cohort.plan else ())

    # Outcomes.

    def _batch_failed(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Log a failed batch; a job that failed alone ends with an error, others are tried alone."""
        log.error("a batch of %d %s jobs failed", len(jobs), jobs[0].op, exc_info=error)
        self._metrics.failed_batches.labels(model=jobs[0].model, op=str(jobs[0].op)).inc()
        if len(jobs) == 1:
            reason = "the device is out of memory" if isinstance(error, torch.OutOfMemoryError) else "the model failed"
            self._broker.fail(jobs[0], InternalError(f"{reason} on this request; the service's log has the details"))

    def _observe_batch(self, jobs: Sequence[Job], seconds: float) -> None:
        labels = {"model": jobs[0].model, "op": str(jobs[0].op)}
        self._metrics.inference.labels(**labels).observe(seconds)
        self._metrics.batch.labels(**labels).observe(sum(job.rows for job in jobs))

    def _deliver(self, job: Job, arrays: Arrays, seconds: float, plan: Sequence[str] = ()) -> None:
        labels = {"model": job.model, "op": str(job.op)}
        self._metrics.images.labels(**labels).inc(job.rows)
        if "finite" in arrays:
            self._metrics.nonfinite.labels(**labels).inc(int((arrays["finite"] == 0).sum()))
        for bits in arrays.get("bits_per_dim", ()):
            self._metrics.bits.labels(model=job.model).observe(float(bits))
        if plan:
            tolerance = float(job.payload["solver"]["tolerance"])
            self._metrics.observe_sampling(job.model, plan, tolerance, arrays)
        if not self._broker.complete(job, JobResult(arrays=arrays, inference_seconds=seconds, plan=plan)):
            log.info("the result of %s was not wanted any more", job.id)
