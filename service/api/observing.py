"""ASGI middleware around the whole app: body size at the door, request ids, request metrics and the log of requests."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.access.caller import NOBODY
from service.api.envelope import render
from service.api.scopes import RouteScopes
from service.errors import BodyTooLarge, ServiceError
from service.jobs import Op
from service.metrics import ServiceMetrics

log = logging.getLogger(__name__)

OPERATIONS = frozenset(map(str, Op))
"""Names of the routes that are counted."""
POLLED = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""Routes that machines ask again and again: people want no lines about them."""
ACCEPTED = 202
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
    """Gives every request an id, counts outcomes, and writes a line about each into the log."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, scopes: RouteScopes) -> None:
        self.app, self._metrics, self._scopes = app, metrics, scopes

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
        logs.begin(request_id)
        start, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        finished = False
        try:
            await self.app(scope, receive, send_with_id)
            finished = True
        finally:
            # The answer to a fault is sent when this is over.
            self._observe(scope, time.monotonic() - start, status or 500, finished=finished)

    def _observe(self, scope: Scope, seconds: float, status: int, *, finished: bool) -> None:
        state = scope["state"]
        route, name = self._route(scope)
        error, op, model = state.get("error"), state.get("op") or name, state.get("model", "")
        outcome = _outcome(error, status) if finished else "error"
        if op in OPERATIONS:
            # Lists and descriptions are no work.
            self._metrics.requests.labels(model=model, op=op, outcome=outcome).inc()
            if outcome == "ok":
                self._metrics.seconds.labels(model=model, op=op).observe(seconds)
        level = logging.DEBUG if route in POLLED else logging.WARNING if status >= 500 else logging.INFO
        if log.isEnabledFor(level):
            caller = state.get("caller", NOBODY).name
            said = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6)}
            said |= {"outcome": outcome, "code": None if error is None else error.code, "caller": caller}
            said |= {"op": op, "model": model} if op in OPERATIONS else {}
            log.log(level, "request", extra={key: value for key, value in said.items() if value not in (None, "")})

    def _route(self, scope: Scope) -> tuple[str, str]:
        """The route's path, without what stands in for its parameters, and its name; empty where there is none."""
        route = scope.get("route") or self._scopes.find(scope["method"], scope["path"])
        return getattr(route, "path", ""), getattr(route, "name", "")


def _outcome(error: ServiceError | None, status: int) -> str:
    if error is not None:
        return error.outcome
    # What a job comes to that is answered later is counted when it ends.
    return "accepted" if status == ACCEPTED else "ok" if status < 400 else "error"
