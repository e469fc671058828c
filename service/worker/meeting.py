"""Where cohorts meet: who waits for whom at a block boundary, and who takes whom in.

A cohort that comes to a boundary waits for those inside the block before it, if the rows fit together; for those
alone, and for each until it has finished that block: so no cohort waits for longer than a block of others at any
boundary. The first at a boundary takes the others in when it need not wait any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from model.sampling.batch import Boundary
from service.worker.cohort import Cohort
from service.worker.loading import LoadedModel


class Meetings:
    """Remembers for every cohort at a boundary whom it waits for."""

    def __init__(self, most_rows: Callable[[LoadedModel], int]) -> None:
        """``most_rows`` says how many images of a model a cohort may have."""
        self._most_rows = most_rows
        self._awaited: WeakKeyDictionary[Cohort, tuple[Boundary, list[Cohort]]] = WeakKeyDictionary()

    def waits(self, cohort: Cohort, others: Sequence[Cohort]) -> bool:
        """Whether a cohort lets a turn pass."""
        self._arrive(cohort, others)
        if self._is_awaiting(cohort, others):
            return True
        # One that came before may wait for more; they go on together.
        return any(self._is_awaiting(o, others) and self._fit([cohort, o]) for o in others if cohort.meets(o))

    def partner(self, cohort: Cohort, others: Sequence[Cohort]) -> Cohort | None:
        """Who is taken in now."""
        there = (o for o in others if o is not cohort and cohort.meets(o) and o.rows)
        return next((other for other in there if self._fit([cohort, other])), None)

    def _fit(self, cohorts: Sequence[Cohort]) -> bool:
        return sum(cohort.rows for cohort in cohorts) <= self._most_rows(cohorts[0].model)

    def _arrive(self, cohort: Cohort, others: Sequence[Cohort]) -> None:
        """Settle whom a cohort waits for, once at each boundary."""
        if cohort.boundary is None:
            return
        known = self._awaited.get(cohort)
        if known is not None and known[0] is cohort.boundary:
            return
        awaited: list[Cohort] = []
        # One who comes where another stands already waits for nobody else: it goes on with that one.
        if not any(cohort.meets(other) for other in others if other is not cohort):
            for other in others:
                if cohort.is_followed_by(other) and self._fit([cohort, *awaited, other]):
                    awaited.append(other)
        self._awaited[cohort] = (cohort.boundary, awaited)

    def _is_awaiting(self, cohort: Cohort, others: Sequence[Cohort]) -> bool:
        known = self._awaited.get(cohort)
        if known is None or known[0] is not cohort.boundary:
            return False
        return any(other in others and cohort.is_followed_by(other) for other in known[1])
