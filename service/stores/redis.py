"""Calibrations in Redis, for any number of API processes: without expiry, and every move a Lua script.

The images of what is in the making wait in Redis, too, so that any process can make it: 16 MB for 20,000 of 28x28 in
grey, 61 MB for 32x32 in colour, until it is made, has failed by their fault or is deleted. Who makes a run renews its
claim; when nothing is heard of it for the time of a lease, another process takes the run.
"""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, NoScriptError  # noqa: A004
from redis.retry import Retry

from service.broker.base import RETRY_AFTER_SECONDS
from service.broker.redis.connecting import OPTIONS, SOCKET_SECONDS, service_errors
from service.broker.redis.keys import Keys, milliseconds
from service.broker.redis.scripts import composed
from service.calibrations import CalibrationFiles
from service.errors import InternalError, ServiceError, Unavailable
from service.pending import Claim, Pending, PendingStore, Run, check_images, pending_of, taken, too_many
from service.state import State

log = logging.getLogger(__name__)

CONNECTIONS = 16
"""Of one process; each has one command on its way."""
CHUNK_BYTES = 2**20
"""Of images: no command or answer is larger, so others need not wait for one."""
ARRIVING_SECONDS = 600.0
"""How long images stay that were written and are not placed: their process died."""
SHAPE = "shape"
"""Field beside the chunks."""


class Connection:
    """Connections of one process to one Redis, used from threads; nothing connects before the first call.

    Every method raises ``Unavailable`` where Redis is away or full.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.base = Keys(prefix).base
        # A connection that a restart of Redis has cut is noticed when it is used: once more, on a new one. Every
        # operation may be sent twice.
        once_more = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
        # Any: replies are typed as what every protocol may give.
        self._redis: Any = redis.Redis(
            connection_pool=redis.BlockingConnectionPool.from_url(
                url, max_connections=CONNECTIONS, timeout=SOCKET_SECONDS, retry=once_more, **OPTIONS
            )
        )

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()
        self._redis.connection_pool.disconnect()

    def key(self, *parts: str) -> str:
        """A key under the prefix."""
        return ":".join((self.base, *parts))

    def run(self, name: str, *arguments: str | bytes | int) -> Any:
        """The answer of a script."""
        operation = composed("service.stores", "common", name)
        with service_errors():
            try:
                return self._redis.execute_command("EVALSHA", operation.sha, 1, self.base, *arguments)
            except NoScriptError:
                return self._redis.execute_command("EVAL", operation.source, 1, self.base, *arguments)

    def call(self, *command: str | bytes | int) -> Any:
        """The answer of a command."""
        with service_errors():
            return self._redis.execute_command(*command)

    def calls(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Any]:
        """The answers of commands, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        with service_errors():
            return list(pipeline.execute())


class RedisCalibrations(CalibrationFiles):
    """Finished calibrations."""

    trust_seconds = 1.0

    def __init__(self, connection: Connection) -> None:
        self._redis = connection

    def versions(self, keys: Sequence[tuple[str, str]]) -> list[str | None]:
        if not keys:
            return []
        found = self._redis.calls([("HGET", self._key(*key), "version") for key in keys])
        return [None if version is None else version.decode() for version in found]

    def read(self, model: str, name: str) -> tuple[str, bytes] | None:
        version, data = self._redis.call("HMGET", self._key(model, name), "version", "data")
        return None if version is None or data is None else (version.decode(), data)

    def write(self, model: str, name: str, data: bytes) -> None:
        self._redis.run("write", model, name, uuid.uuid4().hex, data)

    def delete(self, model: str, name: str) -> bool:
        return bool(self._redis.run("delete", model, name))

    def names(self, model: str) -> set[str]:
        return {name.decode() for name in self._redis.call("SMEMBERS", self._redis.key("calibrations", model))}

    def _key(self, model: str, name: str) -> str:
        return self._redis.key("calibration", model, name)


class RedisPending(PendingStore):
    """Runs that any process of the service may make; each makes one at a time."""

    def __init__(self, connection: Connection, lease_seconds: float) -> None:
        self._redis, self._lease = connection, milliseconds(lease_seconds)
        self._owner = uuid.uuid4().hex

    def open(self) -> None:
        self._redis.run("open")

    # Accepting.

    def check(self, model: str, name: str, *, replace: bool, most: int) -> None:
        self._place(model, name, "", "", replace, most)

    def write(self, pending: Pending, pixels: NDArray[np.uint8]) -> None:
        key, data = self._images(pending), np.ascontiguousarray(pixels).reshape(-1)
        # With every command its end: this process may die after any.
        expiry = ("PEXPIRE", key, milliseconds(ARRIVING_SECONDS))
        try:
            self._redis.calls([("HSET", key, SHAPE, json.dumps(pixels.shape)), expiry])
            for index, start in enumerate(range(0, len(data), CHUNK_BYTES)):
                chunk = data[start : start + CHUNK_BYTES].tobytes()
                self._redis.calls([("HSET", key, index, chunk), expiry])
        except Unavailable:
            self._drop(pending)
            raise

    def place(self, pending: Pending, *, replace: bool, most: int) -> None:
        try:
            self._place(pending.model, pending.name, pending.id, json.dumps(asdict(pending)), replace, most)
        except ServiceError as error:
            # Where no answer came it may have been placed; else the images expire.
            if error.code != "broker_unreachable":
                self._drop(pending)
            raise

    def _place(self, model: str, name: str, upload: str, job: str, replace: bool, most: int) -> None:
        answer = self._redis.run("place", model, name, upload, job, int(replace), most)
        if answer[0] == b"taken":
            raise taken(model, name, running=bool(answer[1]))
        if answer[0] == b"too_many":
            raise too_many(model, int(answer[1]), most)
        if answer[0] == b"lost":
            raise Unavailable(
                "the queue lost the images; send them again", code="broker_unreachable", retry_after=RETRY_AFTER_SECONDS
            )

    def _drop(self, pending: Pending) -> None:
        with suppress(Unavailable):
            self._redis.call("UNLINK", self._images(pending))

    # Asking.

    def find(self, model: str, name: str) -> Run | None:
        return self._found(model, name, self._redis.call(*self._fields(model, name)))

    def runs(self, model: str) -> list[Run]:
        members = (member.decode().split(":", 1) for member in self._redis.call("ZRANGE", self._runs, 0, -1))
        names = sorted(name for of, name in members if of == model)
        answers = self._redis.calls([self._fields(model, name) for name in names]) if names else []
        found = (self._found(model, name, answer) for name, answer in zip(names, answers, strict=True))
        return [run for run in found if run is not None]

    @property
    def _runs(self) -> str:
        return self._redis.key("calibrating")

    def _fields(self, model: str, name: str) -> tuple[str, ...]:
        return ("HMGET", self._redis.key("calibrating", model, name), "job", "done", "error")

    @staticmethod
    def _found(model: str, name: str, answer: Sequence[bytes | None]) -> Run | None:
        job, done, error = answer
        if job is None:
            return None
        pending = _pending(model, name, job)
        if error is not None:
            code, message = json.loads(error)
            pending = replace(pending, error=(code, message))
        return Run(pending, int(done or 0))

    # Making.

    def claim(self, models: Collection[str]) -> Claim | None:
        answer = self._redis.run("claim", self._owner, self._lease, *models)
        if not answer:
            return None
        model, name, upload, job, crashes = answer
        pending = replace(_pending(model.decode(), name.decode(), job), id=upload.decode())
        claim = Claim(pending, int(crashes), self._owner)
        if pending.error is not None:
            self.interrupt(claim, InternalError(pending.error[1], code=pending.error[0]))
            return None
        return claim

    def renew(self, claim: Claim, done: int) -> bool:
        return bool(self._redis.run("renew", *self._of(claim), self._lease, done))

    def images(self, claim: Claim) -> NDArray[np.uint8]:
        key = self._images(claim.pending)
        shape = self._redis.call("HGET", key, SHAPE)
        if shape is None:
            raise ValueError("the images are gone")
        pixels = np.empty(tuple(json.loads(shape)), np.uint8)
        data = pixels.reshape(-1)
        for index, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            chunk = self._redis.call("HGET", key, index)
            part = data[start : start + CHUNK_BYTES]
            if chunk is None or len(chunk) != len(part):
                raise ValueError(f"chunk {index} of the images is gone")
            part[:] = np.frombuffer(chunk, np.uint8)
        check_images(pixels, claim.pending)
        return pixels

    def finish(self, claim: Claim, data: bytes) -> bool:
        return bool(self._redis.run("finish", *self._of(claim), claim.pending.id, data))

    def fail(self, claim: Claim, error: ServiceError) -> None:
        self._leave(claim, "fail", error)

    def interrupt(self, claim: Claim, error: ServiceError) -> None:
        self._leave(claim, "interrupt", error)

    def release(self, claim: Claim) -> None:
        self._leave(claim, "release", None)

    def _leave(self, claim: Claim, how: str, error: ServiceError | None) -> None:
        told = "" if error is None else json.dumps([error.code, error.message])
        self._redis.run("leave", *self._of(claim), how, told)

    def remove(self, model: str, name: str) -> bool:
        return bool(self._redis.run("remove", model, name))

    def _of(self, claim: Claim) -> tuple[str, str, str, str]:
        return claim.pending.model, claim.pending.name, claim.pending.id, claim.token

    def _images(self, pending: Pending) -> str:
        return self._redis.key("calibrating-images", pending.id)


def state_in(connection: Connection, lease_seconds: float) -> State:
    """The state of any number of processes; uploads that are being read are in the system's temporary directory."""
    return State(RedisCalibrations(connection), RedisPending(connection, lease_seconds), Path(tempfile.gettempdir()))


def _pending(model: str, name: str, job: bytes) -> Pending:
    try:
        return pending_of(json.loads(job))
    except (ValueError, TypeError, KeyError) as error:
        log.error("calibration %s of %s cannot be read, its process may have another version: %s", name, model, error)
        damaged = ("damaged", "another version of the service has accepted it; send the images again")
        return Pending(model=model, name=name, seed=0, num_images=0, created=0, error=damaged)
