"""One block for a whole batch: all rows at once when decoding, a few at a time when iterating.

A decoding step has little work for each row, so rows share it. A parallel pass fills the device with few rows; more
would only make the slice longer and the memory larger. Rows are independent, so the split changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from model.sampling.rows import Rows
from model.sampling.solver import BlockSolver

MakeSolver = Callable[[Rows, Tensor], BlockSolver]
"""A solver for some rows of a batch, which are at the given indices of it."""


class GroupedBlock:
    """Inverts one block, group after group; rows may leave meanwhile."""

    def __init__(self, rows: Rows, x_TBD: Tensor, rows_per_group: int, make_solver: MakeSolver) -> None:
        """``x_TBD`` takes the result; ``make_solver`` may be called after rows have left."""
        self.passes_B = torch.zeros(len(rows), dtype=torch.long, device=x_TBD.device)
        """Network passes that each row took part in."""
        self._rows, self._x_TBD, self._make_solver = rows, x_TBD, make_solver
        self._groups = list(torch.arange(len(rows), device=x_TBD.device).split(rows_per_group))

    def run(self) -> Generator[float, Tensor | None, Tensor]:
        """Returns x (T, B, D). Yields after every pass the share of the block that is done.

        Sending row indices keeps only those rows.
        """
        count = len(self._groups)
        for place in range(count):
            if not len(self._groups[place]):
                continue
            solver = self._make_solver(self._rows.select(self._groups[place]), self._groups[place])
            steps, keep = solver.run(), None
            while True:
                try:
                    share = steps.send(keep)
                except StopIteration as stop:
                    self._x_TBD[:, self._groups[place]] = stop.value
                    self.passes_B[self._groups[place]] = solver.passes_B
                    break
                kept = yield (place + share) / count
                keep = None if kept is None else self._keep(kept, place)
                if keep is not None and not len(keep):
                    steps.close()
                    break
        return self._x_TBD

    def _keep(self, kept: Tensor, current: int) -> Tensor:
        """Forget the other rows; returns which rows of the current group stay."""
        new_B = torch.full((len(self._rows),), -1, device=kept.device)
        new_B[kept] = torch.arange(len(kept), device=kept.device)
        staying = (new_B[self._groups[current]] >= 0).nonzero().squeeze(1)
        self._groups = [new_B[group][new_B[group] >= 0] for group in self._groups]
        self._rows, self._x_TBD, self.passes_B = self._rows.select(kept), self._x_TBD[:, kept], self.passes_B[kept]
        return staying
