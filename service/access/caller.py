"""Who asks: what the rest of the service knows of a key."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from service.jobs import Priority


class Scope(StrEnum):
    """What a key opens; none of them includes another."""

    INFER = "infer"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One caller, by its key."""

    name: str = ""
    """The key's name; empty where no keys are configured."""
    priority: Priority = Priority.NORMAL
    scopes: frozenset[Scope] = frozenset()
    rate: str | None = None
    """Most requests in a window, as ``600/minute``; None for no limit."""
    concurrent_cost: int = 0
    """Most cost of its jobs that have not ended; 0 for no limit."""


ANYONE = Caller(scopes=frozenset(Scope))
"""Whoever reaches the port, where no keys are configured."""
NOBODY = Caller()
"""Who asks for what is open, without a key."""
