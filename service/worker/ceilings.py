"""How many rows fit on the device at once, as far as running out of memory has taught it."""

from __future__ import annotations

import time

from service.worker.metrics import WorkerMetrics

HOLD_SECONDS = 600.0
"""After so long a ceiling is doubled: what took the memory may be gone."""


class Ceilings:
    """The most rows for each model and stage of work that ran out of memory; others have no ceiling."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._rows: dict[tuple[str, str], int] = {}
        self._since: dict[tuple[str, str], float] = {}

    def most(self, model: str, stage: str, rows: int) -> int:
        """``rows``, or fewer where so many did not fit."""
        ceiling = self._rows.get((model, stage))
        if ceiling is None:
            return rows
        if time.monotonic() - self._since[model, stage] > HOLD_SECONDS:
            if 2 * ceiling >= rows:
                self.forget(model, stage)
                return rows
            ceiling *= 2
            self._set(model, stage, ceiling)
        return min(rows, ceiling)

    def failed(self, model: str, stage: str, rows: int) -> int:
        """So many rows ran out of memory: from now on at most half as many, but one."""
        # A batch that began before a lower ceiling was learnt does not raise it.
        ceiling = max(1, min(rows // 2, self._rows.get((model, stage), rows)))
        self._set(model, stage, ceiling)
        return ceiling

    def forget(self, model: str, stage: str) -> None:
        """A single row does not fit, either: then it is the row, and others may still share a batch."""
        if self._rows.pop((model, stage), None) is not None:
            self._metrics.ceiling.remove(model, stage)

    def forget_model(self, model: str) -> None:
        """Another version of the model may be larger or smaller."""
        for name, stage in list(self._rows):
            if name == model:
                self.forget(name, stage)

    def _set(self, model: str, stage: str, rows: int) -> None:
        self._rows[model, stage] = rows
        self._since[model, stage] = time.monotonic()
        self._metrics.ceiling.labels(model=model, op=stage).set(rows)
