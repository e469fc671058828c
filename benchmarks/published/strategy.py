"""Choosing a GS-Jacobi strategy: which blocks are tough, and where their iterations had best start.

Source: Liu and Qin, "Accelerate TarFlow Sampling with GS-Jacobi Iteration" (arXiv 2505.12849): the
convergence ranking metric CRM and the initial guessing metric IGM, taken on a batch of images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.published.gs_jacobi import Guess, Strategy
from model.flow import Block, Flow

PUBLISHED_SEGMENTS = 8
"""Segments of a tough block in the authors' experiments."""
PUBLISHED_ITERATIONS = 32, 10
"""Their limits for each segment of a tough block and for any other block."""


def _traced(flow: Flow, x_BTD: Tensor, y_B: Tensor | None) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
    """Blocks in the order of sampling, each with its x, z and α (B, T, D) in image order."""
    steps = flow.trace(x_BTD, y_B)
    inputs = [x_BTD, *(z_BTD for z_BTD, _ in steps)]
    for index in reversed(range(len(steps))):
        yield flow.blocks[index], inputs[index], *steps[index]


def _norm(value_BTD: Tensor) -> float:
    """Spectral norm of the mean over the batch."""
    return float(torch.linalg.matrix_norm(value_BTD.mean(dim=0), ord=2))


@torch.no_grad()
def convergence_shares(flow: Flow, x_BTD: Tensor, y_B: Tensor | None) -> list[float]:
    """CRM of each block as a share of all, in the order of sampling, on patches x (B, T, D).

    CRM = ‖mean(e^{−α} ⊙ x)‖₂ · ‖W_α‖₂ + ‖W_μ‖₂ with the halves W of the block's output weights.
    """
    ranks = []
    for block, inputs_BTD, _, alpha_BTD in _traced(flow, x_BTD, y_B):
        weight = block.proj_out.weight
        of_scale, of_shift = (weight[:0], weight) if block.volume_preserving else weight.chunk(2, dim=0)
        rank = float(torch.linalg.matrix_norm(of_shift, ord=2))
        if len(of_scale):
            rank += _norm(torch.exp(-alpha_BTD) * inputs_BTD) * float(torch.linalg.matrix_norm(of_scale, ord=2))
        ranks.append(rank)
    return [rank / sum(ranks) for rank in ranks]


@torch.no_grad()
def initial_guesses(flow: Flow, x_BTD: Tensor, y_B: Tensor | None) -> list[Guess]:
    """The guess X⁰ with the smaller IGM of each block, in the order of sampling, on patches x (B, T, D).

    IGM = ‖mean(e^{α(X⁰)} ⊙ z + μ(X⁰) − x)‖₂.
    """
    guesses: list[Guess] = []
    for block, inputs_BTD, z_BTD, _ in _traced(flow, x_BTD, y_B):
        exact_BTD, z_BTD = block.in_block_order(inputs_BTD), block.in_block_order(z_BTD)
        zeros_BTD = torch.cat([z_BTD[:, :1], torch.zeros_like(z_BTD[:, 1:])], dim=1)
        metrics = []
        for guess_BTD in (z_BTD, zeros_BTD):
            alpha, mu = block.affine(guess_BTD, y_B)
            metrics.append(_norm(alpha.exp() * z_BTD + mu - exact_BTD))
        guesses.append("latent" if metrics[0] <= metrics[1] else "zeros")
    return guesses


def choose_strategy(
    flow: Flow,
    x_BTD: Tensor,
    y_B: Tensor | None,
    segments: int = PUBLISHED_SEGMENTS,
    iterations: tuple[int, int] | None = None,
) -> Strategy:
    """Divide the tough blocks into ``segments`` and no others; guesses by IGM on patches x (B, T, D).

    Tough is the block with the largest CRM, and any with more than twice the even share: on the
    authors' four models that picks the blocks that they picked by hand. ``iterations`` are the limits
    for each segment of a tough block and for any other block.
    """
    shares = convergence_shares(flow, x_BTD, y_B)
    is_tough = [share == max(shares) or share > 2 / len(shares) for share in shares]
    return Strategy(
        segments=[segments if tough else 1 for tough in is_tough],
        guesses=initial_guesses(flow, x_BTD, y_B),
        max_iterations=[iterations[0 if tough else 1] for tough in is_tough] if iterations else None,
    )
