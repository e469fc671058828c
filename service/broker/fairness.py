"""Whose turn it is: start-time fair queueing by cost.

Each caller's jobs of one priority are a flow. A job's virtual start is the later of the lane's virtual time and its
flow's last finish; its finish is start + cost / weight, and jobs are taken in the order of their finishes. The lane's
virtual time is the largest start of what was taken. So a flow that was idle gets no credit for that, one that floods
the queue waits behind itself only, and every flow that waits gets its weight's share of the work: a low priority is
slow, never starved. When a lane has nothing to do, all begin anew as equals (P. Goyal, H. Vin, H. Cheng, Start-time
Fair Queueing, 1996; the order by finish is of self-clocked fair queueing, S. Golestani, 1994, and lets small jobs go
before large ones of equal start).

``lua/fairness.lua`` is the same for Redis.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from service.jobs import WEIGHTS, Priority


@dataclass(frozen=True, order=True)
class Turn:
    """A job's place: the smaller, the earlier."""

    finish: float
    number: int
    """Of the submission; among equals the first is the first."""
    start: float


@dataclass
class VirtualClock:
    """The virtual time of one lane, over all models."""

    now: float = 0.0
    finishes: dict[Hashable, float] = field(default_factory=dict)
    """Last virtual finish of every flow that is ahead of the clock."""

    def turn(self, caller: str, priority: Priority, cost: int, number: int) -> Turn:
        """The place of a new job."""
        flow = (caller, priority)
        start = max(self.now, self.finishes.get(flow, 0.0))
        self.finishes[flow] = finish = start + cost / WEIGHTS[priority]
        return Turn(finish, number, start)

    def rest(self) -> None:
        """Nothing waits or runs: what was done while nobody else wanted any is not held against its flow."""
        self.finishes = {}

    def took(self, turn: Turn) -> None:
        """A job was taken: time goes on, and flows that are behind it are forgotten."""
        if turn.start > self.now:
            self.now = turn.start
            self.finishes = {flow: finish for flow, finish in self.finishes.items() if finish > self.now}
