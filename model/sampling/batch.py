"""The rows of a sampling in flight, and how two samplings become one.

Different blocks have different weights, so rows of two samplings can go on together only from where both stand before
the same block of the same stage, on the way to the same kind of result. Rows are independent, so it changes nothing
for any of them but the rounding of larger matrix products, and under solver ``auto`` how the blocks to come are solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.flow import Flow, at_least_float32
from model.sampling.kernel import Memory
from model.sampling.plan import Plan
from model.sampling.rows import Rows


class Kind(NamedTuple):
    """What the rows of a sampling have in common; their tolerances are their own."""

    solver: str
    precision: str
    certify: bool | None
    trajectory: bool


@dataclass
class Batch:
    """The rows that are still there, and what is known of them by now."""

    rows: Rows
    plan: Plan
    x_BTD: Tensor
    """Output of the last finished block, in image order."""
    passes_B: Tensor
    states: list[Tensor]
    """Outputs of all finished blocks, where they are kept."""
    guesses: list[Tensor]
    """Outputs of all blocks of a draft, from which iterations start."""
    iterated: bool = False
    """Whether a block was iterated for any of the rows, so that they are exact only within a tolerance."""
    memory: Memory | None = None
    """What the last block used; the next one uses it again if it has the size."""

    @classmethod
    def start(cls, flow: Flow, rows: Rows, plan: Plan) -> Batch:
        """Rows before their first block."""
        latent_BTD = at_least_float32(rows.latent_BTD)
        x_BTD = latent_BTD * flow.prior_variance.sqrt().to(latent_BTD.dtype)
        return cls(rows, plan, x_BTD, torch.zeros_like(rows.label_B), [], [])

    @property
    def iterates(self) -> bool:
        """Whether a block was iterated or is going to be."""
        return self.iterated or not self.plan.is_sequential

    def keep(self, index: Tensor) -> None:
        """Forget the other rows."""
        self.rows, self.x_BTD, self.passes_B = self.rows.select(index), self.x_BTD[index], self.passes_B[index]
        self.states = [state[index] for state in self.states]
        self.guesses = [guess[index] for guess in self.guesses]

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch that has come as far, behind the own ones."""
        self.rows = Rows.concatenate([self.rows, other.rows])
        self.x_BTD = torch.cat([self.x_BTD, other.x_BTD])
        self.passes_B = torch.cat([self.passes_B, other.passes_B])
        self.states = [torch.cat(pair) for pair in zip(self.states, other.states, strict=True)]
        self.guesses = [torch.cat(pair) for pair in zip(self.guesses, other.guesses, strict=True)]
        self.iterated |= other.iterated


@dataclass(frozen=True)
class Boundary:
    """Where a sampling stands between two blocks, with all that is needed to go on from there in another one."""

    kind: Kind
    stage: str
    """``blocks``, or with low precision ``draft`` and ``polish``."""
    block: int
    """The block of the stage that comes next."""
    batch: Batch

    @property
    def rows(self) -> Rows:
        """The rows that are still there."""
        return self.batch.rows

    def meets(self, other: Boundary) -> bool:
        """Whether the rows of both can go on together."""
        return (self.kind, self.stage, self.block) == (other.kind, other.stage, other.block)


@dataclass(frozen=True)
class Join:
    """Sent to a sampling that stands at a boundary: take in the rows of another that stands there, too.

    The other one must be closed then, since its rows are no longer its own.
    """

    other: Boundary
    plan: Plan | None = None
    """How the blocks to come are solved; ``None`` for the receiver's own plan. A polish has no other."""
    keep: Tensor | None = None
    """Indices of the rows that stay, the other's counted on from the own ones; ``None`` for all."""
