"""ASGI middleware around the whole app: body size at the door, request ids, request metrics."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.envelope import OUTCOME, render
from service.errors import BodyTooLarge
from service.jobs import Op
from service.metrics import ServiceMetrics

OPERATIONS = frozenset(map(str, Op))
"""Names of the routes that are counted."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True)
class BodyLimits:
    """Most bytes of a request's body."""

    usual: int
    others: Mapping[str, int] = field(default_factory=dict)
    """By path."""

    def of(self, scope: Scope) -> int:
        """The limit of one request."""
        return self.others.get(scope["path"], self.usual)


class BodyLimit:
    """Refuses bodies that announce too many bytes, and ends the reading of those that grow too large all the same."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.of(scope)
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if length.isdigit() and int(length[:20]) > limit:
            shown = length.decode()
            error = BodyTooLarge(f"the request has {shown} bytes, allowed are {limit}; send fewer or smaller images")
            scope.setdefault("state", {})["error"] = error
            await render(error)(scope, receive, send)
            return
        await RequestBodyLimitMiddleware(self.app, limit)(scope, receive, send)


class Observing:
    """Gives every request an id, and counts outcomes."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        # The answer to a fault is sent from outside of this middleware; it finds the id here.
        scope.setdefault("state", {})["request_id"] = request_id
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        finished = False
        try:
            await self.app(scope, receive, send_with_id)
            finished = True
        finally:
            self._count(scope, time.monotonic() - start, finished=finished)

    def _count(self, scope: Scope, seconds: float, *, finished: bool) -> None:
        """Count requests of the model's operations: those below /v1 that are not lists or descriptions."""
        state = scope.get("state", {})
        # A route whose operation depends on the request says which it was.
        route = state.get("op") or getattr(scope.get("route"), "name", "")
        if route not in OPERATIONS:
            return
        error, model = state.get("error"), state.get("model", "")
        outcome = "error" if not finished else "ok" if error is None else OUTCOME.get(type(error), "error")
        self.metrics.requests.labels(model=model, op=route, outcome=outcome).inc()
        if outcome == "ok":
            self.metrics.seconds.labels(model=model, op=route).observe(seconds)
