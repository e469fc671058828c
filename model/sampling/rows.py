"""The rows of a sampling batch: each with its own latent, class and guidance."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from model.config import SamplingDefaults
from model.flow import NO_CLASS

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """Where a sampler stands after a slice: blocks finished, and the fraction of all its work."""

    block: int
    num_blocks: int
    fraction: float


Slices = Generator[Progress, Tensor | None, Tensor]
"""A sampler in flight. ``send(keep)`` with row indices drops all other rows before the next slice."""


@dataclass(frozen=True)
class Rows:
    """Per-row inputs of a sampler; B rows on one device."""

    latent_BTD: Tensor
    """Latents u with a standard normal prior, in the precision to decode in."""
    label_B: Tensor
    """Class index, or NO_CLASS."""
    scale_B: Tensor
    """Guidance weight w; 0 for none."""
    is_linear_B: Tensor
    """Whether the row's schedule is linear rather than constant."""
    guides_scale_B: Tensor
    """Whether guidance acts on the log-scale α."""
    guides_shift_B: Tensor
    """Whether guidance acts on the shift μ."""
    temperature_B: Tensor
    """Attention temperature τ of the unguided pass."""

    def __len__(self) -> int:
        return self.latent_BTD.shape[0]

    def select(self, index: Tensor) -> Rows:
        """The rows at ``index``."""
        return Rows(**{name: value[index] for name, value in vars(self).items()})

    @property
    def guided(self) -> Tensor:
        """Indices of rows that need a second pass: a weight, and a second pass that differs."""
        differs = (self.label_B != NO_CLASS) | (self.temperature_B != 1)
        return ((self.scale_B != 0) & differs).nonzero().squeeze(-1)


def make_rows(latent_BTD: Tensor, labels: Sequence[int | None], options: Sequence[SamplingDefaults]) -> Rows:
    """Assemble rows from one label (``None`` = no class) and one set of options per latent."""
    device, dtype = latent_BTD.device, latent_BTD.dtype
    return Rows(
        latent_BTD=latent_BTD,
        label_B=torch.tensor([NO_CLASS if y is None else y for y in labels], device=device),
        scale_B=torch.tensor([o.guidance_scale for o in options], device=device, dtype=dtype),
        is_linear_B=torch.tensor([o.guidance_schedule == "linear" for o in options], device=device),
        guides_scale_B=torch.tensor([o.guidance_target != "shift" for o in options], device=device),
        guides_shift_B=torch.tensor([o.guidance_target != "scale" for o in options], device=device),
        temperature_B=torch.tensor([o.attention_temperature for o in options], device=device, dtype=dtype),
    )


def finish(slices: Generator[Progress, Tensor | None, Result]) -> Result:
    """Run a sampler to its end in one go."""
    while True:
        try:
            next(slices)
        except StopIteration as stop:
            return stop.value
