"""Admission as the endpoints ask for it: before an upload is decoded, and when the job is submitted."""

from __future__ import annotations

import time

from service.broker.base import Accepted, Broker, Terms
from service.errors import Overloaded, Unavailable
from service.jobs import Job

OPEN_SECONDS = 0.05
"""So long after a request was let in, the next one is not asked about before its images are decoded."""


class Door:
    """Spares the broker questions whose answer is known; submitting is always judged by the broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._open_until: dict[str, float] = {}

    async def check(self, model: str, cost: int) -> None:
        """Raise ``Overloaded`` or ``Unavailable`` where it would be in vain to prepare a job."""
        if time.monotonic() < self._open_until.get(model, 0.0):
            return
        await self._broker.check(model, cost)
        self._open_until[model] = time.monotonic() + OPEN_SECONDS

    async def submit(self, job: Job, terms: Terms) -> Accepted:
        """As :meth:`~service.broker.base.Broker.submit`."""
        try:
            accepted = await self._broker.submit(job, terms)
        except (Overloaded, Unavailable):
            self._open_until.pop(job.model, None)
            raise
        self._open_until[job.model] = time.monotonic() + OPEN_SECONDS
        return accepted
