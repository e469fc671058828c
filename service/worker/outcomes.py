"""What becomes of jobs: results and errors, counted and delivered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from service import logs
from service.broker.base import WorkerBroker
from service.errors import OUT_OF_MEMORY, InternalError, InvalidRequest
from service.jobs import Job, JobResult
from service.worker.cohort import Preview
from service.worker.metrics import WorkerMetrics
from service.worker.parts import Assembly, Part
from service.worker.scoring import Arrays

log = logging.getLogger(__name__)

MOST_RESULT_BYTES = 2**29 - 2**20
"""What every broker takes: a value in Redis has at most 512 MiB, a frame of the socket 1 GiB."""


@dataclass(frozen=True)
class Finished:
    """What was made of a part of a job."""

    part: Part
    arrays: Arrays
    seconds: float
    plan: Sequence[str] = ()


class Outcomes:
    """The way from a worker's batches to the callers."""

    def __init__(self, broker: WorkerBroker, metrics: WorkerMetrics) -> None:
        self._broker, self._metrics = broker, metrics
        self._assembly = Assembly()

    def computing(self, job: Job) -> AbstractContextManager[None]:
        """Around the work on a batch of jobs like this one."""
        return self._metrics.computing(job.model, str(job.op))

    def batch(self, jobs: Sequence[Job], rows: int, seconds: float) -> None:
        """Count a batch of one model and op that is done."""
        labels = {"model": jobs[0].model, "op": str(jobs[0].op)}
        self._metrics.inference.labels(**labels).observe(seconds)
        self._metrics.batch.labels(**labels).observe(rows)

    def fault(self, jobs: Sequence[Job], error: BaseException, *, out_of_memory: bool) -> None:
        """Log and count a batch that failed; what becomes of its jobs is decided elsewhere."""
        labels = {"model": jobs[0].model, "op": str(jobs[0].op)}
        if out_of_memory:
            message = "a batch of %d %s jobs ran out of memory: %s"
            log.warning(message, len(jobs), jobs[0].op, error, extra=logs.about(*jobs))
            self._metrics.oom.labels(**labels).inc()
        else:
            message = "a batch of %d %s jobs failed"
            log.error(message, len(jobs), jobs[0].op, exc_info=error, extra=logs.about(*jobs))
            self._metrics.failed_batches.labels(**labels).inc()

    def fail(self, job: Job, *, out_of_memory: bool) -> None:
        """End a job that failed by itself."""
        self.forget(job.id)
        details = "the service's log has the details"
        if out_of_memory:
            error = InternalError(
                f"the device is out of memory even for one image of this request; {details}", code=OUT_OF_MEMORY
            )
        else:
            error = InternalError(f"the model failed on this request; {details}")
        self._broker.fail(job, error)

    def dropped(self, job: Job, rows: int) -> None:
        """Count rows that leave because the job is no longer this worker's."""
        self._metrics.dropped.labels(model=job.model, op=str(job.op)).inc(rows)

    def forget(self, job_id: str) -> None:
        """Parts of this job will not come together."""
        self._assembly.forget(job_id)

    def share(self, job: Job) -> float:
        """Which share of a job's rows is finished."""
        return self._assembly.share(job)

    def show(self, previews: Sequence[Preview]) -> None:
        """Tell those who follow their jobs what the images look like by now."""
        for preview in previews:
            data = {
                "block": preview.block,
                "blocks": preview.num_blocks,
                "start": preview.part.start,
                "pixels": preview.pixels,
            }
            self._broker.publish(preview.part.job, "preview", data)

    def deliver(self, finished: Sequence[Finished]) -> None:
        """Parts are finished; with the last of a job's the job is."""
        together: list[tuple[Job, JobResult]] = []
        taken = 0
        for each in finished:
            result = self._whole(each)
            if result is None:
                continue
            size = sum(array.nbytes for array in result.arrays.values())
            if size > MOST_RESULT_BYTES:
                self._broker.fail(each.part.job, _too_large(size))
                continue
            if taken + size > MOST_RESULT_BYTES:
                self._complete(together)
                together, taken = [], 0
            together.append((each.part.job, result))
            taken += size
        self._complete(together)

    def _complete(self, results: Sequence[tuple[Job, JobResult]]) -> None:
        if not results:
            return
        for (job, _), wanted in zip(results, self._broker.complete_all(results), strict=True):
            if not wanted:
                log.info("the result of %s was not wanted any more", job.id, extra=logs.about(job))
            elif log.isEnabledFor(logging.DEBUG):
                log.debug("%s is done", job.id, extra=logs.about(job))

    def _whole(self, finished: Finished) -> JobResult | None:
        """Count a part, and put the job's result together if that was the last."""
        part, arrays, plan = finished.part, finished.arrays, finished.plan
        job = part.job
        labels = {"model": job.model, "op": str(job.op)}
        self._metrics.images.labels(**labels).inc(part.rows)
        if "finite" in arrays:
            self._metrics.nonfinite.labels(**labels).inc(int((arrays["finite"] == 0).sum()))
        if "bits_per_dim" in arrays:
            self._metrics.observe_bits(job.model, arrays["bits_per_dim"])
        if plan:
            tolerance = float(job.payload["solver"]["tolerance"])
            self._metrics.observe_sampling(job.model, plan, tolerance, arrays)
        whole = self._assembly.add(part, arrays, finished.seconds, plan)
        if whole is None:
            return None
        return JobResult(arrays=whole.arrays, inference_seconds=whole.seconds, plan=whole.plan)


def _too_large(size: int) -> InvalidRequest:
    """No broker would take it, however often it was brought: the worker would be lost on it."""
    return InvalidRequest(
        f"the result has {size} bytes, allowed are {MOST_RESULT_BYTES}; ask for fewer images, or for no trajectory",
        code="result_too_large",
    )
