"""Flows whose inverse is one pass, behind the interface of :class:`model.flow.Flow`.

They take and return patches, so that the same loop trains them, the same code scores them, and a comparison differs in
nothing but the flow. They cannot be written as bundles, and guidance is not for them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import FlowConfig
from model.flow import NO_CLASS, Flow


class ClassEmbedding(nn.Module):
    """One vector per class; no class is the mean of all, as in TarFlow."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1e-2 * torch.randn(num_classes, width)) if num_classes else None

    def forward(self, y_B: Tensor | None, batch: int) -> Tensor | None:
        """(B, W), or None for a model without classes."""
        if self.weight is None:
            return None
        mean_BW = self.weight.mean(dim=0).expand(batch, -1)
        if y_B is None:
            return mean_BW
        return torch.where((y_B == NO_CLASS).unsqueeze(-1), mean_BW, self.weight[y_B.clamp(min=0)])


class DirectFlow(Flow):
    """A flow with :meth:`inverse`. ``config`` says what the images are, and what TarFlow it is compared with."""

    def __init__(self, config: FlowConfig) -> None:
        # Not Flow's own: there are no autoregressive blocks here.
        nn.Module.__init__(self)
        self.config = config
        self.register_buffer("prior_variance", torch.ones(config.num_patches, config.patch_dim))

    def inverse(self, z_BTD: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Latents z (B, T, D) to patches (B, T, D)."""
        raise NotImplementedError
