"""Where the client touches the network, and the clock: once with waiting, once with blocking.

Everything else is written once, as coroutines over this. With a blocking connection none of them ever waits, so that
:func:`run` drives them without an event loop.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import anyio
import httpx

T = TypeVar("T")
LAST_WORDS_SECONDS = 5.0
"""What may still be sent when a task is canceled."""


class Connection(Protocol):
    """What the client needs of httpx; every method raises its errors."""

    @property
    def timeout(self) -> httpx.Timeout:
        """The usual timeouts."""

    def build(self, method: str, url: str, **parts: Any) -> httpx.Request:
        """A request as data."""

    async def open(self, request: httpx.Request) -> httpx.Response:
        """Send it; returns when the head of the answer is there."""

    async def read(self, response: httpx.Response) -> None:
        """Read the body, and release the connection."""

    def lines(self, response: httpx.Response) -> AsyncGenerator[str, None]:
        """The body's lines as they come."""

    async def close(self, response: httpx.Response) -> None:
        """Leave an answer, read or not."""

    async def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""

    def last_words(self) -> AbstractContextManager[object]:
        """What is done within is done though the task is being canceled."""

    async def end(self) -> None:
        """Close all connections."""


class _Building:
    """What both clients of httpx do alike."""

    def __init__(self, http: httpx.AsyncClient | httpx.Client) -> None:
        self._requests = http

    @property
    def timeout(self) -> httpx.Timeout:
        return self._requests.timeout

    def build(self, method: str, url: str, **parts: Any) -> httpx.Request:
        return self._requests.build_request(method, url, **parts)


class AsyncConnection(_Building):
    """Over ``httpx.AsyncClient``."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        super().__init__(http)
        self._http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return await self._http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    async def lines(self, response: httpx.Response) -> AsyncGenerator[str, None]:
        async for line in response.aiter_lines():
            yield line

    async def close(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    def last_words(self) -> AbstractContextManager[object]:
        return anyio.move_on_after(LAST_WORDS_SECONDS, shield=True)

    async def end(self) -> None:
        await self._http.aclose()


class BlockingConnection(_Building):
    """Over ``httpx.Client``; none of its coroutines ever waits."""

    def __init__(self, http: httpx.Client) -> None:
        super().__init__(http)
        self._http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return self._http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def lines(self, response: httpx.Response) -> AsyncGenerator[str, None]:
        for line in response.iter_lines():
            yield line

    async def close(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - there is no event loop

    def last_words(self) -> AbstractContextManager[object]:
        return nullcontext()

    async def end(self) -> None:
        self._http.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine over a :class:`BlockingConnection`."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("a coroutine over a blocking connection waits for nothing")


def run_each(generator: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """What an asynchronous generator over a :class:`BlockingConnection` yields; closed with it."""
    try:
        while True:
            try:
                value = run(generator.__anext__())
            except StopAsyncIteration:
                return
            yield value
    finally:
        run(generator.aclose())
