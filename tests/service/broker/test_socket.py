"""The socket between the broker and its workers: what breaks it, breaks only one connection."""

from __future__ import annotations

import asyncio
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.broker.base import BrokerGone
from service.broker.memory import MemoryBroker
from service.broker.socket import BrokerServer, SocketWorkerBroker
from service.jobs import Lane, WorkerInfo
from service.messages import frame, pack
from tests.service.broker.conftest import AMPLE, job, model, result

pytestmark = pytest.mark.anyio
INFO = WorkerInfo(id="w1", device="cpu", models=(model("m"),))


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(AMPLE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


@pytest.fixture
async def server(broker: MemoryBroker, path: Path) -> AsyncIterator[BrokerServer]:
    server = BrokerServer(broker, path)
    await server.start()
    yield server
    await server.stop()


async def registered(path: Path) -> SocketWorkerBroker:
    worker = await asyncio.to_thread(SocketWorkerBroker, path)
    await asyncio.to_thread(worker.register, INFO)
    return worker


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 2**31),
        struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack(">I", 0),
        struct.pack(">I", 100) + b"short",
        frame("no pair"),
        frame(["register", []]),
        frame(["register", [{"id": "x"}]]),
        frame(["register", ["text"]]),
        frame(["register", [INFO.to_wire()]]) + frame(["unknown", ["a", 1]]),
        frame(["register", [INFO.to_wire()]]) + frame(["claim", ["nonsense"]]),
        frame(["register", [INFO.to_wire()]]) + frame(["claim", [["nonsense"], 1, 0]]),
        frame(["register", [INFO.to_wire()]]) + frame(["heartbeat", ["text", []]]),
        frame(["register", [INFO.to_wire()]]) + frame(["heartbeat", [[{"other": 1}], []]]),
        frame(["register", [INFO.to_wire()]]) + frame(["publish", ["a", 1, "preview", "text"]]),
        frame(["register", [INFO.to_wire()]]) + frame(["complete", ["a", 1]]),
        frame(["register", [INFO.to_wire()]]) + frame(["complete", ["a", 1, {"other": 1}]]),
        frame(["register", [INFO.to_wire()]]) + frame(["fail", ["a", 1, None]]),
    ],
)
@pytest.mark.usefixtures("server")
async def test_nonsense_cuts_one_connection(
    broker: MemoryBroker, path: Path, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(sent)
    writer.write_eof()
    await asyncio.wait_for(reader.read(), 30)
    writer.close()
    assert "Unhandled" not in caplog.text
    assert await broker.workers() == []
    # The next worker finds everything as it should be.
    worker = await registered(path)
    await broker.submit(job("a"))
    [got] = await asyncio.to_thread(worker.claim, {Lane.LONG}, 1, 5)
    assert await asyncio.to_thread(worker.complete, got, result())
    await broker.wait("a", 5)
    worker.close()


@pytest.mark.usefixtures("server")
async def test_another_version_is_cut_off(broker: MemoryBroker, path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    packed = pack(["register", [INFO.to_wire()]])
    assert packed[1] == 1
    changed = packed[:1] + b"\x02" + packed[2:]
    writer.write(struct.pack(">I", len(changed)) + changed)
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    assert await broker.workers() == []


@pytest.mark.usefixtures("server")
async def test_nothing_goes_before_registering(path: Path) -> None:
    worker = await asyncio.to_thread(SocketWorkerBroker, path)
    with pytest.raises(RuntimeError, match="claim before register"):
        await asyncio.to_thread(worker.claim, {Lane.URGENT}, 1, 0)
    worker.close()


@pytest.mark.usefixtures("server")
async def test_only_this_user_can_open_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # noqa: ASYNC240


@pytest.mark.usefixtures("server")
async def test_a_large_message_passes(broker: MemoryBroker, path: Path) -> None:
    worker = await registered(path)
    await broker.submit(job("a", rows=500_000))
    [got] = await asyncio.to_thread(worker.claim, {Lane.LONG}, 1, 0)
    assert got.payload["array"].shape == (500_000,)
    assert got.payload["array"][-1] == 499_999
    worker.close()


async def test_a_worker_notices_that_the_broker_is_gone(server: BrokerServer, path: Path) -> None:
    worker = await registered(path)
    claim = asyncio.create_task(asyncio.to_thread(worker.claim, {Lane.URGENT}, 1, 60))
    await asyncio.sleep(0.05)
    await server.stop()
    with pytest.raises(BrokerGone):
        await asyncio.wait_for(claim, 30)
    worker.close()
    assert not path.exists()  # noqa: ASYNC240


def test_without_a_broker_there_is_no_worker(path: Path) -> None:
    with pytest.raises(BrokerGone, match="no broker listens"):
        SocketWorkerBroker(path)


@pytest.mark.usefixtures("server")
async def test_a_worker_that_died_while_it_waited_costs_no_attempt(broker: MemoryBroker, path: Path) -> None:
    waiting, writer = await asyncio.open_unix_connection(str(path))
    writer.write(frame(["register", [INFO.to_wire()]]) + frame(["claim", [sorted(Lane), 1, 60.0]]))
    await waiting.read(1)
    writer.close()
    await asyncio.sleep(0.1)
    await broker.submit(job("a"))
    while await broker.workers():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    status = await broker.status("a")
    assert (status.state, status.attempt) == ("queued", 1)


@pytest.mark.usefixtures("server")
async def test_the_end_of_an_old_connection_leaves_the_new_one_alone(broker: MemoryBroker, path: Path) -> None:
    old = await registered(path)
    await broker.submit(job("a"))
    [lost] = await asyncio.to_thread(old.claim, set(Lane), 1, 0)
    new = await registered(path)
    assert (await broker.status("a")).attempt == lost.attempt + 1
    with pytest.raises(BrokerGone):
        await asyncio.to_thread(old.complete, lost, result())
    old.close()
    await asyncio.sleep(0.1)
    assert [status.info.id for status in await broker.workers()] == ["w1"]
    [got] = await asyncio.to_thread(new.claim, set(Lane), 1, 0)
    assert await asyncio.to_thread(new.complete, got, result())
    new.close()
