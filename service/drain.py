"""Leaving in order: new work is refused, what runs is finished, and what cannot be gets an answer, too.

It is about requests, so it does not matter which broker is behind them. Requests that only read go on to the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.envelope import render
from service.ending import ended
from service.errors import Unavailable

RETRY_AFTER_SECONDS = 2.0


def _refusal() -> Unavailable:
    return Unavailable("the service is shutting down", code="draining", retry_after=RETRY_AFTER_SECONDS)


class Drain:
    """Whether this process leaves, and the requests that it still works on."""

    def __init__(self, idle: Callable[[], bool] = lambda: True) -> None:
        """``idle`` says whether there is no work left but that of requests, such as jobs that nobody waits for."""
        self.draining = False
        """Whether new work is refused."""
        self.abandoned = asyncio.Event()
        """Set when no more time is left: what only reads, and would go on for long, ends by itself."""
        self._idle = idle
        self._running: set[asyncio.Task[None]] = set()
        self._abandoning: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Refuse new work from now on."""
        self.draining = True

    @property
    def idle(self) -> bool:
        """Whether no work is left."""
        return not self._running and self._idle()

    def abandon(self) -> None:
        """Answer the requests that are left with a refusal; their jobs are canceled."""
        self.abandoned.set()
        if self._running:
            self._abandoning = asyncio.ensure_future(ended(*self._running))

    async def run(self, work: asyncio.Task[None]) -> bool:
        """Wait for a request's work; ``False`` when it was abandoned."""
        self._running.add(work)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            self._running.discard(work)
        if work.cancelled():
            return False
        work.result()
        return True


class Draining:
    """ASGI middleware of a :class:`Drain`: every POST is work."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.drain.draining:
            await self._refuse(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        # A task of its own, so that its end by :meth:`Drain.abandon` is not the connection's.
        work = asyncio.ensure_future(self.app(scope, receive, watched_send))
        if not await self.drain.run(work) and not started:
            await self._refuse(scope, receive, send)

    @staticmethod
    async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
        error = _refusal()
        scope.setdefault("state", {})["error"] = error
        await render(error)(scope, receive, send)
