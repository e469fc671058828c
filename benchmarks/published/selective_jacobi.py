"""Selective Jacobi decoding: the first sampled block patch by patch, all others by Jacobi passes.

Source: Zhang et al., "Accelerating Inference of Discrete Autoregressive Normalizing Flows by Selective
Jacobi Decoding" (arXiv 2505.24791), algorithm 1 and section 3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.published.guidance import Guidance, combine
from benchmarks.published.loop import invert
from model.flow import Block, Flow

PUBLISHED_TOLERANCE = 0.5
"""The authors' default of τ."""


def _solve(block: Block, z_BTD: Tensor, y_B: Tensor | None, guidance: Guidance, tolerance: float) -> tuple[Tensor, int]:
    """One block's x (B, T, D) in its own order by passes over the whole sequence, and how many it took."""
    num_patches = z_BTD.shape[1]
    weights_T1 = guidance.weights(0, num_patches, num_patches, z_BTD)
    temperature = guidance.attention_temperature
    inverse_temperature = None if temperature == 1 else z_BTD.new_full((1, 1, 1, 1), 1 / temperature)
    x_BTD = torch.cat([z_BTD[:, :1], torch.zeros_like(z_BTD[:, 1:])], dim=1)
    # After t passes the first t + 1 patches are exact, so the last of T − 1 passes leaves no error.
    for passes in range(1, num_patches):
        affine = block.affine(x_BTD, y_B)
        if guidance.scale:
            affine = combine(affine, block.affine(x_BTD, None, inverse_temperature), weights_T1)
        alpha, mu = affine
        previous, x_BTD = x_BTD, z_BTD * alpha.exp() + mu
        if (x_BTD - previous).abs().max() < tolerance:
            return x_BTD, passes
    return x_BTD, num_patches - 1


@torch.no_grad()
def selective_jacobi(
    flow: Flow,
    latent_BTD: Tensor,
    y_B: Tensor | None = None,
    guidance_scale: float = 0.0,
    linear: bool = False,
    attention_temperature: float = 1.0,
    tolerance: float = PUBLISHED_TOLERANCE,
) -> tuple[Tensor, list[int]]:
    """Latents u to patches x (B, T, D); also the passes of each block in the order of sampling.

    A block ends when no value of any row moves by ``tolerance`` or more: batch-mates decide about each
    other's images. The first block counts T − 1 passes, each over one patch.
    """
    guidance = Guidance(guidance_scale, linear, attention_temperature)
    x_BTD = latent_BTD * flow.prior_variance.sqrt()
    passes: list[int] = []
    for block in reversed(flow.blocks):
        z_BTD = block.in_block_order(x_BTD)
        if passes:
            x_BTD, count = _solve(block, z_BTD, y_B, guidance, tolerance)
        else:
            x_BTD, count = invert(block, z_BTD, y_B, guidance), z_BTD.shape[1] - 1
        x_BTD = block.in_block_order(x_BTD)
        passes.append(count)
    return x_BTD, passes
