"""What a worker measures, and its form on the way to the API."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1, 3, 10, 30, 120, 480, 1920, 7680)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BITS = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 10, 12)


class WorkerMetrics:
    """The figures of one worker process, in a registry of its own."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self.registry = CollectorRegistry()
        labels, own = ("model", "op"), self.registry
        self.inference = Histogram(
            "tarflow_inference_seconds", "Model time of one batch", labels, registry=own, buckets=SECONDS
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
            "Bits per dimension of scored images",
            ("model",),
            registry=self.registry,
            buckets=BITS,
        )
        self.memory = Gauge("tarflow_device_memory_bytes", "Memory held on the device", ("device",), registry=own)

    def snapshot(self) -> list[dict[str, Any]]:
        """All samples as plain data, each with a ``worker`` label."""
        return [
            {
                "name": metric.name,
                "type": metric.type,
                "documentation": metric.documentation,
                "samples": [[s.name, {**s.labels, "worker": self._worker_id}, s.value] for s in metric.samples],
            }
            for metric in self.registry.collect()
        ]
