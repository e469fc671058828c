"""What the machine itself adds to a measurement: CPU time that other guests took, and timers that ring late."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.load import percentile

SLEEP_SECONDS, SLEEPS = 0.001, 1000
STEAL = 7
"""Field of ``/proc/stat``: time in which a virtual processor wanted to run and did not."""
KINDS = 8
"""The fields before those of guests of this machine's own, which count twice."""


def _processor_times() -> list[int]:
    return [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1 : 1 + KINDS]]


class Quietness:
    """How much of the machine this program and its children did not get, from when it was made."""

    def __init__(self) -> None:
        self._before = _processor_times()

    def stolen(self) -> float:
        """Share of all processors' time since then, in percent, that the hypervisor gave to others."""
        taken = [now - before for now, before in zip(_processor_times(), self._before, strict=True)]
        return 100 * taken[STEAL] / max(1, sum(taken))


def lateness() -> float:
    """Seconds by which 99 of 100 sleeps of a millisecond are at most too long, on the machine as it is now."""
    late = []
    for _ in range(SLEEPS):
        start = time.perf_counter()
        time.sleep(SLEEP_SECONDS)
        late.append(time.perf_counter() - start - SLEEP_SECONDS)
    return percentile(sorted(late), 0.99)
