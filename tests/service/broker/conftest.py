"""Every broker with its workers: the memory broker's in the same event loop, and behind the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from model.config import FlowConfig, NoiseProtocol, SamplingDefaults
from service.broker.base import Broker, Held, Limits, Orders, WorkerBroker
from service.broker.memory import MemoryBroker
from service.broker.redis.api import RedisBroker
from service.broker.redis.worker import RedisWorkerBroker
from service.broker.socket import BrokerServer, SocketWorkerBroker
from service.errors import ServiceError
from service.jobs import Job, JobResult, Lane, ModelInfo, Op, WorkerInfo
from tests.service.broker.redis_server import RedisServer, redis_server, shared_redis  # noqa: F401 (fixtures)

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


AMPLE = Limits(max_queue_cost=1000, caller_share=1.0, lease_seconds=60, ready_seconds=60, max_attempts=3)


def info(worker_id: str, models: Sequence[str]) -> WorkerInfo:
    """A worker that serves these."""
    return WorkerInfo(id=worker_id, device="cpu", models=tuple(model(name) for name in models))


def held(*jobs: Job, fraction: float = 0.5, block: int | None = None) -> list[Held]:
    """Jobs as a heartbeat reports them."""
    return [Held(job_id=job.id, attempt=job.attempt, fraction=fraction, block=block) for job in jobs]


class Worker(Protocol):
    """The worker's face, awaited."""

    async def register(self, info: WorkerInfo) -> None: ...
    async def claim(self, lanes: Collection[Lane] = ..., max_rows: int = ..., timeout: float = ...) -> list[Job]: ...
    async def heartbeat(self, held: Sequence[Held] = ..., figures: Sequence[Mapping[str, Any]] = ...) -> Orders: ...
    async def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None: ...
    async def complete(self, job: Job, result: JobResult) -> bool: ...
    async def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]: ...
    async def fail(self, job: Job, error: ServiceError) -> bool: ...
    async def release(self, job: Job) -> None: ...
    async def leave(self) -> None: ...


class LocalWorker:
    """Calls the memory broker directly."""

    def __init__(self, broker: MemoryBroker, worker_id: str) -> None:
        self._broker, self.id = broker, worker_id

    async def register(self, info: WorkerInfo) -> None:
        self._broker.register(info)

    async def claim(self, lanes: Collection[Lane] = tuple(Lane), max_rows: int = 64, timeout: float = 0) -> list[Job]:
        return await self._broker.claim(self.id, lanes, max_rows, timeout)

    async def heartbeat(self, held: Sequence[Held] = (), figures: Sequence[Mapping[str, Any]] = ()) -> Orders:
        return self._broker.heartbeat(self.id, held, figures)

    async def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        self._broker.publish(self.id, job.id, job.attempt, kind, data)

    async def complete(self, job: Job, result: JobResult) -> bool:
        return self._broker.complete(self.id, job.id, job.attempt, result)

    async def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        return [await self.complete(job, result) for job, result in results]

    async def fail(self, job: Job, error: ServiceError) -> bool:
        return self._broker.fail(self.id, job.id, job.attempt, error)

    async def release(self, job: Job) -> None:
        self._broker.release(self.id, job.id, job.attempt)

    async def leave(self) -> None:
        self._broker.unregister(self.id)


class ThreadWorker:
    """Calls a blocking face from threads, as it wants it."""

    def __init__(self, broker: Broker, face: WorkerBroker, worker_id: str) -> None:
        self._broker, self.face, self.id = broker, face, worker_id

    async def register(self, info: WorkerInfo) -> None:
        await asyncio.to_thread(self.face.register, info)

    async def claim(self, lanes: Collection[Lane] = tuple(Lane), max_rows: int = 64, timeout: float = 0) -> list[Job]:
        return await asyncio.to_thread(self.face.claim, lanes, max_rows, timeout)

    async def heartbeat(self, held: Sequence[Held] = (), figures: Sequence[Mapping[str, Any]] = ()) -> Orders:
        return await asyncio.to_thread(self.face.heartbeat, held, figures)

    async def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        await asyncio.to_thread(self.face.publish, job, kind, data)

    async def complete(self, job: Job, result: JobResult) -> bool:
        return await asyncio.to_thread(self.face.complete, job, result)

    async def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        return await asyncio.to_thread(self.face.complete_all, results)

    async def fail(self, job: Job, error: ServiceError) -> bool:
        return await asyncio.to_thread(self.face.fail, job, error)

    async def release(self, job: Job) -> None:
        await asyncio.to_thread(self.face.release, job)

    async def leave(self) -> None:
        await asyncio.to_thread(self.face.close)
        while self.id in [status.info.id for status in await self._broker.workers()]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class MemoryBench:
    """A broker, and workers for it: in its event loop, or behind a socket."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._faces: list[SocketWorkerBroker] = []
        self._server: BrokerServer | None = None
        self.broker = MemoryBroker(AMPLE)

    async def open(self, **limits: float) -> MemoryBroker:
        """Start over with other limits. Nobody sweeps but the tests."""
        await self.close()
        self.broker = MemoryBroker(replace(AMPLE, **limits))  # type: ignore[arg-type]
        if self._path is not None:
            self._server = BrokerServer(self.broker, self._path)
            await self._server.start()
        return self.broker

    async def worker(self, worker_id: str = "w1", models: Sequence[str] = ("m",)) -> Worker:
        """A registered worker."""
        worker: Worker = LocalWorker(self.broker, worker_id)
        if self._path is not None:
            face = await asyncio.to_thread(SocketWorkerBroker, self._path)
            self._faces.append(face)
            worker = ThreadWorker(self.broker, face, worker_id)
        await worker.register(info(worker_id, models))
        return worker

    async def sweep(self) -> None:
        """What happens by itself after a while."""
        self.broker.sweep()

    async def close(self) -> None:
        """End all connections."""
        for face in self._faces:
            face.close()
        if self._server is not None:
            await self._server.stop()


class RedisBench:
    """A real Redis, an API process's face of it, and workers with connections of their own."""

    def __init__(self, server: RedisServer) -> None:
        self._url = server.url
        self._server = server
        self._faces: list[RedisWorkerBroker] = []
        self._limits = AMPLE
        self.broker = RedisBroker(self._url, AMPLE)

    async def open(self, **limits: float) -> RedisBroker:
        """Start over with other limits and an empty Redis."""
        await self.close()
        with self._server.client() as client:
            client.flushall()
        self._limits = replace(AMPLE, **limits)  # type: ignore[arg-type]
        self.broker = RedisBroker(self._url, self._limits)
        await self.broker.start()
        return self.broker

    async def worker(self, worker_id: str = "w1", models: Sequence[str] = ("m",)) -> Worker:
        """A registered worker."""
        face = RedisWorkerBroker(self._url, worker_id, self._limits)
        self._faces.append(face)
        worker = ThreadWorker(self.broker, face, worker_id)
        await worker.register(info(worker_id, models))
        return worker

    async def sweep(self) -> None:
        """What happens by itself after a while."""
        await self.broker.sweep(every=0)

    async def close(self) -> None:
        """End all connections."""
        for face in self._faces:
            await asyncio.to_thread(face.close)
        self._faces = []
        await self.broker.close()


class Bench(Protocol):
    """What the contract's tests need of every kind of broker."""

    broker: Broker

    async def open(self, **limits: float) -> Broker: ...
    async def worker(self, worker_id: str = ..., models: Sequence[str] = ...) -> Worker: ...
    async def sweep(self) -> None: ...
    async def close(self) -> None: ...


@pytest.fixture(params=["local", "socket", "redis"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """A broker with ample limits."""
    bench: Bench
    if request.param == "redis":
        bench = RedisBench(request.getfixturevalue("redis_server"))
    else:
        bench = MemoryBench(tmp_path / "broker.sock" if request.param == "socket" else None)
    await bench.open()
    yield bench
    await bench.close()
