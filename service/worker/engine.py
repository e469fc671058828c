"""The inference loop of one device: urgent batches between the slices of sampling cohorts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from weakref import WeakSet

import torch

from model.flow import Flow
from service.broker.base import Held, WorkerBroker
from service.jobs import Job, Lane, WorkerInfo, lane_of
from service.worker.ceilings import Ceilings
from service.worker.loading import LoadedModel
from service.worker.long import LongWork
from service.worker.metrics import WorkerMetrics
from service.worker.models import Models
from service.worker.outcomes import Outcomes
from service.worker.room import Room
from service.worker.urgent import Claimed, UrgentWork

log = logging.getLogger(__name__)

POLL_SECONDS = 0.005
"""How long slices run before the broker is asked for urgent work again."""
FAIR_SECONDS = 0.2
"""Longest time for slices between two looks for urgent work."""
HEARTBEAT_SECONDS = 0.25
MEASUREMENT_SECONDS = 1.0
"""Collecting all measurements takes longer than a heartbeat."""
IDLE_SECONDS = 0.5
READING_SECONDS = 0.02
"""As the last, while a model is being read that is then to be warmed up."""
ANY = frozenset(Lane)


def _nothing() -> None:
    pass


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
        batch_wait_ms: float = 0,
        grace_seconds: float = 0,
        alive: Callable[[], None] | None = None,
    ) -> None:
        """``batch_rows`` bounds the images in a batch, ``max_cohorts`` the sampling batches in flight.

        An urgent batch that is not full waits up to ``batch_wait_ms`` for more when there is nothing else to do.
        Work in flight may take ``grace_seconds`` when the engine is stopped. ``alive`` is called at every turn, slice
        and block: whoever is not called for long may take it that the loop hangs.
        """
        self._broker, self._metrics = broker, metrics
        self._models = models if isinstance(models, Models) else _fixed(models)
        self._batch_rows, self._batch_wait, self._grace = batch_rows, batch_wait_ms / 1000, grace_seconds
        self._alive = alive or _nothing
        outcomes, ceilings = Outcomes(broker, metrics), Ceilings(metrics)
        self._ceilings = ceilings
        self._urgent = UrgentWork(outcomes, ceilings, batch_rows)
        self._long = LongWork(
            outcomes,
            metrics,
            ceilings,
            Room(self._models.device),
            batch_rows=batch_rows,
            max_cohorts=max_cohorts,
            alive=self._alive,
        )
        self._last_heartbeat = self._last_measurement = 0.0
        self._watched: WeakSet[Flow] = WeakSet()
        self.stopping = False
        """Set it, from anywhere, to end :meth:`run`."""
        self._note_models()

    def run(self) -> None:
        """Work until :attr:`stopping` is set; then finish what there is time for, and hand the rest back.

        Raises ``DeviceLost``, a ``SystemExit``, when the device fails for good.
        """
        while not self.stopping:
            self._turn()
        until = time.monotonic() + self._grace
        while self._long.busy and time.monotonic() < until:
            self._long.run(POLL_SECONDS)
            self._heartbeat()
        for job in self._long.jobs:
            self._broker.release(job)

    def _turn(self) -> None:
        self._alive()
        self._change_models()
        urgent_seconds = self._serve_urgent()
        rows = self._long.wanted_rows(self._models.values())
        if rows and (self._long.busy or urgent_seconds):
            # An idle worker has waited for any job already.
            self._long.add(self._known(self._broker.claim({Lane.LONG}, rows, timeout=0)))
        # After long urgent work slices have as much time, within bounds: scores without end must not starve samples.
        self._long.run(max(POLL_SECONDS, min(urgent_seconds, FAIR_SECONDS)))
        self._heartbeat()

    # Urgent work.

    def _serve_urgent(self) -> float:
        """Do the urgent jobs that wait; returns the seconds it took. An idle worker waits here for any job."""
        if self._long.busy:
            jobs = self._broker.claim({Lane.URGENT}, self._batch_rows, timeout=0)
        else:
            timeout = 0.0 if self._models.changing else IDLE_SECONDS
            jobs = self._broker.claim(ANY, self._batch_rows, READING_SECONDS if self._models.reading else timeout)
        if not jobs:
            return 0.0
        if lane_of(jobs[0].op) is Lane.LONG:
            self._long.add(self._known(jobs))
            return 0.0
        return self._urgent.run(self._known([*jobs, *self._more(jobs)]))

    def _more(self, jobs: list[Job]) -> list[Job]:
        """Urgent jobs that come while a batch that is not full waits for them."""
        found: list[Job] = []
        until = time.monotonic() + self._batch_wait
        while not self._long.busy and not self.stopping:
            rows = self._batch_rows - sum(job.rows for job in [*jobs, *found])
            left = until - time.monotonic()
            if rows <= 0 or left <= 0:
                break
            found += self._broker.claim({Lane.URGENT}, rows, left)
        return found

    def _known(self, jobs: list[Job]) -> list[Claimed]:
        """Jobs with their models, their waits counted; one whose model has just been unloaded is handed back."""
        for job in jobs:
            if job.waited is not None:
                self._metrics.queue_wait.labels(model=job.model, op=str(job.op)).observe(job.waited)
            if job.model not in self._models:
                self._broker.release(job)
        return [(self._models[job.model], job) for job in jobs if job.model in self._models]

    # Heartbeats.

    def _heartbeat(self) -> None:
        self._alive()
        now = time.monotonic()
        if now - self._last_heartbeat < HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = now
        measurements = []
        if now - self._last_measurement >= MEASUREMENT_SECONDS:
            self._last_measurement = now
            device = self._models.device
            if device.type == "cuda":
                free, size = torch.cuda.mem_get_info(device)
                held = torch.cuda.memory_reserved(device)
                self._metrics.observe_memory(str(device), held=held, free=free, size=size)
            measurements = self._metrics.snapshot()
        urgent = [Held(job_id=job.id, attempt=job.attempt) for job in self._urgent.jobs]
        orders = self._broker.heartbeat([*urgent, *self._long.held()], measurements)
        self._long.drop(orders.lost)
        for command in orders.commands:
            self._models.order(command)
        # Last, since it may end the batch that this is called from.
        self._urgent.drop(orders.lost)

    # Models.

    def _change_models(self) -> None:
        """Go on with what operators want of models; tell the broker what has come of it."""
        if not self._models.changing:
            return
        before = dict(self._models)
        changed = self._models.step(self._long.uses)
        for name in before:
            if self._models.get(name) is not before[name]:
                self._ceilings.forget_model(name)
        if changed:
            self._note_models()
            self._broker.register(self.info)

    @property
    def info(self) -> WorkerInfo:
        """The worker as it is to register."""
        models = self._models
        return WorkerInfo(
            id=self._metrics.worker_id,
            device=str(models.device),
            models=models.infos,
            states=dict(models.states),
            loads=dict(models.loads),
        )

    def _note_models(self) -> None:
        self._metrics.loaded.set(len(self._models))
        for name, seconds in self._models.seconds.items():
            self._metrics.load_seconds.labels(model=name).set(seconds)
        for name in self._models:
            self._metrics.expect(name)
        for model in self._models.values():
            if model.flow in self._watched:
                continue
            self._watched.add(model.flow)
            for block in model.flow.blocks:
                # A pass of a large model takes longer than a heartbeat may; one block of it does not.
                block.register_forward_hook(lambda *_: self._heartbeat())


def _fixed(models: Mapping[str, LoadedModel]) -> Models:
    """Models that nothing more can be loaded beside."""
    return Models(next(iter(models.values())).device, models)
