"""GS-Jacobi: segments of a block one after another (Gauss-Seidel), the patches of each at once (Jacobi).

Source: Liu and Qin, "Accelerate TarFlow Sampling with GS-Jacobi Iteration" (arXiv 2505.12849). Their
program clamps every iterate to ±3, which moves the fixed point; here that is a choice, and off.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published.guidance import Affine, Guidance, combine
from benchmarks.published.loop import invert
from model.flow import Block, Flow, Layer, affine_parameters

PUBLISHED_TOLERANCE = 1e-6
"""The default of the authors' program; with it their limits on the iterations are what ends a segment."""

Guess = Literal["latent", "zeros"]
"""Where the iteration starts: at the block's z, or at zeros after the first patch."""

KeyValue = tuple[Tensor, Tensor]
"""Keys and values (B, H, N, E) of one layer."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How each block is sampled; all sequences have one entry a block, in the order of sampling."""

    segments: Sequence[int]
    """Segments of the block; 1 for plain Jacobi, 0 for the published loop."""
    guesses: Sequence[Guess]
    """Initial guess of the block."""
    max_iterations: Sequence[int] | None = None
    """Most iterations in each of the block's segments; ``None`` for as many as make it exact."""
    clamp: float | None = None
    """Iterates are held within ± this. It guards against overflow and changes the images."""


@dataclass(frozen=True)
class _Stop:
    """When a segment is finished: ‖x' − x‖₂/(B·D) over the segment and the whole batch, or a count."""

    tolerance: float
    max_iterations: int | None
    clamp: float | None


class _Pass:
    """One of the two passes of guidance: its class and temperature, and what it has cached."""

    def __init__(self, block: Block, y_B: Tensor | None, temperature: float) -> None:
        self.block, self.temperature = block, temperature
        self.condition = block.class_condition(y_B)
        self.position_TW = block.position.flip(0) if block.reverse else block.position
        self.prefix: list[KeyValue] | None = None
        self.current: list[KeyValue] = []

    def _layer(self, layer: Layer, x_BNW: Tensor, prefix: KeyValue | None, mask: Tensor | None) -> Tensor:
        attention = layer.attention
        B, N, W = x_BNW.shape
        qkv = attention.qkv(attention.norm(x_BNW)).view(B, N, 3, -1, attention.head_dim)
        q_BHNE, k_BHNE, v_BHNE = qkv.permute(2, 0, 3, 1, 4)
        if prefix is not None:
            k_BHNE, v_BHNE = (torch.cat(pair, dim=2) for pair in zip(prefix, (k_BHNE, v_BHNE), strict=True))
        self.current.append((k_BHNE, v_BHNE))
        scale = attention.head_dim**-0.5 / self.temperature
        y_BHNE = F.scaled_dot_product_attention(
            q_BHNE, k_BHNE, v_BHNE, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        x_BNW = x_BNW + attention.out(y_BHNE.transpose(1, 2).reshape(B, N, W))
        return x_BNW + layer.mlp(x_BNW)

    def affine(self, x_BND: Tensor, first: int, mask: Tensor | None) -> Affine:
        """α and μ (B, N, D) of the patches ``first + 1`` …, from the patches ``first`` … and what is cached."""
        x_BNW = self.block.proj_in(x_BND) + self.position_TW[first : first + x_BND.shape[1]]
        if self.condition is not None:
            x_BNW = x_BNW + self.condition
        self.current = []
        for index, layer in enumerate(self.block.layers):
            x_BNW = self._layer(layer, x_BNW, self.prefix[index] if self.prefix else None, mask)
        alpha, mu = affine_parameters(self.block.proj_out(x_BNW), self.block.config).unbind(-2)
        return alpha, mu

    def keep(self) -> None:
        """Cache the patches of the last pass: the segment is finished."""
        self.prefix = self.current


def _solve_segment(
    x_BTD: Tensor, z_BTD: Tensor, first: int, last: int, passes: Sequence[_Pass], guidance: Guidance, stop: _Stop
) -> int:
    """Write the patches ``first + 1`` … ``last`` of ``x_BTD`` in place; returns the iterations taken."""
    rows, num_patches, dims = z_BTD.shape
    length = last - first
    mask = None
    if first:
        # Causal within the segment, and all of the prefix is before it; is_causal cannot say so.
        mask = torch.ones(length, last, dtype=torch.bool, device=z_BTD.device).tril(first)
    weights_N1 = guidance.weights(first + 1, last + 1, num_patches, z_BTD)
    z_BND, x_BND = z_BTD[:, first + 1 : last + 1], x_BTD[:, first + 1 : last + 1]
    # After N iterations a segment of N patches is exact, its cached keys and values included.
    limit = length if stop.max_iterations is None else min(length, stop.max_iterations)
    iteration = 0
    while iteration < limit:
        alpha, mu = passes[0].affine(x_BTD[:, first:last], first, mask)
        if len(passes) > 1:
            alpha, mu = combine((alpha, mu), passes[1].affine(x_BTD[:, first:last], first, mask), weights_N1)
        new_BND = z_BND * alpha.exp() + mu
        if stop.clamp is not None:
            new_BND = new_BND.clamp(-stop.clamp, stop.clamp)
        residual = torch.linalg.vector_norm(new_BND - x_BND) / (rows * dims)
        x_BND.copy_(new_BND)
        iteration += 1
        if residual <= stop.tolerance:
            break
    for each in passes:
        each.keep()
    return iteration


def _solve(
    block: Block, z_BTD: Tensor, y_B: Tensor | None, guidance: Guidance, segments: int, guess: Guess, stop: _Stop
) -> tuple[Tensor, int]:
    """One block's x (B, T, D) in its own order, and the iterations of all its segments together."""
    x_BTD = z_BTD.clone()
    if guess == "zeros":
        x_BTD[:, 1:] = 0
    passes = [_Pass(block, y_B, 1.0)]
    if guidance.scale:
        passes.append(_Pass(block, None, guidance.attention_temperature))
    # The first patch is known; the others are divided as evenly as they can be.
    unknown = z_BTD.shape[1] - 1
    segments = min(segments, unknown)
    bounds = [unknown * index // segments for index in range(segments + 1)]
    iterations = 0
    for first, last in itertools.pairwise(bounds):
        iterations += _solve_segment(x_BTD, z_BTD, first, last, passes, guidance, stop)
    return x_BTD, iterations


@torch.no_grad()
def gs_jacobi(
    flow: Flow,
    latent_BTD: Tensor,
    y_B: Tensor | None,
    guidance_scale: float,
    linear: bool,
    attention_temperature: float,
    strategy: Strategy,
    tolerance: float = PUBLISHED_TOLERANCE,
) -> tuple[Tensor, list[int]]:
    """Latents u to patches x (B, T, D); also the iterations of each block in the order of sampling.

    A segment ends when ‖x' − x‖₂/(B·D), taken over all its rows, is at most ``tolerance``: batch-mates
    decide about each other's images, and more of them make the rule looser. The iterations of a
    block's segments are added up; a block without segments counts T − 1.
    """
    guidance = Guidance(guidance_scale, linear, attention_temperature)
    x_BTD = latent_BTD * flow.prior_variance.sqrt()
    limits: Sequence[int | None] = strategy.max_iterations or [None] * len(flow.blocks)
    iterations = []
    choices = zip(reversed(flow.blocks), strategy.segments, strategy.guesses, limits, strict=True)
    for block, segments, guess, limit in choices:
        z_BTD = block.in_block_order(x_BTD)
        if segments:
            stop = _Stop(tolerance, limit, strategy.clamp)
            x_BTD, count = _solve(block, z_BTD, y_B, guidance, segments, guess, stop)
        else:
            x_BTD, count = invert(block, z_BTD, y_B, guidance), z_BTD.shape[1] - 1
        x_BTD = block.in_block_order(x_BTD)
        iterations.append(count)
    return x_BTD, iterations
