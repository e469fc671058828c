"""Tweedie denoising: x̂ = x̃ + σ² ∇ log p(x̃ | class), block by block.

Source: TarFlow (arXiv 2412.06329), section 2.5. The gradient keeps only each block's input from the
forward pass and recomputes one block at a time on the way back (activation checkpointing), so its
memory is that of one block, and the work is cut into slices by rows and blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.flow import Flow
from model.sampling.rows import Progress, Slices

ROWS_PER_SLICE = 8


@torch.no_grad()
def denoise(flow: Flow, x_BTD: Tensor, y_B: Tensor | None, std: float, rows_per_slice: int = ROWS_PER_SLICE) -> Slices:
    """Denoised patches (B, T, D), yielding after every block of every group of rows.

    ``std`` is the Gaussian noise σ of the model's training on the [-1, 1] pixel scale. The density
    is unguided. Sending row indices keeps only those rows.
    """
    num_blocks = len(flow.blocks)
    result_BTD = x_BTD.clone()
    alive = pending = torch.arange(len(x_BTD), device=x_BTD.device)
    total, worked = len(x_BTD) * 2 * num_blocks, 0
    while len(pending):
        group, pending = pending[:rows_per_slice], pending[rows_per_slice:]
        labels = None if y_B is None else y_B[group]
        steps = log_density_gradient(flow, x_BTD[group], labels)
        gradient = None
        while gradient is None:
            gradient = next(steps)
            worked += len(group)
            keep = yield Progress(num_blocks, num_blocks, min(1.0, worked / total))
            if keep is not None:
                # A group in work is finished; rows that left are just not returned.
                alive = alive[keep]
                pending = pending[torch.isin(pending, alive)]
        result_BTD[group] += std**2 * gradient
    return result_BTD[alive]


@torch.no_grad()
def log_density_gradient(flow: Flow, x_BTD: Tensor, y_B: Tensor | None) -> Iterator[Tensor | None]:
    """∇_x log p(x | y) (B, T, D) as the last item; ``None`` after each block on the way there."""
    inputs = []
    for block in flow.blocks:
        inputs.append(x_BTD)
        x_BTD, _ = block(x_BTD, y_B)
        yield None
    gradient = -x_BTD / flow.prior_variance
    for block, block_input in zip(reversed(flow.blocks), reversed(inputs), strict=True):
        with torch.enable_grad():
            leaf = block_input.detach().requires_grad_()
            z_BTD, alpha = block(leaf, y_B)
            # log p(x) = log N(z) + Σ logdet: z carries the gradient from above, −Σα this block's own.
            outputs = (z_BTD * gradient).sum() - alpha.sum()
            (gradient,) = torch.autograd.grad(outputs, leaf)
        yield gradient if block is flow.blocks[0] else None
