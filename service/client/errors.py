"""What the client raises, as one tree::

    TarflowError
    ├── ConnectionFailed           the service could not be reached, or the connection broke
    │   └── NoAnswerInTime         a timeout of httpx was over
    ├── Unfinished                 the time that the caller waits was over; the work goes on
    ├── UnexpectedAnswer           what came is nothing that the service sends
    └── ApiError                   the service's own refusal, or why a job failed
        ├── InvalidRequest             422: a value is not allowed
        │   └── MalformedRequest       400: the body cannot even be parsed
        ├── Unauthorized               401: no key, or none that is known
        ├── Forbidden                  403: the key does not open this
        ├── NotFound                   404: no such path, model, job or calibration
        ├── MethodNotAllowed           405
        ├── NotAcceptable              406: no response type the caller accepts
        ├── SlowBody                   408: the body did not come in the time allowed
        ├── Conflict                   409: there is such a thing already
        ├── BodyTooLarge               413
        ├── Overloaded                 429: the queue is full, or the caller's limit reached
        ├── TooManyHeaders             431
        ├── Canceled                   499: the job was canceled
        ├── InternalError              500: the service's fault
        ├── Unavailable                503: no worker is ready, or the service is shutting down
        ├── WorkerLost                 503: workers died on the job more often than allowed
        └── TimedOut                   504: the work was not finished in the time allowed

The classes below ``ApiError`` are those of :mod:`service.errors`, by name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

import httpx

SHOWN_CHARACTERS = 200
"""Of an answer that is not the service's."""


class TarflowError(Exception):
    """Base of the tree."""


class ConnectionFailed(TarflowError):
    """The service could not be reached, or the connection broke; the error of httpx is its ``__cause__``."""

    def __init__(self, message: str, *, is_passing: bool = True, may_have_arrived: bool = True) -> None:
        """``is_passing`` says whether it may be otherwise soon, ``may_have_arrived`` whether the service may have
        begun to work on the request."""
        super().__init__(message)
        self.is_passing, self.may_have_arrived = is_passing, may_have_arrived


class NoAnswerInTime(ConnectionFailed):
    """A timeout of httpx, other than that of connecting."""


class Unfinished(TarflowError):
    """What was waited for has not ended in the time given; it goes on, and can be waited for again."""


class UnexpectedAnswer(TarflowError):
    """An answer that no service of this version gives."""


class ApiError(TarflowError):
    """An error in the service's envelope; raised as one of the classes below, or as itself for a status of others,
    such as a proxy's."""

    usual_status: ClassVar[int] = 0

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        """Stable, for programs."""
        self.param = param
        """The field that is wrong, where one is."""
        self.status = self.usual_status if status is None else status
        """Of the answer; of a job that failed, what the synchronous call would have been answered with."""
        self.request_id = request_id
        """By which the service's log knows the request."""
        self.retry_after = retry_after
        """Seconds after which to try again, where the service says so."""
        self.should_retry = should_retry
        """What the service says of trying again (x-should-retry)."""


class InvalidRequest(ApiError):
    """A value is not allowed; the message says which are."""

    usual_status = 422


class MalformedRequest(InvalidRequest):
    """The body is not what its content type says."""

    usual_status = 400


class Unauthorized(ApiError):
    """Who asks is not known."""

    usual_status = 401


class Forbidden(ApiError):
    """Who asks may not do this."""

    usual_status = 403


class NotFound(ApiError):
    """There is no such thing."""

    usual_status = 404


class MethodNotAllowed(ApiError):
    """The path does not know this method."""

    usual_status = 405


class NotAcceptable(ApiError):
    """The Accept header allows nothing that can be sent."""

    usual_status = 406


class SlowBody(ApiError):
    """The time for the request was over before its body was there."""

    usual_status = 408


class Conflict(ApiError):
    """It is there already, or has changed since."""

    usual_status = 409


class BodyTooLarge(ApiError):
    """The body is over the limit."""

    usual_status = 413


class Overloaded(ApiError):
    """The queue is full, or a limit of the caller's is reached."""

    usual_status = 429


class TooManyHeaders(ApiError):
    """The request has more headers than anybody needs."""

    usual_status = 431


class Canceled(ApiError):
    """The job was canceled."""

    usual_status = 499


class InternalError(ApiError):
    """A fault of the service."""

    usual_status = 500


class Unavailable(ApiError):
    """The service cannot work now."""

    usual_status = 503


class WorkerLost(ApiError):
    """The workers that had the job died."""

    usual_status = 503


class TimedOut(ApiError):
    """The time for the request is over."""

    usual_status = 504


_KINDS: list[type[ApiError]] = [*ApiError.__subclasses__(), MalformedRequest]
_BY_STATUS = {kind.usual_status: kind for kind in _KINDS if kind is not WorkerLost}
_BY_CODE: dict[str, type[ApiError]] = {"worker_lost": WorkerLost, "calibration_changed": Conflict}
"""What neither a status nor a type tells from others."""
_BY_TYPE: dict[str, type[ApiError]] = {
    "invalid_request_error": InvalidRequest,
    "authentication_error": Unauthorized,
    "permission_error": Forbidden,
    "rate_limit_error": Overloaded,
    "unavailable_error": Unavailable,
    "timeout_error": TimedOut,
    "canceled_error": Canceled,
    "server_error": InternalError,
}
"""For errors of jobs, which have no status of their own."""


def of_response(response: httpx.Response) -> ApiError:
    """The error of an answer that has been read, whoever gave it."""
    headers = response.headers
    told = {
        "status": response.status_code,
        "request_id": headers.get("x-request-id"),
        "retry_after": _seconds(headers.get("retry-after")),
        "should_retry": {"true": True, "false": False}.get(headers.get("x-should-retry", "").lower()),
    }
    try:
        body = response.json()["error"]
        message, code, param = str(body["message"]), body["code"], body["param"]
    except (ValueError, TypeError, KeyError):
        kind = _BY_STATUS.get(response.status_code, ApiError)
        shown = " ".join(response.text[:SHOWN_CHARACTERS].split()) or "nothing more"
        return kind(f"answered {response.status_code} with {shown!r}", **told)
    kind = _BY_CODE.get(code) or _BY_STATUS.get(response.status_code, ApiError)
    return kind(message, code=code, param=param, **told)


def of_body(body: Mapping[str, Any]) -> ApiError:
    """The error in the document or the last event of a job."""
    code = body.get("code")
    kind = _BY_CODE.get(str(code)) or _BY_TYPE.get(str(body.get("type")), ApiError)
    return kind(str(body.get("message")), code=code, param=body.get("param"))


def of_transport(error: httpx.TransportError) -> ConnectionFailed:
    """An error of httpx as ours."""
    shown = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ConnectionFailed(f"cannot connect to the service ({shown})", may_have_arrived=False)
    if isinstance(error, httpx.TimeoutException):
        return NoAnswerInTime(f"no answer in the time that the client was given ({shown})", is_passing=False)
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return ConnectionFailed(f"the connection broke ({shown})")
    return ConnectionFailed(f"the request cannot be sent ({shown})", is_passing=False, may_have_arrived=False)


def _seconds(header: str | None) -> float | None:
    """Retry-After as seconds or as a date; nothing where it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header) if header[:1].isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return None
    return max(seconds, 0.0)
