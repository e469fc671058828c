"""What the scripts' refusals are in the service's errors, with the messages of the embedded broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.broker.base import RETRY_AFTER_SECONDS, Limits
from service.errors import InvalidRequest, NotFound, Overloaded, ServiceError, Unavailable

MOST_RETRY_SECONDS = 60.0


def refusal(answer: Sequence[Any], model: str, cost: int, limits: Limits, caller_cost: int = 0) -> ServiceError | None:
    """The error of an answer of ``check.lua`` or ``submit.lua``; ``None`` when it is none."""
    code = answer[0].decode()
    if code == "no_worker":
        return Unavailable(
            f"no worker is ready for model {model!r}; one is starting, busy or being replaced",
            retry_after=RETRY_AFTER_SECONDS,
        )
    if code in ("queue_full", "share_full", "concurrency_limit_exceeded"):
        waiting, delay = int(answer[1]), answer[2] / 1000
        retry_after = min(MOST_RETRY_SECONDS, delay) if delay else RETRY_AFTER_SECONDS
        if code == "queue_full":
            text = (
                f"the queue is full ({waiting} of {limits.max_queue_cost} units wait, this request costs {cost}); "
                "try again later"
            )
        elif code == "concurrency_limit_exceeded":
            text = (
                f"your key allows {caller_cost} units at once ({waiting} are waiting or running, this request costs "
                f"{cost}); try again when some of your requests are done"
            )
        else:
            text = (
                f"your share of the queue is full ({waiting} of {share_of(limits)} units wait, this request costs "
                f"{cost}); try again when some of your requests are done"
            )
        return Overloaded(text, code=code, retry_after=retry_after)
    return None


def key_reused(key: str) -> InvalidRequest:
    """Another request has used the key before."""
    return InvalidRequest(
        f"Idempotency-Key: {key[:100]!r} was used for another request; take a new key",
        param="Idempotency-Key",
        code="idempotency_key_reused",
    )


def unknown(job_id: str) -> NotFound:
    """There is no such job, or not any more."""
    return NotFound(
        f"job: {job_id[:100]!r} is not known; results are kept for a limited time", code="job_not_found", param="job"
    )


def share_of(limits: Limits) -> int:
    """Most waiting cost of one named caller."""
    return int(limits.caller_share * limits.max_queue_cost)
