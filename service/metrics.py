"""The metrics of an API process, with the workers' figures beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.broker.base import QueueStats, WorkerStatus
from service.drift import Drift
from service.jobs import Op

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 1, 3, 10, 30, 120, 480, 1920, 7680)


class ServiceMetrics:
    """Counters and histograms of one API process, and its drift, in a registry of its own."""

    def __init__(self, drift: Drift) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(drift)
        own = self.registry
        labels = ("model", "op")
        self.requests = Counter("tarflow_requests", "Requests by outcome", (*labels, "outcome"), registry=own)
        self.refused = Counter("tarflow_refused", "Requests refused before their route", ("code",), registry=own)
        self.seconds = Histogram("tarflow_request_seconds", "Whole requests", labels, registry=own, buckets=SECONDS)
        self.queue_wait = Histogram(
            "tarflow_queue_wait_seconds", "From acceptance to a worker", labels, registry=own, buckets=SECONDS
        )

    def render_own(self) -> bytes:
        """What this process has counted, in Prometheus' text format."""
        return generate_latest(self.registry)

    def render(self, stats: QueueStats, workers: Sequence[WorkerStatus], ready: int, restarts: int) -> bytes:
        """Everything in Prometheus' text format, as of now."""
        present = CollectorRegistry()
        present.register(_Present(stats, workers, ready, restarts))
        return self.render_own() + generate_latest(present)


class _Present(Collector):
    """Figures that are read rather than counted: the queue, and what the workers reported."""

    def __init__(self, stats: QueueStats, workers: Sequence[WorkerStatus], ready: int, restarts: int) -> None:
        self._stats, self._workers, self._ready, self._restarts = stats, workers, ready, restarts

    def collect(self) -> Iterable[Metric]:
        """All families, each once."""
        depth = GaugeMetricFamily("tarflow_queue_depth", "Jobs that wait", labels=["op"])
        running = GaugeMetricFamily("tarflow_jobs_running", "Jobs that a worker has", labels=["op"])
        for op in Op:
            depth.add_metric([str(op)], self._stats.waiting.get(op, 0))
            running.add_metric([str(op)], self._stats.running.get(op, 0))
        yield depth
        yield running
        yield GaugeMetricFamily("tarflow_queue_cost", "Waiting work in units of cost", self._stats.waiting_cost)
        yield GaugeMetricFamily(
            "tarflow_queue_oldest_seconds", "Age of the oldest waiting job", self._stats.oldest_wait_seconds
        )
        yield GaugeMetricFamily("tarflow_workers_ready", "Workers with a fresh heartbeat", self._ready)
        restarts = Metric("tarflow_worker_restarts", "Workers that were restarted", "counter")
        restarts.add_sample("tarflow_worker_restarts_total", {}, self._restarts)
        yield restarts
        age = GaugeMetricFamily(
            "tarflow_worker_heartbeat_age_seconds", "Since a worker's inference loop was heard", labels=["worker"]
        )
        for worker in self._workers:
            age.add_metric([worker.info.id], worker.heartbeat_age)
        yield age
        yield from _merged([family for worker in self._workers for family in worker.measurements])


def _merged(families: Sequence[Mapping[str, Any]]) -> Iterable[Metric]:
    """Families of several workers with the same name as one family."""
    merged: dict[str, Metric] = {}
    for family in families:
        name = family["name"]
        metric = merged.setdefault(name, Metric(name, family["documentation"], family["type"]))
        for sample, labels, value in family["samples"]:
            if not sample.endswith("_created"):
                metric.add_sample(sample, labels, value)
    return merged.values()
