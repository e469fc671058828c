"""Connections on which nobody asks are closed; those that wait for an answer, or for the next request, are not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from service import connections
from service.connections import MOST_HEAD_BYTES, BoundedHttp
from service.server import _Beside
from tests.service.processes import PATIENCE

pytestmark = pytest.mark.anyio


class Served:
    """A port whose connections can be looked at."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.made: list[BoundedHttp] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        """Of each request that was read to its end."""

    async def answer(self, request: Request) -> PlainTextResponse:
        await self.go_on.wait()
        return PlainTextResponse("done")

    async def read_all(self, request: Request) -> PlainTextResponse:
        """Answer when the body is there."""
        await request.body()
        self.headers.append(list(request.headers.raw))
        return PlainTextResponse("done")

    def protocol(self) -> BoundedHttp:
        app = Starlette(
            routes=[
                Route("/", self.answer, methods=["GET", "POST"]),
                Route("/read", self.read_all, methods=["POST"]),
            ]
        )
        self.made.append(BoundedHttp(uvicorn.Config(app, log_config=None), ServerState(), {}))
        return self.made[-1]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    @property
    def port(self) -> int:
        return int(self.server.sockets[0].getsockname()[1])

    server: asyncio.Server


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    served.server = await asyncio.get_running_loop().create_server(served.protocol, "127.0.0.1", 0)
    yield served
    served.go_on.set()
    served.server.close()
    for connection in served.made:
        connection.transport.close()


async def read(reader: asyncio.StreamReader, end: bytes = b"") -> bytes:
    """What comes until an end, or until the connection is closed."""
    got = b""
    # A connection that is cut while something is still on its way to it may be reset, and its answer lost.
    with anyio.fail_after(PATIENCE), suppress(ConnectionError):
        while not (end and got.endswith(end)) and (part := await reader.read(65536)):
            got += part
    return got


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: a"])
async def test_who_does_not_ask_is_hung_up_on(served: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    reader, writer = await served.connect()
    writer.write(sent)
    await writer.drain()
    while not served.made:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    served.made[0].close_if_late()
    assert not served.made[0].transport.is_closing()
    monkeypatch.setattr(connections, "HEAD_SECONDS", -1)
    served.made[0].close_if_late()
    assert await read(reader) == b""
    writer.close()


async def test_who_waits_is_not(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", -1)
    reader, writer = await served.connect()
    for _ in range(2):
        served.go_on.clear()
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        while not served.made or served.made[0].cycle is None or served.made[0].cycle.response_complete:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        served.made[0].close_if_late()
        served.go_on.set()
        assert (await read(reader, b"done")).startswith(b"HTTP/1.1 200 ")
        # Between two requests it is idle, which is uvicorn's to end.
        served.made[0].close_if_late()
        assert not served.made[0].transport.is_closing()
    writer.close()


async def test_a_large_head_is_refused_however_it_comes(served: Served) -> None:
    served.go_on.set()
    for head, status in (
        (b"GET / HTTP/1.1\r\nX-Large: " + b"a" * (MOST_HEAD_BYTES // 2) + b"\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nX-Large: " + b"a" * (8 * MOST_HEAD_BYTES), b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: a\r\n" * MOST_HEAD_BYTES, b"431"),
        (b"GET /" + b"a" * (8 * MOST_HEAD_BYTES), b"431"),
    ):
        reader, writer = await served.connect()
        writer.write(head)
        answer = await read(reader, b"done")
        assert answer.startswith(b"HTTP/1.1 %s " % status) or (answer == b"" and status == b"431")
        writer.close()


async def test_a_large_head_is_refused_as_its_path_has_it(served: Served) -> None:
    for path, kind in ((b"/v2/models?a=b", str), (b"/v1/models", dict)):
        reader, writer = await served.connect()
        writer.write(b"GET " + path + b" HTTP/1.1\r\nX-Large: ")
        with anyio.fail_after(PATIENCE):
            while not served.made or served.made[-1].url != path:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # It is refused with the last byte and not before: nothing is on its way that would reset the connection.
        writer.write(b"a" * (MOST_HEAD_BYTES + 1))
        head, _, content = (await read(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert isinstance(json.loads(content)["error"], kind)
        writer.close()


CHUNKED = b"POST /read HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"


@pytest.mark.parametrize("at_once", [True, False])
async def test_what_stands_behind_a_body_is_no_header(served: Served, at_once: bool) -> None:
    reader, writer = await served.connect()
    for _ in range(2):
        if at_once:
            writer.write(CHUNKED + b"X-Api-Key: secret\r\n\r\n")
        else:
            before = len(served.headers)
            for byte in CHUNKED + b"X-Api-Key: secret\r\n":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
            assert len(served.headers) == before
            writer.write(b"\r\n")
        assert (await read(reader, b"done")).startswith(b"HTTP/1.1 200 ")
    assert served.headers == [[(b"host", b"a"), (b"transfer-encoding", b"chunked")]] * 2
    writer.close()


@pytest.mark.parametrize(
    "beginning", [CHUNKED, CHUNKED.removesuffix(b"0\r\n") + b"1;", CHUNKED + b"X-Large: "], ids=["many", "of", "large"]
)
async def test_a_flood_behind_a_body_is_hung_up_on(served: Served, beginning: bytes) -> None:
    reader, writer = await served.connect()
    writer.write(beginning)
    line = b"X-Many: a\r\n" if beginning is CHUNKED else b"a" * 1000
    with anyio.fail_after(PATIENCE), suppress(ConnectionError):
        while not reader.at_eof():
            writer.write(line)
            await writer.drain()
            await asyncio.sleep(0)
    assert await read(reader) == b""
    assert served.headers == []
    assert len(served.made[0].scope["headers"]) == 2
    writer.close()


async def test_a_large_body_is_read_on(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(CHUNKED.removesuffix(b"0\r\n"))
    for _ in range(MOST_HEAD_BYTES // 100):
        writer.write(b"64;a=b\r\n" + b"a" * 100 + b"\r\n")
    writer.write(b"0\r\n\r\n")
    assert (await read(reader, b"done")).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize(
    ("request_", "more"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n", b"a"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3", b"\r\n"),
    ],
)
async def test_more_behind_an_answer_keeps_nothing_open(
    served: Served, monkeypatch: pytest.MonkeyPatch, request_: bytes, more: bytes
) -> None:
    served.go_on.set()
    reader, writer = await served.connect()
    writer.write(request_)
    assert (await read(reader, b"done")).startswith(b"HTTP/1.1 200 ")
    [connection] = served.made
    assert connection.timeout_keep_alive_task is not None
    writer.write(more)
    with anyio.fail_after(PATIENCE):
        while connection.timeout_keep_alive_task is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    connection.close_if_late()
    assert not connection.transport.is_closing()
    monkeypatch.setattr(connections, "HEAD_SECONDS", -1)
    connection.close_if_late()
    assert await read(reader) == b""
    writer.close()


async def test_the_port_of_metrics_hangs_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", -1)
    app = Starlette()
    config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_config=None, http=BoundedHttp)
    server = _Beside(config)
    task = asyncio.create_task(server.serve())
    with anyio.fail_after(PATIENCE):
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await read(reader) == b""
    writer.close()
    server.should_exit = True
    await task


async def test_what_is_no_http_is_refused_in_the_envelope(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"\x16\x03\x01 TLS, perhaps\r\n\r\n")
    head, _, content = (await read(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nx-request-id: " in head
    assert b"\r\nx-content-type-options: nosniff" in head
    assert json.loads(content)["error"]["code"] == "malformed_request"
    writer.close()
