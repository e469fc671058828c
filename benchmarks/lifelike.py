"""Random flows that act as a trained one does: blocks with its log-scales, shifts and differences between classes.

What rounding does to a sample depends on how far the blocks scale and shift it, which random weights say nothing about.
Where no trained model of a size is at hand, one with random weights and a trained model's figures stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from model.config import FlowConfig
from model.flow import Block, Flow
from model.noise import latents

FIT_ROWS, FIT_ROUNDS = 8, 6
FIT_SEED = 2_000_000
POSITION_STD = 0.1
"""Of learned positions, ten times that of new ones. Without it log-scales follow the values alone, without bounds."""


@dataclass(frozen=True)
class Spread:
    """The parameters of one block over images, patches and values."""

    alpha_mean: float
    """Mean of the log-scales α."""
    alpha_std: float
    """Standard deviation of α."""
    mu_std: float
    """Standard deviation of the shifts μ."""
    class_std: float
    """Standard deviation of α less its value without a class; 0 where there are no classes."""

    def to_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def _class_std(block: Block, x_BTD: Tensor, y_B: Tensor | None, alpha: Tensor) -> float:
    """:attr:`Spread.class_std` on x in the block's own order."""
    return 0.0 if y_B is None else float((alpha - block.affine(x_BTD, None)[0][:, 1:]).std())


@torch.no_grad()
def measure_spreads(flow: Flow, x_BTD: Tensor, y_B: Tensor | None) -> list[Spread]:
    """Figures of each block in the order of sampling, on images x (B, T, D) with labels."""
    spreads = []
    for block in flow.blocks:
        own_BTD = block.in_block_order(x_BTD)
        # The first patch has no parameters.
        alpha, mu = (value[:, 1:] for value in block.affine(own_BTD, y_B))
        class_std = _class_std(block, own_BTD, y_B, alpha)
        spreads.append(Spread(float(alpha.mean()), float(alpha.std()), float(mu.std()), class_std))
        x_BTD, _ = block(x_BTD, y_B)
    return spreads[::-1]


def share_out(spreads: Sequence[Spread], num_blocks: int) -> list[Spread]:
    """Figures of a flow of ``num_blocks`` blocks that does in all what one with these figures does."""
    share = len(spreads) / num_blocks
    return [
        Spread(
            alpha_mean=spread.alpha_mean * share,
            # What is independent adds up in its variance.
            alpha_std=spread.alpha_std * share**0.5,
            mu_std=spread.mu_std * share**0.5,
            class_std=spread.class_std * share,
        )
        for spread in spreads
    ]


@torch.no_grad()
def lifelike_flow(config: FlowConfig, spreads: Sequence[Spread], seed: int = 0) -> Flow:
    """A flow with random weights whose blocks have about these figures, given in the order of sampling.

    With more blocks than figures, each serves several neighbours.
    """
    torch.manual_seed(seed)
    flow = Flow(config).eval().requires_grad_(False)
    z_BTD = latents(range(FIT_SEED, FIT_SEED + FIT_ROWS), config.num_patches, config.patch_dim)
    y_B = torch.arange(FIT_ROWS) % config.num_classes if config.num_classes else None
    for number, block in enumerate(reversed(flow.blocks)):
        spread = spreads[number * len(spreads) // config.num_blocks]
        torch.nn.init.normal_(block.proj_out.weight, std=config.width**-0.5)
        torch.nn.init.normal_(block.position, std=POSITION_STD)
        z_BTD = block.in_block_order(_fit(block, spread, block.in_block_order(z_BTD), y_B))
    return flow


def _fit(block: Block, spread: Spread, z_BTD: Tensor, y_B: Tensor | None) -> Tensor:
    """Scale a block's output layer to the figures; returns about the x that the block makes of z, both in its order.

    Each round also takes x one step of the iteration x ← z·exp(α(x)) + μ(x).
    """
    patch_dim = z_BTD.shape[2]
    weight, bias = block.proj_out.weight, block.proj_out.bias
    x_BTD = z_BTD
    for _ in range(FIT_ROUNDS):
        alpha, mu = (value[:, 1:] for value in block.affine(x_BTD, y_B))
        weight[:patch_dim] *= spread.alpha_std / alpha.std()
        weight[patch_dim:] *= spread.mu_std / mu.std()
        alpha = block.affine(x_BTD, y_B)[0][:, 1:]
        bias[:patch_dim] += spread.alpha_mean - alpha.mean()
        if block.class_embedding is not None and spread.class_std:
            block.class_embedding.mul_(spread.class_std / _class_std(block, x_BTD, y_B, alpha))
        alpha, mu = block.affine(x_BTD, y_B)
        x_BTD = z_BTD * alpha.exp() + mu
    return x_BTD
