"""The metrics of an API process, with the workers' figures beside them."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.broker.base import Ending, QueueStats, WorkerStatus
from service.drift import Drift
from service.jobs import Op

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 1, 3, 10, 30, 120, 480, 1920, 7680)
EXPECTED = ("ok", "error", "oom", "timeout", "worker_lost")
"""Outcomes of jobs that the alerts look at."""


class ServiceMetrics:
    """Counters and histograms of one API process, and its drift, in a registry of its own."""

    def __init__(self, drift: Drift) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(drift)
        own = self.registry
        ProcessCollector(registry=own)
        labels = ("model", "op")
        self.requests = Counter("tarflow_requests", "Requests by outcome", (*labels, "outcome"), registry=own)
        self.refused = Counter("tarflow_refused", "Requests refused before their route", ("code",), registry=own)
        self.seconds = Histogram(
            "tarflow_request_seconds",
            "Whole requests that were answered with their result",
            labels,
            registry=own,
            buckets=SECONDS,
        )
        self.broker_up = Gauge("tarflow_broker_up", "Whether the broker answered just now", registry=own)
        build = Gauge("tarflow_build_info", "What this process is; always 1", ("version", "python"), registry=own)
        build.labels(version=version("tarflow"), python=platform.python_version()).set(1)

    def render_own(self) -> bytes:
        """What this process can tell without a broker, in Prometheus' text format."""
        self.broker_up.set(0)
        return generate_latest(self.registry)

    def render(self, stats: QueueStats, workers: Sequence[WorkerStatus], ready: int, restarts: int) -> bytes:
        """Everything in Prometheus' text format, as of now."""
        self.broker_up.set(1)
        present = CollectorRegistry()
        present.register(_Present(stats, workers, ready, restarts))
        return generate_latest(self.registry) + generate_latest(present)


def _counter(name: str, documentation: str, value: float) -> Metric:
    """A counter that somebody else counts."""
    metric = Metric(name, documentation, "counter")
    metric.add_sample(f"{name}_total", {}, value)
    return metric


class _Present(Collector):
    """Figures that are read rather than counted: the queue, and what the workers reported.

    Of a broker that several API processes share, all of them tell the same.
    """

    def __init__(self, stats: QueueStats, workers: Sequence[WorkerStatus], ready: int, restarts: int) -> None:
        self._stats, self._workers, self._ready, self._restarts = stats, workers, ready, restarts

    def collect(self) -> Iterable[Metric]:
        """All families, each once."""
        yield from self._queue()
        yield from self._came_to_pass()
        yield GaugeMetricFamily("tarflow_workers_ready", "Workers with a fresh heartbeat", self._ready)
        yield _counter(
            "tarflow_worker_restarts", "Workers that this process has started again; only of serve", self._restarts
        )
        age = GaugeMetricFamily(
            "tarflow_worker_heartbeat_age_seconds", "Since a worker's inference loop was heard", labels=["worker"]
        )
        for worker in self._workers:
            age.add_metric([worker.info.id], worker.heartbeat_age)
        yield age
        yield from _merged([family for worker in self._workers for family in worker.measurements])

    def _queue(self) -> Iterable[Metric]:
        stats = self._stats
        depth = GaugeMetricFamily("tarflow_queue_depth", "Jobs that wait", labels=["op"])
        running = GaugeMetricFamily("tarflow_jobs_running", "Jobs that a worker has", labels=["op"])
        for op in Op:
            depth.add_metric([str(op)], stats.waiting.get(op, 0))
            running.add_metric([str(op)], stats.running.get(op, 0))
        yield depth
        yield running
        yield GaugeMetricFamily("tarflow_queue_cost", "Waiting work in units of cost", stats.waiting_cost)
        yield GaugeMetricFamily(
            "tarflow_queue_oldest_seconds", "Age of the oldest waiting job", stats.oldest_wait_seconds
        )
        yield GaugeMetricFamily("tarflow_queue_callers", "Named callers with work that waits", stats.callers)

    def _came_to_pass(self) -> Iterable[Metric]:
        stats = self._stats
        jobs = CounterMetricFamily(
            "tarflow_jobs", "Jobs that have ended, asynchronous ones too, by outcome", labels=["model", "op", "outcome"]
        )
        # From 0 on where the alerts look: an increase from nothing would not be seen.
        names = {model.name for worker in self._workers for model in worker.info.models}
        expected = {Ending(name, op, outcome): 0 for name in sorted(names) for op in Op for outcome in EXPECTED}
        for ending, count in {**expected, **stats.ended}.items():
            jobs.add_metric([ending.model, str(ending.op), ending.outcome], count)
        yield jobs
        yield _counter(
            "tarflow_jobs_reclaimed", "Jobs that were given on because their worker was lost", stats.reclaimed
        )
        yield _counter("tarflow_dead_letters", "Jobs that failed because too many workers were lost", stats.dead)


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
