"""All errors of the service, as one tree::

    ServiceError
    ├── InvalidRequest         a value the caller sent is not allowed
    │   └── MalformedRequest   the body cannot even be parsed
    ├── Unauthorized           no key, or none that is known
    ├── Forbidden              the caller may not do this
    ├── NotFound               no such path, model or job
    ├── Conflict               there is such a thing already
    ├── MethodNotAllowed       the path exists, not with this method
    ├── BodyTooLarge           the request is larger than the limit
    ├── SlowBody               the body did not come in the time allowed
    ├── TooManyHeaders         the request has more headers than the limit
    ├── NotAcceptable          no response type the caller accepts
    ├── Overloaded             the queue is full, or the caller's limit reached; try again later
    ├── Unavailable            no worker is ready, or the service is shutting down
    ├── TimedOut               the work was not finished in the time allowed
    ├── Canceled               the caller went away or canceled
    ├── WorkerLost             workers died on the job more often than allowed
    └── InternalError          our fault

Every error carries a message for people, a stable ``code``, and where it applies the ``param`` that is
wrong. HTTP status codes are given in :mod:`service.api.envelope`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of the tree; raised as one of its leaves."""

    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    counts_as: ClassVar[str] = "error"
    """Its :attr:`outcome`, where no code says otherwise."""

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after

    @property
    def outcome(self) -> str:
        """How requests and jobs that end with it are counted."""
        return "oom" if self.code == OUT_OF_MEMORY else self.counts_as

    def to_wire(self) -> dict[str, Any]:
        """The error as plain data, for the broker."""
        return {"error": type(self).__name__, "message": self.message, "code": self.code, "param": self.param}

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> ServiceError:
        """The error that :meth:`to_wire` described; an unknown one becomes :class:`InternalError`."""
        kinds = {kind.__name__: kind for kind in _descendants(ServiceError)}
        kind = kinds.get(str(data.get("error")), InternalError)
        return kind(str(data.get("message")), code=data.get("code"), param=data.get("param"))


def _descendants(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [sub for child in kind.__subclasses__() for sub in (child, *_descendants(child))]


class InvalidRequest(ServiceError):
    """A value is not allowed; the message says which are."""

    type = "invalid_request_error"
    default_code = "invalid_value"
    counts_as = "invalid"


class MalformedRequest(InvalidRequest):
    """The body is not what its content type says."""

    default_code = "malformed_body"


class Unauthorized(ServiceError):
    """Who asks is not known."""

    type = "authentication_error"
    default_code = "invalid_key"
    counts_as = "invalid"


class Forbidden(ServiceError):
    """Who asks may not do this."""

    type = "permission_error"
    default_code = "wrong_scope"
    counts_as = "invalid"


class NotFound(ServiceError):
    """There is no such thing."""

    type = "invalid_request_error"
    default_code = "not_found"
    counts_as = "invalid"


class Conflict(ServiceError):
    """It is there already; what is to be done about that must be said."""

    type = "invalid_request_error"
    default_code = "already_exists"
    counts_as = "invalid"


class MethodNotAllowed(ServiceError):
    """The path does not know this method."""

    type = "invalid_request_error"
    default_code = "method_not_allowed"
    counts_as = "invalid"


class BodyTooLarge(ServiceError):
    """The body is over the limit."""

    type = "invalid_request_error"
    default_code = "body_too_large"
    counts_as = "invalid"


class SlowBody(ServiceError):
    """The time for the request was over before its body was there."""

    type = "invalid_request_error"
    default_code = "slow_body"
    counts_as = "timeout"


class TooManyHeaders(ServiceError):
    """The request has more headers than anybody needs."""

    type = "invalid_request_error"
    default_code = "too_many_headers"
    counts_as = "invalid"


class NotAcceptable(ServiceError):
    """The Accept header allows nothing that can be sent."""

    type = "invalid_request_error"
    default_code = "not_acceptable"
    counts_as = "invalid"


class Overloaded(ServiceError):
    """The queue is full, or a limit of the caller's is reached."""

    type = "rate_limit_error"
    default_code = "queue_full"
    counts_as = "rate_limited"


class Unavailable(ServiceError):
    """The service cannot work now."""

    type = "unavailable_error"
    default_code = "no_worker"
    counts_as = "rejected"


class TimedOut(ServiceError):
    """The time for the request is over."""

    type = "timeout_error"
    default_code = "timeout"
    counts_as = "timeout"


class Canceled(ServiceError):
    """The job was canceled."""

    type = "canceled_error"
    default_code = "canceled"
    counts_as = "canceled"


class WorkerLost(ServiceError):
    """The workers that had the job died."""

    default_code = "worker_lost"
    counts_as = "worker_lost"


FAULT = "an internal error; the service's log has the details"
"""All that callers are told of a fault."""


class InternalError(ServiceError):
    """A fault of the service."""


OUT_OF_MEMORY = "out_of_memory"
"""Code of an ``InternalError``: the device has no room for even one image of the request."""
