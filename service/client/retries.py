"""When a request is sent once more, and after how long."""

from __future__ import annotations

import random

from service.client.errors import ApiError, Conflict, ConnectionFailed, Overloaded, TarflowError, Unavailable

FIRST_SECONDS, MOST_SECONDS = 0.5, 8.0
"""Between attempts where the service does not say: doubled each time."""
LONGEST_RETRY_AFTER = 120.0
"""A service that wants to be left alone for longer is not waited for."""
JITTER = 0.25
"""Share by which a wait may be longer, so that clients that were refused together do not come back together."""
IN_FLIGHT = "idempotency_in_flight"
LONGEST_IN_FLIGHT = 600.0
"""All waits together for an attempt that is being worked on, where no time is given: the service's own limit."""


class Patience:
    """How often one request may still be repeated."""

    def __init__(self, most: int, in_flight: float | None = None) -> None:
        """``in_flight`` are the seconds for which an attempt that is being worked on is waited for."""
        self._most, self._used = most, 0
        self._left = LONGEST_IN_FLIGHT if in_flight is None else in_flight

    def reset(self) -> None:
        """Begin anew: it went well for a while."""
        self._used = 0

    def after(self, error: TarflowError, *, repeatable: bool) -> float:
        """Seconds until the next attempt; raises the error where there is to be none.

        ``repeatable`` says whether the request may come twice: the service knows its idempotency key, or nothing
        changes by it.
        """
        wanted = error.retry_after if isinstance(error, ApiError) else None
        if isinstance(error, Conflict) and error.code == IN_FLIGHT:
            # The first attempt is being worked on, and ends by itself: waiting for it is no repetition.
            seconds = _longer(max(wanted or 0.0, FIRST_SECONDS))
            if not self._most or seconds > self._left:
                raise error
            self._left -= seconds
            return seconds
        if self._used >= self._most or not _may_be_repeated(error, repeatable) or (wanted or 0.0) > LONGEST_RETRY_AFTER:
            raise error
        self._used += 1
        return _longer(min(FIRST_SECONDS * 2 ** (self._used - 1), MOST_SECONDS) if wanted is None else wanted)


def _may_be_repeated(error: TarflowError, repeatable: bool) -> bool:
    if isinstance(error, ConnectionFailed):
        return error.is_passing and (repeatable or not error.may_have_arrived)
    if not isinstance(error, ApiError):
        return False
    if error.should_retry is not None:
        return error.should_retry
    # Not what workers have died of.
    return isinstance(error, Overloaded | Unavailable)


def _longer(seconds: float) -> float:
    return seconds * (1 + JITTER * random.random())
