"""How much the embedded broker keeps of jobs that outlive their connections: it is in the memory of its process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from service.broker.base import RETRY_AFTER_SECONDS
from service.errors import Overloaded


class Kept:
    """Bytes of results, previews and recipes by job; nothing goes before its time, so new jobs must wait."""

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

    def add(self, job_id: str, values: Iterable[Any]) -> None:
        """Count what there is to a job from now on: bytes and arrays; all else is small."""
        size = sum(value.nbytes if isinstance(value, np.ndarray) else len(value) for value in values if _counts(value))
        self._bytes[job_id] += size
        self._total += size

    def forget(self, job_id: str) -> None:
        """Its time is over."""
        self._total -= self._bytes.pop(job_id, 0)


def _counts(value: Any) -> bool:
    return isinstance(value, bytes | np.ndarray)
