"""How a model's blocks converge under Jacobi iteration: what ``tarflow tune`` measures and a bundle stores.

Everything here is a property of the weights, not of the device. The two ranking figures are those of GS-Jacobi
(arXiv 2505.12849): CRM, ‖mean_b(e^{−α}⊙x)‖₂·‖W_α‖₂ + ‖W_μ‖₂ as a share over the blocks, says which blocks are
tough; IGM, ‖mean_b(exp(α(x⁰))z + μ(x⁰) − x)‖₂, which start is better. The plan relies on neither: it
counts how many rows still need a k-th pass.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor

from model.config import FlowConfig, SamplingDefaults, SolverOptions
from model.flow import Block, at_least_float32
from model.sampling.guided import Guidance
from model.sampling.kernel import BlockKernel, Memory
from model.sampling.plan import (
    FLOOR_DISTANCE,
    MARGIN,
    BlockConvergence,
    BlockPlan,
    ConvergenceProfile,
    Guess,
    Plan,
    segment_lengths,
)
from model.sampling.rows import Rows, finish
from model.sampling.sampler import Sampler
from model.sampling.solver import BlockSolver

RESIDUALS = (1e-2, 1e-3, 1e-4)
"""Where rows stop when the gain is measured; those near the floor of float32 are left out."""

LEAST_GAIN = 0.01
"""Gain of a model whose iterations leave no error that could be measured."""
SMALLEST_FLOOR = 1e-9


def measure_convergence(
    sampler: Sampler, rows: Rows, x_BTD: Tensor, y_B: Tensor | None, guidance: SamplingDefaults, tolerance: float
) -> Generator[str, None, ConvergenceProfile]:
    """Profile of a flow on ``rows`` to sample and on noised images x (B, T, D) with labels; yields what comes next.

    Raises ``ValueError`` when samples are not finite: such a model cannot be tuned.
    """
    flow = sampler.flow
    config = flow.config
    yield "sequential decoding"
    options = SolverOptions(solver="sequential", certify=True)
    exact = finish(sampler.decode(rows, options, trajectory=True))
    if not bool(torch.isfinite(exact.x_BTD).all()):
        raise ValueError("the model's samples have values that are not finite; lower the guidance scale")
    floor = float(exact.backward_error_B.max())
    whole = config.num_patches - 1
    yield "convergence-ranking and initial-guess metrics"
    crm, guesses = [], []
    for block, x, z, alpha in _block_inputs(sampler, x_BTD, y_B):
        crm.append(_ranking(block, x, alpha))
        guesses.append((_guess_metric(block, z, x, y_B, "latent"), _guess_metric(block, z, x, y_B, "zeros")))
    plan = Plan(
        blocks=tuple(BlockPlan(segment=whole, guess="zeros" if b < a else "latent") for a, b in guesses),
        gain=1 / MARGIN,
    )
    gain = 0.0
    for residual in RESIDUALS:
        if residual < FLOOR_DISTANCE * floor and gain:
            break
        yield f"backward error at residual {residual:g}"
        stopped = replace(rows, tolerance_B=torch.full_like(rows.tolerance_B, residual))
        iterated = finish(sampler.decode(stopped, SolverOptions(certify=False), plan=plan))
        errors_B = iterated.backward_error_B[torch.isfinite(iterated.backward_error_B)]
        # What rounding makes is no part of the ratio.
        gain = max([gain, *((errors_B - floor).clamp(min=0) / residual).tolist()])
    gain = max(gain, LEAST_GAIN)
    residual_B = torch.full_like(rows.tolerance_B, tolerance / (gain * MARGIN))
    states = [rows.latent_BTD * flow.prior_variance.sqrt(), *exact.trajectory]
    blocks = []
    for number, kernel in enumerate(sampler.kernel.blocks):
        active = {}
        for segment in segment_lengths(config.num_patches):
            yield f"block {number + 1} of {config.num_blocks}, segments of {segment}"
            active[str(segment)] = _active_shares(
                config, kernel, rows, number, states[number], segment, residual_B, plan.blocks[number].guess
            )
        latent, zeros = guesses[number]
        share = crm[number] / max(sum(crm), 1e-30)
        blocks.append(BlockConvergence(crm=share, igm_latent=latent, igm_zeros=zeros, active=active))
    return ConvergenceProfile(
        blocks=tuple(blocks),
        gain=gain,
        floor=max(floor, SMALLEST_FLOOR),
        tolerance=tolerance,
        num_images=len(rows),
        guidance=guidance.to_dict(),
    )


def _block_inputs(sampler: Sampler, x_BTD: Tensor, y_B: Tensor | None) -> list[tuple[Block, Tensor, Tensor, Tensor]]:
    """For each block in the order of sampling: itself, and its x, z and α (B, T, D) on images, in its own order."""
    inputs = []
    with torch.no_grad():
        for block in sampler.flow.blocks:
            z_BTD, alpha = block(x_BTD, y_B)
            own_order = block.in_block_order
            inputs.append((block, own_order(x_BTD), own_order(z_BTD), own_order(alpha)))
            x_BTD = z_BTD
    return inputs[::-1]


def _ranking(block: Block, x_BTD: Tensor, alpha_BTD: Tensor) -> float:
    """CRM of one block, before it is made a share."""
    weight = at_least_float32(block.proj_out.weight)
    if block.volume_preserving:
        return float(torch.linalg.matrix_norm(weight, 2))
    scale, shift = weight.chunk(2)
    moved = (torch.exp(-alpha_BTD) * x_BTD).mean(dim=0)
    return float(
        torch.linalg.matrix_norm(moved, 2) * torch.linalg.matrix_norm(scale, 2) + torch.linalg.matrix_norm(shift, 2)
    )


@torch.no_grad()
def _guess_metric(block: Block, z_BTD: Tensor, x_BTD: Tensor, y_B: Tensor | None, guess: Guess) -> float:
    """IGM of one start: how far the first iterate from it is from x, averaged over the images."""
    start_BTD = z_BTD if guess == "latent" else torch.cat([z_BTD[:, :1], torch.zeros_like(z_BTD[:, 1:])], dim=1)
    alpha, mu = block.affine(start_BTD, y_B)
    return float(torch.linalg.matrix_norm((torch.exp(alpha) * z_BTD + mu - x_BTD).mean(dim=0), 2))


@torch.no_grad()
def _active_shares(
    config: FlowConfig,
    kernel: BlockKernel,
    rows: Rows,
    number: int,
    z_BTD: Tensor,
    segment: int,
    residual_B: Tensor,
    guess: Guess,
) -> tuple[float, ...]:
    """Share of the rows that take part in pass 1, 2, … of a segment, averaged over the segments of a block."""
    z_TBD = kernel.block.in_block_order(z_BTD).transpose(0, 1).contiguous()
    guidance = Guidance(rows, number, kernel.block)
    memory = Memory.allocate(config, guidance.num_passes, kernel.dtype, z_TBD.device)
    solver = BlockSolver(
        kernel,
        rows,
        number,
        z_TBD,
        memory,
        segment=segment,
        residual_B=residual_B,
        guess_TBD=torch.zeros_like(z_TBD) if guess == "zeros" else None,
    )
    finish(solver.run())
    num_segments = len({first for first, _, _ in solver.history})
    counts: dict[int, int] = {}
    for _, number_of_pass, active in solver.history:
        counts[number_of_pass] = counts.get(number_of_pass, 0) + active
    return tuple(round(counts[k] / (num_segments * len(rows)), 4) for k in sorted(counts))
