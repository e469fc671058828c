"""TarFlow's own ablation: coupling over the values of a patch in place of autoregression over the patches.

Source: arXiv 2412.06329, section 4 (the ablation of the flow's architecture); the coupling itself Dinh et al.
(arXiv 1605.08803). In each block one half of every patch's values stays as it is, and a transformer that sees that half
of *all* patches (no causal mask) gives scale and shift of the other half; the next block changes the halves' parts. The
block's inverse is one pass.

Shape legend: B batch, T patches, D values per patch, W transformer width. Log-determinants are in nats, summed over all
dimensions of an image.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.config import FlowConfig
from model.flow import at_least_float32
from training.baselines.direct import ClassEmbedding, DirectFlow


class CouplingBlock(nn.Module):
    """z_b = (x_b − μ(x_a))·exp(−α(x_a)), z_a = x_a for the halves a and b of every patch's values."""

    def __init__(self, config: FlowConfig, num_layers: int, swap: bool) -> None:
        super().__init__()
        kept = config.patch_dim // 2
        self.swap, self.kept = swap, kept if not swap else config.patch_dim - kept
        self.volume_preserving, moved = config.volume_preserving, config.patch_dim - self.kept
        self.proj_in = nn.Linear(self.kept, config.width)
        self.position = nn.Parameter(1e-2 * torch.randn(config.num_patches, config.width))
        self.classes = ClassEmbedding(config.num_classes, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.num_heads,
            config.expansion * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        # Layers are copies of one; torch would start them with equal weights.
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.proj_out = nn.Linear(config.width, moved if config.volume_preserving else 2 * moved)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def _halves(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The half that stays, and the one that is transformed."""
        if self.swap:
            return x_BTD[..., -self.kept :], x_BTD[..., : -self.kept]
        return x_BTD[..., : self.kept], x_BTD[..., self.kept :]

    def _joined(self, kept_BTK: Tensor, moved_BTM: Tensor) -> Tensor:
        return torch.cat([moved_BTM, kept_BTK] if self.swap else [kept_BTK, moved_BTM], dim=-1)

    def _affine(self, kept_BTK: Tensor, y_B: Tensor | None) -> tuple[Tensor, Tensor]:
        h_BTW = self.proj_in(kept_BTK) + self.position
        condition_BW = self.classes(y_B, len(kept_BTK))
        if condition_BW is not None:
            h_BTW = h_BTW + condition_BW.unsqueeze(1)
        out = at_least_float32(self.proj_out(self.layers(h_BTW)))
        if self.volume_preserving:
            return torch.zeros_like(out), out
        alpha, mu = out.chunk(2, dim=-1)
        return alpha, mu

    def forward(self, x_BTD: Tensor, y_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Data to noise: z (B, T, D), and the logdet (B,)."""
        kept, moved = self._halves(x_BTD)
        alpha, mu = self._affine(kept, y_B)
        return self._joined(kept, (moved - mu) * torch.exp(-alpha)), -alpha.sum(dim=(1, 2))

    def inverse(self, z_BTD: Tensor, y_B: Tensor | None) -> Tensor:
        """Noise to data."""
        kept, moved = self._halves(z_BTD)
        alpha, mu = self._affine(kept, y_B)
        return self._joined(kept, moved * torch.exp(alpha) + mu)


class ChannelCouplingFlow(DirectFlow):
    """As many blocks with as many layers of the same width as the TarFlow of the configuration."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        blocks = [CouplingBlock(config, n, swap=bool(i % 2)) for i, n in enumerate(config.layer_counts)]
        self.couplings = nn.ModuleList(blocks)

    def forward(self, x_BTD: Tensor, y_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet_B = torch.zeros(len(x_BTD), dtype=at_least_float32(x_BTD).dtype, device=x_BTD.device)
        for block in self.couplings:
            x_BTD, block_logdet_B = block(x_BTD, y_B)
            logdet_B = logdet_B + block_logdet_B
        return x_BTD, logdet_B

    def inverse(self, z_BTD: Tensor, y_B: Tensor | None = None) -> Tensor:
        for block in reversed(self.couplings):
            z_BTD = cast(CouplingBlock, block).inverse(z_BTD, y_B)
        return z_BTD
