"""Admission as the endpoints ask for it: before an upload is decoded, and when the job is submitted."""

from __future__ import annotations

import time

from service import logs
from service.access.caller import ANYONE, Caller
from service.broker.base import Accepted, Broker, Terms
from service.errors import InvalidRequest, Overloaded, Unavailable
from service.jobs import Job

Place = tuple[str, str]
"""A model, and the name of a caller."""
OPEN_SECONDS = 0.05
"""So long after a request was let in, the next one is not asked about before its images are decoded."""


class Door:
    """Spares the broker questions whose answer is known; submitting is always judged by the broker."""

    def __init__(self, broker: Broker, caller: Caller = ANYONE, open_until: dict[Place, float] | None = None) -> None:
        self._broker, self._caller = broker, caller
        self._open_until: dict[Place, float] = {} if open_until is None else open_until

    def of(self, caller: Caller) -> Door:
        """The same for one caller."""
        return self if caller is self._caller else Door(self._broker, caller, self._open_until)

    async def check(self, model: str, cost: int) -> None:
        """Raise ``Overloaded`` or ``Unavailable`` where it would be in vain to prepare a job."""
        self._check_alone(cost)
        caller = self._caller
        if time.monotonic() < self._open_until.get((model, caller.name), 0.0):
            return
        await self._broker.check(model, cost, caller.name, caller.concurrent_cost)
        self._open_until[model, caller.name] = time.monotonic() + OPEN_SECONDS

    async def submit(self, job: Job, terms: Terms) -> Accepted:
        """As :meth:`~service.broker.base.Broker.submit`."""
        self._check_alone(job.cost)
        place = (job.model, self._caller.name)
        try:
            accepted = await self._broker.submit(job, terms)
        except (Overloaded, Unavailable):
            self._open_until.pop(place, None)
            raise
        self._open_until[place] = time.monotonic() + OPEN_SECONDS
        logs.bind(job_id=accepted.job_id)
        return accepted

    def _check_alone(self, cost: int) -> None:
        """Refuse what would never be let in, so that nobody tries again."""
        most = self._caller.concurrent_cost
        if most and cost > most:
            raise InvalidRequest(
                f"this request costs {cost} units (images x patches x passes), the key of {self._caller.name!r} allows "
                f"{most} at once; ask for fewer images or passes",
                code="cost_too_large",
            )
