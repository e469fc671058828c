"""Errors as HTTP answers: the one place that knows status codes, and how clients of each prefix expect errors.

An answer chooses its envelope by the path that was called when it is sent, whoever sends it: an endpoint, the
framework, or a middleware outside of both.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from service import errors
from service.errors import ServiceError

log = logging.getLogger(__name__)

STATUS: dict[type[ServiceError], int] = {
    errors.InvalidRequest: 422,
    errors.MalformedRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.MethodNotAllowed: 405,
    errors.NotAcceptable: 406,
    errors.SlowBody: 408,
    errors.BodyTooLarge: 413,
    errors.TooManyHeaders: 431,
    errors.Overloaded: 429,
    errors.Canceled: 499,
    errors.InternalError: 500,
    errors.Unavailable: 503,
    errors.WorkerLost: 503,
    errors.TimedOut: 504,
}
IN_VAIN = (errors.Conflict, errors.TimedOut, errors.WorkerLost)
"""Errors after which a repetition would come to the same, at the same cost: clients that repeat whatever is a 409 or
5xx are told so by a header that OpenAI's know."""
_BY_STATUS: dict[int, type[ServiceError]] = {
    400: errors.MalformedRequest,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    406: errors.NotAcceptable,
    413: errors.BodyTooLarge,
    415: errors.MalformedRequest,
    422: errors.InvalidRequest,
    503: errors.Unavailable,
}


_UNION_MEMBERS = ("str", "int", "float", "compact", "nested", "nullable")


def _shown(value: Any) -> str:
    """A value as it was sent, cut short; a long list is never written out whole."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return brief.repr(value)


def body(error: ServiceError) -> dict[str, Any]:
    """The native envelope, which is also that of OpenAI."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def text_body(error: ServiceError) -> dict[str, Any]:
    """The envelope of the Open Inference Protocol."""
    return {"error": error.message}


@dataclass(frozen=True)
class Envelope:
    """How errors look under a prefix of paths."""

    body: Callable[[ServiceError], dict[str, Any]] = body
    status: Mapping[type[ServiceError], int] = field(default_factory=dict)
    """Where it is another than :data:`STATUS`."""


NATIVE = Envelope()
BAD_REQUEST: dict[type[ServiceError], int] = {errors.InvalidRequest: 400}
"""For clients that know no 422."""
ENVELOPES = {
    "/v1/images": Envelope(status=BAD_REQUEST),
    "/v2": Envelope(text_body, BAD_REQUEST),
}
"""By prefix; other paths have the native one."""


def envelope_of(path: str) -> Envelope:
    """The envelope of a path."""
    return next(
        (envelope for prefix, envelope in ENVELOPES.items() if path == prefix or path.startswith(f"{prefix}/")), NATIVE
    )


class ErrorAnswer(Response):
    """An error as a response, in the envelope of the path that it answers."""

    media_type = "application/json"

    def __init__(self, error: ServiceError) -> None:
        headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
        headers |= {"x-should-retry": "false"} if isinstance(error, IN_VAIN) and error.retry_after is None else {}
        super().__init__(status_code=STATUS[type(error)], headers=headers)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        envelope = envelope_of(scope["path"])
        self.status_code = envelope.status.get(type(self.error), self.status_code)
        text = json.dumps(envelope.body(self.error), ensure_ascii=False, separators=(",", ":"))
        # What a caller sent may be in a message; what of it is not Unicode becomes one of JSON's escapes.
        self.body = text.encode(errors="backslashreplace")
        self.headers["Content-Length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def render(error: ServiceError) -> ErrorAnswer:
    """An error as a response."""
    return ErrorAnswer(error)


def from_validation(error: RequestValidationError) -> ServiceError:
    """The first thing wrong with a request, named by its field."""
    first = error.errors()[0]
    if first["type"] in ("json_invalid", "missing") and len(first["loc"]) < 2:
        return errors.MalformedRequest("the body must be a JSON object, sent as Content-Type: application/json")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return errors.MalformedRequest(f"the body is not valid JSON: {reason} at character {first['loc'][-1]}")
    if isinstance(first.get("input"), bytes):
        return errors.MalformedRequest("the body must be JSON, sent as Content-Type: application/json")
    # Pydantic names the members of unions in the location too, which are no fields of the caller's.
    location = [str(part) for part in first["loc"][1:] if part not in _UNION_MEMBERS]
    param = ".".join(part for part in location if part.isidentifier() or part.isdecimal()) or None
    if not param and first["type"] in ("model_type", "model_attributes_type"):
        return errors.InvalidRequest(f"the body must be a JSON object (got {_shown(first.get('input'))})")
    shown = _shown(first.get("input"))
    message = f"{param or 'body'}: {first['msg']}" + ("" if first["type"] == "missing" else f" (got {shown})")
    code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(first["type"], "invalid_value")
    return errors.InvalidRequest(message, param=param, code=code)


def methods_of(request: Request) -> list[str]:
    """Every method that the path of a request knows; the framework names only those of one of its routes."""
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        if any(r.matches({**request.scope, "method": method})[0] is Match.FULL for r in request.app.router.routes)
    ]


def from_http(error: HTTPException, request: Request) -> ServiceError:
    """An error that the framework raised, as ours."""
    kind = _BY_STATUS.get(error.status_code, errors.InternalError)
    if kind is errors.NotFound:
        return kind(f"there is nothing at {request.url.path[:200]}; /docs lists what there is")
    if kind is errors.MethodNotAllowed:
        allowed = (error.headers or {}).get("Allow", "another method")
        return kind(f"{request.url.path} does not know {request.method}; it knows {allowed}")
    if kind is errors.BodyTooLarge:
        limit = request.scope[MAX_BODY_SIZE_SCOPE_KEY]
        return kind(f"the request is larger than {limit} bytes; send fewer or smaller images")
    return kind(str(error.detail))


def install(app: FastAPI) -> None:
    """Make every error of the app, the framework's included, come out in the envelope."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)  # noqa: S101 - registered for this type
        request.state.error = error
        return render(error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type
        request.state.error = from_validation(error)
        return render(request.state.error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
        if error.headers and "Allow" in error.headers:
            error.headers = {**error.headers, "Allow": ", ".join(methods_of(request))}
        request.state.error = from_http(error, request)
        response = render(request.state.error)
        response.headers.update(error.headers or {})
        return response

    async def on_fault(request: Request, error: Exception) -> Response:
        request.state.error = errors.InternalError(errors.FAULT)
        response = render(request.state.error)
        response.headers["x-request-id"] = request.state.request_id
        return response

    async def on_disconnect(request: Request, error: Exception) -> Response:
        request.state.error = errors.Canceled("the client went away")
        return render(request.state.error)

    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_fault)
