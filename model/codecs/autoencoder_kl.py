"""The AutoencoderKL of diffusers in plain torch, read from leaf to root: the same names, so the same weights.

Only what its inference computes: the encoder to the mean of the Gaussian posterior, and the decoder. Architecture:
Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), appendix E. That it
gives what the package gives is tested with the package itself.

Shape legend: B batch, C channels, H and W height and width, N = H·W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.codecs.config import CodecConfig

EPSILON = 1e-6
"""Of every normalization."""


class ResidualLayer(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPSILON)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return h_BCHW + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class Attention(nn.Module):
    """One head of attention between all places, with a residual connection."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPSILON)
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BNC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        y_BNC = F.scaled_dot_product_attention(self.to_q(h_BNC), self.to_k(h_BNC), self.to_v(h_BNC))
        return x_BCHW + self.to_out[0](y_BNC).transpose(1, 2).view_as(x_BCHW)


class MidBlock(nn.Module):
    """Two residual layers, with attention between them or without."""

    def __init__(self, width: int, config: CodecConfig) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResidualLayer(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)] if config.mid_block_add_attention else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.resnets[0](x_BCHW)
        for attention in self.attentions:
            x_BCHW = attention(x_BCHW)
        return self.resnets[1](x_BCHW)


class Downsample(nn.Module):
    """Half the side; a border of zeros to the right and below makes the convolution fit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual layers, then half the side unless it is the last."""

    def __init__(self, inputs: int, outputs: int, config: CodecConfig, *, last: bool) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResidualLayer(width, outputs, config.norm_num_groups) for width in widths)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(outputs)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for part in (*self.resnets, *self.downsamplers):
            x_BCHW = part(x_BCHW)
        return x_BCHW


class UpBlock(nn.Module):
    """Residual layers, then twice the side unless it is the last."""

    def __init__(self, inputs: int, outputs: int, config: CodecConfig, *, last: bool) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * config.layers_per_block
        self.resnets = nn.ModuleList(ResidualLayer(width, outputs, config.norm_num_groups) for width in widths)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(outputs)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for part in (*self.resnets, *self.upsamplers):
            x_BCHW = part(x_BCHW)
        return x_BCHW


class Encoder(nn.Module):
    """An image to the mean and the log-variance of its latents, one after the other along the channels."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        pairs = enumerate(zip((widths[0], *widths), widths, strict=False))
        self.down_blocks = nn.ModuleList(
            DownBlock(inputs, outputs, config, last=place == len(widths) - 1) for place, (inputs, outputs) in pairs
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x_BCHW))))


class Decoder(nn.Module):
    """Latents to an image."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        pairs = enumerate(zip((widths[0], *widths), widths, strict=False))
        self.up_blocks = nn.ModuleList(
            UpBlock(inputs, outputs, config, last=place == len(widths) - 1) for place, (inputs, outputs) in pairs
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid_block(self.conv_in(z_BCHW))
        for block in cast("Sequence[UpBlock]", self.up_blocks):
            x_BCHW = block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))


class AutoencoderKL(nn.Module):
    """Images on [-1, 1] to scaled latents and back."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Images (B, C, H, W) to latents, the posterior's mean, shifted and scaled to about unit variance."""
        moments = self.encoder(image_BCHW)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return (moments.chunk(2, dim=1)[0] - self.config.shift_factor) * self.config.scaling_factor

    @torch.no_grad()
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Scaled latents to images (B, C, H, W), about on [-1, 1]."""
        latent_BCHW = latent_BCHW / self.config.scaling_factor + self.config.shift_factor
        if self.post_quant_conv is not None:
            latent_BCHW = self.post_quant_conv(latent_BCHW)
        return self.decoder(latent_BCHW)
