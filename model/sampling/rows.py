"""The rows of a sampling batch: each with its own latent, class and guidance."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from model.config import SCHEDULES, SamplingDefaults, SolverOptions
from model.flow import NO_CLASS, Block

if TYPE_CHECKING:
    from model.sampling.batch import Boundary

Result = TypeVar("Result")
ALL_BLOCKS = 2**31


@dataclass(frozen=True)
class Progress:
    """Where a sampler stands after a slice: blocks finished, and the fraction of all its work."""

    block: int
    num_blocks: int
    fraction: float
    preview_BTD: Tensor | None = None
    """The rows after the last finished block, in image order."""
    stage: str = ""
    """Which part of the work this is: blocks are counted anew in each."""
    boundary: Boundary | None = None
    """Set where the sampler stands between two blocks and rows of another may join, if it was asked to stop there."""


Slices = Generator[Progress, Tensor | None, Tensor]
"""Work in flight. ``send(keep)`` with row indices drops all other rows before the next slice."""


@dataclass(frozen=True)
class Rows:
    """Per-row inputs of a sampler; B rows on one device."""

    latent_BTD: Tensor
    """Latents u with a standard normal prior, in the precision to decode in."""
    label_B: Tensor
    """Class index, or NO_CLASS."""
    scale_B: Tensor
    """Guidance weight w; 0 for none."""
    schedule_B: Tensor
    """Index of the weight's schedule in SCHEDULES."""
    closed_form_B: Tensor
    """Whether the row's rule is the closed form rather than the linear one."""
    target_B2: Tensor
    """1 where the linear rule acts on the log-scale α and the shift μ, else 0."""
    window_B2: Tensor
    """First guided block, and the one after the last, in the order of sampling."""
    temperature_B: Tensor
    """Attention temperature τ of the unguided pass."""
    tolerance_B: Tensor
    """Largest backward error of a certified row."""

    def __len__(self) -> int:
        return self.latent_BTD.shape[0]

    def select(self, index: Tensor) -> Rows:
        """The rows at ``index``."""
        return Rows(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """All rows of all parts, one after another."""
        return Rows(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def guided(self, number: int, block: Block) -> Tensor:
        """Indices of rows that need a second pass in ``block``, the ``number``-th of sampling: a weight, and a pass
        that differs. Where the class does not enter it differs by temperature alone."""
        differs = self.temperature_B != 1
        if block.conditioned:
            differs = differs | (self.label_B != NO_CLASS)
        inside = (self.window_B2[:, 0] <= number) & (number < self.window_B2[:, 1])
        return ((self.scale_B != 0) & differs & inside).nonzero().squeeze(-1)


def make_rows(
    latent_BTD: Tensor,
    labels: Sequence[int | None],
    options: Sequence[SamplingDefaults],
    tolerances: Sequence[float] | float = SolverOptions.tolerance,
) -> Rows:
    """Assemble rows from one label (``None`` = no class), one set of options and one tolerance per latent."""
    device, dtype = latent_BTD.device, latent_BTD.dtype

    def column(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    if isinstance(tolerances, float):
        tolerances = [tolerances] * len(latent_BTD)
    return Rows(
        latent_BTD=latent_BTD,
        label_B=column([NO_CLASS if y is None else y for y in labels], torch.long),
        scale_B=column([o.guidance_scale for o in options], dtype),
        schedule_B=column([SCHEDULES.index(o.guidance_schedule) for o in options], torch.long),
        closed_form_B=column([o.guidance_rule == "closed_form" for o in options], torch.bool),
        target_B2=column([[o.guidance_target != "shift", o.guidance_target != "scale"] for o in options], dtype),
        window_B2=column([o.guidance_window or (0, ALL_BLOCKS) for o in options], torch.long),
        temperature_B=column([o.attention_temperature for o in options], dtype),
        tolerance_B=column(tolerances, dtype),
    )


def finish(slices: Generator[Any, Any, Result]) -> Result:
    """Run a sampler to its end in one go."""
    while True:
        try:
            next(slices)
        except StopIteration as stop:
            return stop.value
