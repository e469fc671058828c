"""Engines on a bench: a real broker behind a real socket, and jobs for a tiny model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from model.config import SolverOptions
from service.broker.base import Held, Limits, Orders
from service.broker.memory import MemoryBroker
from service.broker.socket import BrokerServer, SocketWorkerBroker
from service.jobs import Job, JobResult, Op
from service.worker.engine import Engine
from service.worker.metrics import WorkerMetrics
from service.worker.models import Models

PATIENCE = 120
LEASE = 1.0
LIMITS = Limits(max_queue_cost=1000, caller_share=1.0, lease_seconds=LEASE, ready_seconds=60, max_attempts=3)


class Listening(SocketWorkerBroker):
    """The worker's face that keeps what the engine told it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.beats: list[dict[str, Held]] = []
        self.measured: list[int] = []
        self.completed: list[str] = []

    def heartbeat(self, held: Sequence[Held], measurements: Sequence[Any] = ()) -> Orders:
        self.beats.append({job.job_id: job for job in held})
        self.measured.append(len(measurements))
        return super().heartbeat(held, measurements)

    def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        self.completed += [job.id for job, _ in results]
        return super().complete_all(results)


class Bench:
    """An engine that is not running yet, behind a broker that knows it."""

    def __init__(self, broker: MemoryBroker, face: Listening, engine: Engine, metrics: WorkerMetrics) -> None:
        self.broker, self.face, self.engine, self.metrics = broker, face, engine, metrics
        self.thread = threading.Thread(target=engine.run)

    def start(self) -> None:
        """Let the engine work."""
        self.thread.start()

    async def stop(self) -> None:
        """Stop the engine, and wait until it has."""
        self.engine.stopping = True
        await asyncio.to_thread(self.thread.join)

    async def submit(self, *jobs: Job) -> None:
        for job in jobs:
            await self.broker.submit(job)

    async def arrays(self, job_id: str) -> dict[str, np.ndarray]:
        """What comes of a job."""
        return dict((await self.broker.wait(job_id, PATIENCE)).arrays)

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples over all labels but those given."""
        samples = (sample for family in self.metrics.snapshot() for sample in family["samples"])
        return float(sum(v for n, own, v in samples if n == name and labels.items() <= own.items()))


@asynccontextmanager
async def bench_of(models: Models, directory: Path, **options: Any) -> AsyncIterator[Bench]:
    """A bench with these models, whose engine has these options."""
    broker = MemoryBroker(LIMITS, sweep_seconds=0.05)
    await broker.start()
    server = BrokerServer(broker, directory / "socket")
    await server.start()
    face = await asyncio.to_thread(Listening, directory / "socket")
    metrics = WorkerMetrics("w")
    engine = Engine(face, models, metrics, **{"batch_rows": 8, "max_cohorts": 2, **options})
    await asyncio.to_thread(face.register, engine.info)
    bench = Bench(broker, face, engine, metrics)
    try:
        yield bench
    finally:
        if bench.thread.ident is not None:
            await bench.stop()
        face.close()
        await server.stop()
        await broker.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread brings about, for so long as :data:`PATIENCE` lasts."""
    for _ in range(PATIENCE * 200):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


def slow_down(bench: Bench, seconds: float) -> None:
    """Let every slice take longer, so that there is time to do something in the midst of it."""
    turn = bench.engine._long.turn

    def slowly() -> bool:
        time.sleep(seconds)
        return turn()

    bench.engine._long.turn = slowly  # type: ignore[method-assign]


def hold(bench: Bench) -> Callable[[], None]:
    """Let no slice be done until the function that is returned is called."""
    turn, held = bench.engine._long.turn, threading.Event()

    def wait() -> bool:
        return turn() if held.is_set() else not time.sleep(0.005)

    bench.engine._long.turn = wait  # type: ignore[method-assign]
    return held.set


def score(job_id: str, size: int = 8, rows: int = 1, draws: int = 1, model: str = "tiny-vp") -> Job:
    payload = {"pixels": np.zeros((rows, 1, size, size), np.uint8), "label": None, "draws": draws, "seed": 0}
    return Job(id=job_id, op=Op.SCORE, model=model, payload=payload, rows=rows, cost=1)


def decode(job_id: str, patches: int = 16, rows: int = 1, seed: int = 0, denoise: bool = False, **solver: Any) -> Job:
    latents = np.random.default_rng(seed).normal(size=(rows, patches, 4)).astype(np.float32)
    payload = {
        "latents": latents,
        "label": None,
        "options": {"denoise": denoise},
        "solver": SolverOptions(**solver).to_dict(),
        "trajectory": False,
        "floats": True,
    }
    return Job(id=job_id, op=Op.DECODE, model="tiny-vp", payload=payload, rows=rows, cost=1)
