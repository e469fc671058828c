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

from service.broker.base import BrokerGone, Command, Held, Orders, WorkerBroker
from service.broker.memory import MemoryBroker
from service.errors import ServiceError
from service.jobs import Job, JobResult, Lane, WorkerInfo
from service.messages import FRAME_HEADER, MessageError, frame, frame_length, unpack

log = logging.getLogger(__name__)


class BrokerServer:
    """Serves one :class:`MemoryBroker` on a Unix socket that only this user can open."""

    def __init__(self, broker: MemoryBroker, path: Path) -> None:
        self._broker, self._path = broker, path
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._connection_of: dict[str, asyncio.Task[None] | None] = {}  # by worker

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._connected, str(self._path))
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Close the socket and every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

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
                    if worker_id is None:
                        self._replace(info.id, task)
                    worker_id = info.id
                    self._broker.register(info)
                    answer: Any = {"ok": None}
                elif worker_id is None:
                    answer = {"refused": f"{method} before register"}
                else:
                    answer = {"ok": await self._call(worker_id, method, arguments)}
                    if method == "claim" and reader.at_eof():
                        # It died while it waited: no job was lost on it.
                        for job in answer["ok"]:
                            self._broker.release(worker_id, job["id"], job["attempt"])
                        break
                writer.write(frame(answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker left
        except (MessageError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            log.error("worker %s sent something unusable and is cut off: %s", worker_id, error)
        finally:
            if worker_id is not None and self._connection_of.get(worker_id) is task:
                del self._connection_of[worker_id]
                self._broker.unregister(worker_id)
            writer.close()

    def _replace(self, worker_id: str, connection: asyncio.Task[None] | None) -> None:
        """A worker of this name that began anew has nothing of what its predecessor had, whose end may come later."""
        before = self._connection_of.get(worker_id)
        self._connection_of[worker_id] = connection
        if before is not None:
            self._broker.unregister(worker_id)
            before.cancel()

    async def _call(self, worker_id: str, method: str, arguments: Sequence[Any]) -> Any:
        broker = self._broker
        if method == "claim":
            lanes, max_rows, timeout = arguments
            jobs = await broker.claim(worker_id, {Lane(lane) for lane in lanes}, max_rows, timeout)
            return [job.to_wire() for job in jobs]
        if method == "heartbeat":
            held, measurements = arguments
            orders = broker.heartbeat(worker_id, [Held(**each) for each in held], measurements)
            return {"lost": sorted(orders.lost), "commands": [vars(command) for command in orders.commands]}
        if method == "complete_all":
            results = ((job_id, attempt, JobResult.from_wire(result)) for job_id, attempt, result in arguments)
            return [broker.complete(worker_id, *result) for result in results]
        job_id, attempt, *rest = arguments
        if method == "complete":
            return broker.complete(worker_id, job_id, attempt, JobResult.from_wire(rest[0]))
        if method == "fail":
            return broker.fail(worker_id, job_id, attempt, ServiceError.from_wire(rest[0]))
        if method == "publish":
            kind, data = rest
            return broker.publish(worker_id, job_id, attempt, kind, data)
        if method == "release":
            return broker.release(worker_id, job_id, attempt)
        raise ValueError(f"unknown method {method!r}")


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

    def claim(self, lanes: Collection[Lane], max_rows: int, timeout: float) -> list[Job]:
        return [Job.from_wire(job) for job in self._call("claim", sorted(lanes), max_rows, timeout)]

    def heartbeat(self, held: Sequence[Held], measurements: Sequence[Mapping[str, Any]] = ()) -> Orders:
        answer = self._call("heartbeat", [vars(job) for job in held], list(measurements))
        commands = tuple(Command(**command) for command in answer["commands"])
        return Orders(lost=frozenset(answer["lost"]), commands=commands)

    def publish(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        self._call("publish", job.id, job.attempt, kind, dict(data))

    def complete(self, job: Job, result: JobResult) -> bool:
        return bool(self._call("complete", job.id, job.attempt, result.to_wire()))

    def complete_all(self, results: Sequence[tuple[Job, JobResult]]) -> list[bool]:
        return list(self._call("complete_all", *([job.id, job.attempt, result.to_wire()] for job, result in results)))

    def fail(self, job: Job, error: ServiceError) -> bool:
        return bool(self._call("fail", job.id, job.attempt, error.to_wire()))

    def release(self, job: Job) -> None:
        self._call("release", job.id, job.attempt)

    def close(self) -> None:
        self._socket.close()
