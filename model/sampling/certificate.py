"""The certificate of a finished sample: which noise it is the exact image of.

A sample is pushed once forward through the very map it was sampled with (its own class, rule, schedule, temperature
and window), in float32 and by the modules of :mod:`model.flow`, which share no code with the solvers. That gives
the noise z' of which it is the exact image; max|z' − z| is the backward error of the sample, before denoising and
rounding. It says how far the noise would have to move, in units of its standard deviation, for the sample to be exact.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from model.flow import Flow
from model.sampling.guided import Guidance
from model.sampling.rows import Rows


def backward_error(
    flow: Flow, rows: Rows, x_BTD: Tensor, rows_per_pass: int
) -> Generator[float, Tensor | None, Tensor]:
    """max|u' − u| (B,) of samples x (B, T, D) in image order; yields after every pass the share that is done.

    Nothing is to be sent to it.
    A sample with values that are not finite has an infinite error.
    """
    if not len(rows):
        return x_BTD.new_zeros(0)
    errors = []
    total, done = len(rows) * len(flow.blocks), 0
    for index in torch.arange(len(rows), device=x_BTD.device).split(rows_per_pass):
        some, x = rows.select(index), x_BTD[index]
        for place, block in enumerate(flow.blocks):
            guidance = Guidance(some, len(flow.blocks) - 1 - place, block)
            x_TBD = block.in_block_order(x).transpose(0, 1)
            temperature = guidance.inverse_temperature_R
            alpha_RTD, mu_RTD = block.affine(
                guidance.spread(x_TBD).transpose(0, 1),
                guidance.label_R,
                None if temperature is None else temperature.view(-1, 1, 1, 1),
            )
            alpha, mu = guidance.combine(torch.stack([alpha_RTD, mu_RTD], dim=2).transpose(0, 1), 0)
            z_TBD = (x_TBD - mu) * torch.exp(-alpha)
            # Guidance of the first patch would be of zeros by zeros; its z is its x.
            x = block.in_block_order(z_TBD.transpose(0, 1))
            done += len(index)
            yield done / total
        latent = x / flow.prior_variance.sqrt().to(x.dtype)
        error = (latent - some.latent_BTD.to(x.dtype)).abs().amax(dim=(1, 2))
        errors.append(torch.nan_to_num(error, nan=float("inf"), posinf=float("inf")))
    return torch.cat(errors)
