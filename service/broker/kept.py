"""How much the embedded broker keeps of jobs that outlive their connections: it is in the memory of its process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from service.broker.base import RETRY_AFTER_SECONDS
from service.errors import Overloaded

ENTRY_BYTES = 8192
"""What a job takes besides its arrays and its recipe: ids, terms, its place in tables. That is about 2 kB, more
with many arrays; without it a flood of small jobs would be bounded by nothing."""

EVENT_BYTES = 512
"""The same of an event, of which a job may have many."""


class Kept:
    """Bytes of jobs with their results, events and recipes; nothing goes before its time, so new jobs must wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes: Counter[str] = Counter()
        self._total = 0

    def check(self) -> None:
        """Raise ``Overloaded`` where there is no room for the result of one more job."""
        if self._total >= self._most:
            raise Overloaded(
                f"the results that are kept have {self._total} bytes, the most are {self._most}; try again when some "
                "have expired, or without asking for the answer to be kept",
                code="results_full",
                retry_after=RETRY_AFTER_SECONDS,
            )

    def add(self, job_id: str, size: int) -> None:
        """Count so many bytes more, or fewer, from now on."""
        self._bytes[job_id] += size
        self._total += size

    def forget(self, job_id: str) -> None:
        """Its time is over."""
        self._total -= self._bytes.pop(job_id, 0)


def size_of(values: Iterable[Any]) -> int:
    """Of bytes and arrays; all else is small."""
    return sum(
        value.nbytes if isinstance(value, np.ndarray) else len(value)
        for value in values
        if isinstance(value, bytes | np.ndarray)
    )
