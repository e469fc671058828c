"""The memory broker's worker face over a Unix socket: calls with answers, one connection a worker.

A frame holds ``[method, arguments]`` one way and ``{"ok": value}`` or ``{"refused": reason}`` the other.
The connection's end is the worker's end: its jobs are given on at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.broker.base import WorkerBroker
from service.broker.memory import MemoryBroker
from service.errors import ServiceError
from service.jobs import Job, JobResult, Op, WorkerInfo
from service.messages import FRAME_HEADER, MessageError, frame, frame_length, unpack

log = logging.getLogger(__name__)


class BrokerServer:
    """Serves one :class:`MemoryBroker` on a Unix socket that only this user can open."""

    def __init__(self, broker: MemoryBroker, path: Path, sweep_seconds: float = 1.0) -> None:
        self._broker, self._path, self._sweep_seconds = broker, path, sweep_seconds
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen, and watch the leases."""
        self._server = await asyncio.start_unix_server(self._connected, str(self._path))
        self._path.chmod(0o600)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Close the socket and every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_seconds)
            if count := self._broker.reclaim_expired():
                log.warning("%d jobs were given on: their worker has not been heard", count)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        worker_id: str | None = None
        try:
            while True:
                header = await reader.readexactly(FRAME_HEADER.size)
                method, arguments = unpack(await reader.readexactly(frame_length(header)))
                if method == "register":
                    info = WorkerInfo.from_wire(arguments[0])
                    worker_id = info.id
                    self._broker.register(info)
                    answer: Any = {"ok": None}
                elif worker_id is None:
                    answer = {"refused": f"{method} before register"}
                else:
                    answer = {"ok": await self._call(worker_id, method, arguments)}
                writer.write(frame(answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker left
        except (MessageError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            log.error("worker %s sent something unusable and is cut off: %s", worker_id, error)
        finally:
            if worker_id is not None:
                self._broker.unregister(worker_id)
            writer.close()

    async def _call(self, worker_id: str, method: str, arguments: Sequence[Any]) -> Any:
        broker = self._broker
        if method == "claim":
            ops, max_rows, timeout = arguments
            jobs = await broker.claim(worker_id, {Op(op) for op in ops}, max_rows, timeout)
            return [job.to_wire() for job in jobs]
        if method == "heartbeat":
            progress, measurements = arguments
            return sorted(broker.heartbeat(worker_id, progress, measurements))
        job_id, attempt, *rest = arguments
        if method == "complete":
            return broker.complete(worker_id, job_id, attempt, JobResult.from_wire(rest[0]))
        if method == "fail":
            return broker.fail(worker_id, job_id, attempt, ServiceError.from_wire(rest[0]))
        if method == "release":
            return broker.release(worker_id, job_id, attempt)
        raise ValueError(f"unknown method {method!r}")


class BrokerGone(ConnectionError):
    """The API process closed the connection or died; a worker without it has nothing to do."""


class SocketWorkerBroker(WorkerBroker):
    """The worker's side of the socket: one blocking call at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise BrokerGone(f"no broker listens at {path}: {error}") from error

    def _receive(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(min(count - len(parts), 2**20))
            if not part:
                raise BrokerGone("the broker closed the connection")
            parts += part
        return bytes(parts)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._socket.sendall(frame([method, arguments]))
            answer = unpack(self._receive(frame_length(self._receive(FRAME_HEADER.size))))
        except BrokerGone:
            raise
        except OSError as error:
            raise BrokerGone(f"the connection to the broker broke: {error}") from error
        if "refused" in answer:
            raise RuntimeError(f"the broker refused: {answer['refused']}")
        return answer["ok"]

    def register(self, info: WorkerInfo) -> None:
        """See :class:`~service.broker.base.WorkerBroker`, here and below."""
        self._call("register", info.to_wire())

    def claim(self, ops: Collection[Op], max_rows: int, timeout: float) -> list[Job]:
        return [Job.from_wire(job) for job in self._call("claim", sorted(ops), max_rows, timeout)]

    def heartbeat(self, progress: Mapping[str, float], measurements: Sequence[Mapping[str, Any]]) -> set[str]:
        return set(self._call("heartbeat", dict(progress), list(measurements)))

    def complete(self, job: Job, result: JobResult) -> bool:
        return bool(self._call("complete", job.id, job.attempt, result.to_wire()))

    def fail(self, job: Job, error: ServiceError) -> bool:
        return bool(self._call("fail", job.id, job.attempt, error.to_wire()))

    def release(self, job: Job) -> None:
        self._call("release", job.id, job.attempt)

    def close(self) -> None:
        self._socket.close()
