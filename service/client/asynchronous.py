"""``AsyncClient``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, Self, TypeVar, Unpack

import httpx

from service.client import calls
from service.client.caller import Caller, Changes, Options
from service.client.calls import Call
from service.client.connection import AsyncConnection
from service.client.events import Event
from service.client.jobs import AsyncJob, AsyncJobs
from service.client.resources import AsyncCalibrations, AsyncModels

P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""The service's own limit for a request is 600 seconds, too."""


class AsyncOperation(Generic[P, T]):
    """An operation of one client: answered at once, later, or as a stream."""

    def __init__(self, build: Callable[P, Call[T]], caller: Caller) -> None:
        self._build, self._caller = build, caller
        update_wrapper(self, build)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer."""
        return await self._caller.answer(self._build(*args, **kwargs))

    async def submit(self, *args: P.args, **kwargs: P.kwargs) -> AsyncJob[T]:
        """A job that is worked on whatever becomes of this program."""
        return AsyncJob(self._caller, await self._caller.document(self._build(*args, **kwargs)))

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Event[T], None]:
        """All that happens until the answer is there; leaving it early cancels the work."""
        return self._caller.stream(self._build(*args, **kwargs))


class _Of(Generic[P, T]):
    """Declares an operation."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build

    def __get__(self, client: AsyncClient, kind: type[AsyncClient]) -> AsyncOperation[P, T]:
        return AsyncOperation(self._build, client._caller)


class AsyncClient:
    """A client of the service for programs with an event loop.

    Every operation is a method, ``await client.sample(…)``, and has two more: ``client.sample.submit(…)`` for a job,
    ``client.sample.stream(…)`` for its events. Close it, or use ``async with``.
    """

    sample = _Of(calls.sample)
    decode = _Of(calls.decode)
    denoise = _Of(calls.denoise)
    score = _Of(calls.score)
    encode = _Of(calls.encode)
    classify = _Of(calls.classify)

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float | None = TIMEOUT,
        request_timeout: float | None = None,
        max_retries: int = 4,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        """``timeout`` is that of httpx, for each attempt; ``request_timeout`` are the seconds after which the service
        gives a request up. ``http`` is a client of httpx with proxies or certificates of your own, which brings its
        own timeouts.

        Raises ``ValueError`` for what is no URL.
        """
        options = checked(url, api_key=api_key, request_timeout=request_timeout, max_retries=max_retries)
        connection = AsyncConnection(httpx.AsyncClient(timeout=timeout) if http is None else http)
        self._bind(Caller(connection, options))

    def _bind(self, caller: Caller) -> None:
        self._caller = caller
        self.jobs, self.models = AsyncJobs(caller), AsyncModels(caller)
        self.calibrations = AsyncCalibrations(caller)

    def with_options(self, **changes: Unpack[Changes]) -> Self:
        """This client with another ``api_key``, ``request_timeout``, ``max_retries``, or with an ``idempotency_key``,
        which is for one request and its repetitions. It has the same connections."""
        other = object.__new__(type(self))
        other._bind(self._caller.using(**changes))
        return other

    async def aclose(self) -> None:
        """Leave the streams that are open, and close all connections."""
        await self._caller.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def checked(url: str, **options: Any) -> Options:
    """The options of a client; raises ``ValueError`` naming one that is wrong."""
    try:
        parsed = httpx.URL(url) if url.startswith(("http://", "https://")) else None
    except httpx.InvalidURL:
        parsed = None
    if parsed is None or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"url: got {url!r}, allowed is that of a service: http://127.0.0.1:8000")
    return Options(url=url.rstrip("/"), **options)
