"""Names of keys, and what every script is told."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from service.broker.base import Limits

REPLICA_SECONDS = 15.0
"""An API process that was not heard for so long is gone, and with it who waited there."""
SWEEP_SECONDS = 1.0
"""How often somebody looks after leases, timeouts and what is gone."""


@dataclass(frozen=True)
class Keys:
    """Keys under one prefix, all in one slot of a cluster. The scripts make the others from :attr:`base`."""

    prefix: str

    @property
    def base(self) -> str:
        return f"{{{self.prefix}}}"

    @property
    def doorbell(self) -> str:
        return f"{self.base}:doorbell"

    def inbox(self, replica: str) -> str:
        return f"{self.base}:inbox:{replica}"

    def events(self, job_id: str) -> str:
        return f"{self.base}:events:{job_id}"

    def job(self, job_id: str) -> str:
        return f"{self.base}:job:{job_id}"

    def info(self, digest: str) -> str:
        return f"{self.base}:info:{digest}"


def name_of(*parts: str) -> str:
    """A key's part for what callers name as they like."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def milliseconds(seconds: float) -> int:
    """As the scripts count."""
    return round(seconds * 1000)


def common_arguments(limits: Limits, replica_seconds: float = REPLICA_SECONDS) -> tuple[int, ...]:
    """The arguments that stand before those of every operation."""
    return (
        milliseconds(limits.lease_seconds),
        milliseconds(limits.ready_seconds),
        limits.max_attempts,
        milliseconds(replica_seconds),
        milliseconds(SWEEP_SECONDS),
    )
