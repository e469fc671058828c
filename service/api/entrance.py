"""ASGI middleware that every request comes in through: who asks, whether they may, and until when.

What is not configured costs nothing: without keys only the headers that browsers send are looked at.
"""

from __future__ import annotations

import asyncio
import re
from functools import lru_cache
from ipaddress import ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.caller import ANYONE, NOBODY, Caller
from service.access.gate import Gate
from service.api.envelope import render
from service.api.inference_protocol.compression import unpacks
from service.api.scopes import RouteScopes
from service.errors import (
    FAULT,
    Forbidden,
    InternalError,
    InvalidRequest,
    MalformedRequest,
    ServiceError,
    SlowBody,
    TooManyHeaders,
)
from service.metrics import ServiceMetrics
from service.settings import Settings

MOST_HEADERS = 100
TIMEOUT_HEADER = "X-Request-Timeout"
_SECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_NOBODYS_NAME = re.compile(r"([^.]*|.+\.(localhost|internal))\.?", re.ASCII)
"""Hosts whose name nobody can register: without a dot, and two endings that are reserved."""


class Entrance:
    """Sets ``request.state.caller`` and ``.deadline`` (of the event loop's clock), or refuses.

    Without a gate everybody is let in but the web pages of strangers: a browser on this host would carry their
    requests to a service that listens to nobody else.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        scopes: RouteScopes,
        metrics: ServiceMetrics,
        gate: Gate | None = None,
        checks_host: bool = False,
    ) -> None:
        """``checks_host``: whether the host that is asked for must be a name that nobody can register."""
        self.app, self._gate, self._scopes, self._metrics = app, gate, scopes, metrics
        self._most_seconds, self._origins, self._checks_host = settings.request_timeout, settings.origins, checks_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through, or refuse it."""
        if scope["type"] == "websocket":
            # There are none, and none that is forgotten here gets in.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer: dict[str, str] = {}
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if answer:
                    more = [(name.encode(), value.encode()) for name, value in answer.items()]
                    message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        try:
            has_body = await self._admit(scope, answer)
            if has_body:
                await self._within_time(scope, receive, watched_send, answer)
            else:
                await self.app(scope, receive, watched_send)
        except ServiceError as error:
            if started:
                raise
            self._metrics.refused.labels(code=error.code).inc()
            await _refuse(error, scope, receive, watched_send)
        except Exception:
            # Here, where the answer still gets all headers of a usual one; it is raised on, so that it is logged.
            if not started:
                await _refuse(InternalError(FAULT), scope, receive, watched_send)
            raise

    async def _admit(self, scope: Scope, answer: dict[str, str]) -> bool:
        """Let one request in, or raise why not; returns whether it has a body."""
        if len(scope["headers"]) > MOST_HEADERS:
            raise TooManyHeaders(f"the request has {len(scope['headers'])} headers, allowed are {MOST_HEADERS}")
        headers: dict[bytes, bytes] = dict(scope["headers"])
        state = scope.setdefault("state", {})
        state["caller"] = await self._caller(scope, headers, answer)
        seconds = self._most_seconds
        if (sent := headers.get(b"x-request-timeout")) is not None:
            seconds = self._seconds(sent)
        state["deadline"] = asyncio.get_running_loop().time() + seconds
        packed = headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b"")
        if packed and not unpacks(scope["path"]):
            raise MalformedRequest(
                f"Content-Encoding: got {headers[b'content-encoding'][:100].decode('latin-1')!r}; bodies are read as "
                "they are, send it without",
                code="unsupported_content_encoding",
                param="Content-Encoding",
            )
        return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

    async def _caller(self, scope: Scope, headers: dict[bytes, bytes], answer: dict[str, str]) -> Caller:
        if self._gate is None:
            self._check_browser(scope["method"], headers)
            return ANYONE
        needed = self._scopes.needed(scope["method"], scope["path"])
        if needed is None:
            return NOBODY
        authorization, key = headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        return await self._gate.admit(authorization.decode("latin-1"), key.decode("latin-1"), needed, answer)

    def _seconds(self, sent: bytes) -> float:
        seconds = float(sent) if _SECONDS.fullmatch(sent) else 0.0
        if not 0 < seconds <= self._most_seconds:
            raise InvalidRequest(
                f"{TIMEOUT_HEADER}: got {sent[:100].decode('latin-1')!r}, allowed are seconds as a decimal number "
                f"above 0, up to {self._most_seconds:g}",
                param=TIMEOUT_HEADER,
            )
        return seconds

    def _check_browser(self, method: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._checks_host and not _is_nobodys(host):
            # A page whose name was made to lead here would be taken for one of this service's own.
            raise Forbidden(
                f"Host: got {host[:100]!r}; without keys this service answers to addresses and to localhost only: "
                "configure keys, or say --anonymous true if a proxy that you trust sends other names",
                code="untrusted_host",
            )
        if method in _SAFE or b"origin" not in headers:
            return
        origin = headers[b"origin"].decode("latin-1").lower()
        site = headers.get(b"sec-fetch-site")
        own = site in (b"same-origin", b"none") if site is not None else origin.partition("://")[2] == host
        if not (own or origin in self._origins or "*" in self._origins):
            raise Forbidden(
                f"Origin: got {origin[:100]!r}; without keys, web pages of others may call this service only if their "
                "origin is in the setting 'cors'",
                code="cross_site",
            )

    async def _within_time(self, scope: Scope, receive: Receive, send: Send, answer: dict[str, str]) -> None:
        """Pass a request through whose body must be there before its deadline."""
        deadline, complete = scope["state"]["deadline"], False

        async def timely_receive() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            timer.reschedule(deadline)
            message = await receive()
            timer.reschedule(None)
            complete = not message.get("more_body", False)
            return message

        try:
            async with asyncio.timeout(None) as timer:
                await self.app(scope, timely_receive, send)
        except TimeoutError:
            if not timer.expired():
                raise
            # What still comes of the body is not waited for.
            answer["connection"] = "close"
            raise SlowBody(
                f"the body was not there when the time for the request ({TIMEOUT_HEADER}, or the service's own limit "
                f"of {self._most_seconds:g} seconds) was over"
            ) from None


async def _refuse(error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["error"] = error
    await render(error)(scope, receive, send)


@lru_cache(maxsize=256)
def _is_nobodys(host: str) -> bool:
    """Whether the value of Host is an address or a name that nobody can register; a missing one is no browser's."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return _NOBODYS_NAME.fullmatch(name) is not None or bool(ip_address(name))
    except ValueError:
        return False
