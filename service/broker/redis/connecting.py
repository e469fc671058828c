"""How both faces connect, and what counts as Redis being away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,  # noqa: A004
    TryAgainError,
)

from service.broker.base import RETRY_AFTER_SECONDS
from service.errors import Unavailable

SOCKET_SECONDS = 3.0
"""Longest wait for an answer of a Redis that does not die and does not answer."""
CONNECT_SECONDS = 2.0
BLOCK_SECONDS = 1.5
"""Longest read that waits for something to come; less than SOCKET_SECONDS."""

# RESP 2 and 3 differ in replies, and so do versions of redis-py in which one they speak.
OPTIONS: dict[str, Any] = {
    "protocol": 2,
    "decode_responses": False,
    "socket_timeout": SOCKET_SECONDS,
    "socket_connect_timeout": CONNECT_SECONDS,
    "socket_read_size": 65536,
}

_AWAY = (
    ConnectionError,
    TimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    MasterDownError,
    ClusterDownError,
    TryAgainError,
    OSError,
)
_AWAY_REPLIES = ("NOREPLICAS", "MISCONF", "BUSY", "UNBLOCKED", "LOADING", "READONLY", "MASTERDOWN")


def is_full(error: BaseException) -> bool:
    """Whether Redis has no memory left."""
    return isinstance(error, OutOfMemoryError) or (isinstance(error, RedisError) and "OOM command" in str(error))


def is_away(error: BaseException) -> bool:
    """Whether Redis cannot be reached or cannot work now, and may later."""
    return isinstance(error, _AWAY) or (isinstance(error, RedisError) and str(error).startswith(_AWAY_REPLIES))


def unavailable(error: BaseException) -> Unavailable | None:
    """What a caller of the API is told; ``None`` for an error that is ours."""
    if is_full(error):
        return Unavailable(
            "the queue's memory is full; try again later", code="broker_full", retry_after=RETRY_AFTER_SECONDS
        )
    if is_away(error):
        return Unavailable(
            "the queue cannot be reached; try again later", code="broker_unreachable", retry_after=RETRY_AFTER_SECONDS
        )
    return None


@contextmanager
def service_errors() -> Iterator[None]:
    """Around a call of the API: what Redis has against it becomes the service's error."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise unavailable(error) or error from error


def public(url: str) -> str:
    """The URL without what is secret, for logs."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
