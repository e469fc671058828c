"""What a worker measures, and how it is told: on a port of its own, or with heartbeats to the API."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.jobs import REDONE, Op, is_certified

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1, 3, 10, 30, 120, 480, 1920, 7680)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ERRORS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
PASSES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
CERTIFICATES = ("certified", "missed")
BITS = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 10, 12)


class WorkerMetrics(Collector):
    """The figures of one worker process, in a registry of its own."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.registry = CollectorRegistry()
        self._tells_itself = False
        labels, own = ("model", "op"), self.registry
        self.queue_wait = Histogram(
            "tarflow_queue_wait_seconds",
            "From acceptance to a job's first worker, by the broker's clock",
            labels,
            registry=own,
            buckets=SECONDS,
        )
        self.inference = Histogram(
            "tarflow_inference_seconds", "Model time of one batch", labels, registry=own, buckets=SECONDS
        )
        self.cpu = Counter(
            "tarflow_model_cpu_seconds", "CPU time of batches and slices, of all threads", labels, registry=own
        )
        self.slice = Histogram(
            "tarflow_slice_seconds", "Time of one slice of work", labels, registry=own, buckets=SECONDS
        )
        self.batch = Histogram("tarflow_batch_rows", "Images in one batch", labels, registry=own, buckets=ROWS)
        self.images = Counter("tarflow_images", "Images finished", labels, registry=own)
        self.nonfinite = Counter(
            "tarflow_nonfinite", "Images or scores with values that are not finite", labels, registry=own
        )
        self.failed_batches = Counter(
            "tarflow_failed_batches",
            "Batches that raised and were done again job by job",
            labels,
            registry=self.registry,
        )
        self.bits = Histogram(
            "tarflow_bits_per_dim",
            "Bits per dimension of scored images, or of their latents where the model has a codec",
            ("model",),
            registry=self.registry,
            buckets=BITS,
        )
        self.errors = Histogram(
            "tarflow_backward_error",
            "Finite backward errors of images, in standard deviations of the latents",
            ("model",),
            registry=own,
            buckets=ERRORS,
        )
        self.certificates = Counter(
            "tarflow_certificates", "Certificates of images by outcome", ("model", "outcome"), registry=own
        )
        self.redone = Counter(
            "tarflow_redone_images", "Images decoded again, sequentially in float32", ("model", "reason"), registry=own
        )
        self.passes = Histogram(
            "tarflow_solver_passes",
            "Network passes that an image took part in, over all blocks",
            ("model",),
            registry=own,
            buckets=PASSES,
        )
        self.plans = Counter(
            "tarflow_sampled_images", "Sampled and decoded images by kind of plan", ("model", "plan"), registry=own
        )
        self.merges = Counter(
            "tarflow_cohort_merges", "Cohorts that another took in at a block boundary", ("model",), registry=own
        )
        self.dropped = Counter(
            "tarflow_dropped_rows", "Images that left because nobody wants them any more", labels, registry=own
        )
        self.oom = Counter("tarflow_oom", "Batches that ran out of memory", labels, registry=own)
        self.ceiling = Gauge(
            "tarflow_batch_ceiling_rows", "Most images in a batch since one ran out of memory", labels, registry=own
        )
        self.loaded = Gauge("tarflow_loaded_models", "Models in memory", registry=own)
        self.load_seconds = Gauge(
            "tarflow_model_load_seconds", "From the order to load a model until it served", ("model",), registry=own
        )
        self.memory = Gauge(
            "tarflow_device_memory_bytes", "GPU memory that the worker holds", ("device",), registry=own
        )
        self.memory_used = Gauge(
            "tarflow_device_memory_used_bytes", "GPU memory that anybody holds", ("device",), registry=own
        )
        self.memory_size = Gauge("tarflow_device_memory_size_bytes", "GPU memory there is", ("device",), registry=own)
        started = Gauge("tarflow_worker_start_time_seconds", "Unix time when the worker began", registry=own)
        started.set_to_current_time()
        self._info = Gauge(
            "tarflow_worker_info", "What the worker is; always 1", ("version", "torch", "device"), registry=own
        )

    def introduce(self, device: str, torch: str) -> None:
        """Tell what the worker is."""
        self._info.labels(version=version("tarflow"), torch=torch, device=device).set(1)

    def observe_memory(self, device: str, *, held: int, free: int, size: int) -> None:
        """Note a GPU's memory in bytes: what this process holds, what nobody holds, and what there is."""
        self.memory.labels(device=device).set(held)
        self.memory_used.labels(device=device).set(size - free)
        self.memory_size.labels(device=device).set(size)

    def expect(self, model: str) -> None:
        """Begin to count a model's faults at 0: an increase from nothing would not be seen."""
        for counter in (self.nonfinite, self.oom, self.failed_batches):
            for op in Op:
                counter.labels(model=model, op=str(op))
        for outcome in CERTIFICATES:
            self.certificates.labels(model=model, outcome=outcome)

    def apart(self) -> CollectorRegistry:
        """All of it and the process's own, for a port of the worker; what is told there is not told to the API."""
        ProcessCollector(registry=self.registry)
        exported = CollectorRegistry()
        exported.register(self)
        self._tells_itself = True
        return exported

    @contextmanager
    def computing(self, model: str, op: str) -> Iterator[None]:
        """Count the CPU time of what is done inside."""
        before = time.process_time()
        try:
            yield
        finally:
            self.cpu.labels(model=model, op=op).inc(time.process_time() - before)

    def observe_sampling(
        self, model: str, plan: Sequence[str], tolerance: float, arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        """Count one job's sampled or decoded images: arrays as the cohort makes them."""
        self.plans.labels(model=model, plan=plan_kind(plan)).inc(len(arrays["passes"]))
        for passes in arrays["passes"]:
            self.passes.labels(model=model).observe(int(passes))
        for reason in filter(None, (REDONE[code] for code in arrays["redone"])):
            self.redone.labels(model=model, reason=reason).inc()
        for error in map(float, arrays["backward_error"]):
            certified = is_certified(error, tolerance)
            if certified is not None:
                self.certificates.labels(model=model, outcome=CERTIFICATES[not certified]).inc()
            if math.isfinite(error):  # a single infinity would be in the sum for ever
                self.errors.labels(model=model).observe(error)

    def observe_bits(self, model: str, values: Iterable[float]) -> None:
        """Count scores in bits per dimension; of those that are not finite the others' sum would not be any more."""
        histogram = self.bits.labels(model=model)
        for bits in map(float, values):
            if math.isfinite(bits):
                histogram.observe(bits)

    def collect(self) -> Iterator[Metric]:
        """All families, each sample with a ``worker`` label."""
        for family in self.registry.collect():
            named = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                named.add_sample(sample.name, {**sample.labels, "worker": self.worker_id}, sample.value)
            yield named

    def snapshot(self) -> list[dict[str, Any]]:
        """The same as plain data, for the API; nothing where the worker has a port of its own."""
        if self._tells_itself:
            return []
        return [
            {
                "name": family.name,
                "type": family.type,
                "documentation": family.documentation,
                "samples": [[s.name, s.labels, s.value] for s in family.samples],
            }
            for family in self.collect()
        ]


def plan_kind(plan: Sequence[str]) -> str:
    """``sequential``, ``jacobi``, or ``mixed``, of a plan's words for each block."""
    sequential = [word == "sequential" for word in plan]
    return "sequential" if all(sequential) else "mixed" if any(sequential) else "jacobi"
