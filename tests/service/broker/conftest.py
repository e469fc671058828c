"""The memory broker with workers of both kinds: in the same event loop, and behind the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from model.config import FlowConfig, NoiseProtocol, SamplingDefaults
from service.broker.memory import MemoryBroker
from service.broker.socket import BrokerServer, SocketWorkerBroker
from service.errors import ServiceError
from service.jobs import Job, JobResult, ModelInfo, Op, WorkerInfo

FLOW = FlowConfig(image_size=4, channels=1, patch_size=2, width=64, num_blocks=2, layers_per_block=1)


def model(name: str) -> ModelInfo:
    """Metadata of a model that nobody has to have."""
    noise = NoiseProtocol(kind="gaussian", std=0.1)
    return ModelInfo(name=name, model_id=f"sha256:{name}", flow=FLOW, noise=noise, sampling=SamplingDefaults())


def job(job_id: str, op: Op = Op.SAMPLE, *, rows: int = 1, cost: int = 1, model: str = "m") -> Job:
    """A job with an array in it."""
    payload = {"seeds": list(range(rows)), "label": None, "array": np.arange(rows, dtype=np.float32)}
    return Job(id=job_id, op=op, model=model, payload=payload, rows=rows, cost=cost)


def result(value: float = 1.0) -> JobResult:
    """A result that can be told from others."""
    return JobResult(arrays={"value": np.array([value])}, inference_seconds=0.5)


class Worker(Protocol):
    """The worker's face, awaited."""

    async def claim(self, ops: Collection[Op] = ..., max_rows: int = ..., timeout: float = ...) -> list[Job]: ...
    async def heartbeat(
        self, progress: Mapping[str, float], figures: Sequence[Mapping[str, Any]] = ...
    ) -> set[str]: ...
    async def complete(self, job: Job, result: JobResult) -> bool: ...
    async def fail(self, job: Job, error: ServiceError) -> bool: ...
    async def release(self, job: Job) -> None: ...
    async def leave(self) -> None: ...


class LocalWorker:
    """Calls the broker directly."""

    def __init__(self, broker: MemoryBroker, worker_id: str) -> None:
        self._broker, self.id = broker, worker_id

    async def claim(self, ops: Collection[Op] = tuple(Op), max_rows: int = 64, timeout: float = 0) -> list[Job]:
        return await self._broker.claim(self.id, ops, max_rows, timeout)

    async def heartbeat(self, progress: Mapping[str, float], figures: Sequence[Mapping[str, Any]] = ()) -> set[str]:
        return self._broker.heartbeat(self.id, progress, figures)

    async def complete(self, job: Job, result: JobResult) -> bool:
        return self._broker.complete(self.id, job.id, job.attempt, result)

    async def fail(self, job: Job, error: ServiceError) -> bool:
        return self._broker.fail(self.id, job.id, job.attempt, error)

    async def release(self, job: Job) -> None:
        self._broker.release(self.id, job.id, job.attempt)

    async def leave(self) -> None:
        self._broker.unregister(self.id)


class SocketWorker:
    """Calls the broker through the socket, from threads as the blocking face wants it."""

    def __init__(self, broker: MemoryBroker, face: SocketWorkerBroker, worker_id: str) -> None:
        self._broker, self.face, self.id = broker, face, worker_id

    async def claim(self, ops: Collection[Op] = tuple(Op), max_rows: int = 64, timeout: float = 0) -> list[Job]:
        return await asyncio.to_thread(self.face.claim, ops, max_rows, timeout)

    async def heartbeat(self, progress: Mapping[str, float], figures: Sequence[Mapping[str, Any]] = ()) -> set[str]:
        return await asyncio.to_thread(self.face.heartbeat, progress, figures)

    async def complete(self, job: Job, result: JobResult) -> bool:
        return await asyncio.to_thread(self.face.complete, job, result)

    async def fail(self, job: Job, error: ServiceError) -> bool:
        return await asyncio.to_thread(self.face.fail, job, error)

    async def release(self, job: Job) -> None:
        await asyncio.to_thread(self.face.release, job)

    async def leave(self) -> None:
        self.face.close()
        while self.id in [status.info.id for status in await self._broker.workers()]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Bench:
    """A broker, and workers for it."""

    def __init__(self, kind: str, path: Path) -> None:
        self._kind, self.path = kind, path
        self._faces: list[SocketWorkerBroker] = []
        self._server: BrokerServer | None = None
        self.broker = MemoryBroker(max_queue_cost=1000, lease_seconds=60, ready_seconds=60, max_attempts=3)

    async def open(self, **limits: float) -> MemoryBroker:
        """Start over with other limits."""
        await self.close()
        known = {"max_queue_cost": 1000, "lease_seconds": 60.0, "ready_seconds": 60.0, "max_attempts": 3}
        self.broker = MemoryBroker(**{**known, **limits})  # type: ignore[arg-type]
        if self._kind == "socket":
            # The tests look after expired leases themselves.
            self._server = BrokerServer(self.broker, self.path, sweep_seconds=3600)
            await self._server.start()
        return self.broker

    async def worker(self, worker_id: str = "w1", models: Sequence[str] = ("m",)) -> Worker:
        """A registered worker."""
        info = WorkerInfo(id=worker_id, device="cpu", models=tuple(model(name) for name in models))
        if self._kind == "local":
            self.broker.register(info)
            return LocalWorker(self.broker, worker_id)
        face = await asyncio.to_thread(SocketWorkerBroker, self.path)
        self._faces.append(face)
        await asyncio.to_thread(face.register, info)
        return SocketWorker(self.broker, face, worker_id)

    async def close(self) -> None:
        """End all connections."""
        for face in self._faces:
            face.close()
        if self._server is not None:
            await self._server.stop()


@pytest.fixture(params=["local", "socket"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """A broker with ample limits."""
    bench = Bench(request.param, tmp_path / "broker.sock")
    await bench.open()
    yield bench
    await bench.close()
