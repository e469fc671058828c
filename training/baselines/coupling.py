"""The baseline: a multi-scale convolutional coupling flow, trained and scored exactly as a TarFlow is.

Couplings with checkerboard and channel masks, squeezing and factoring out as in RealNVP (Dinh et al., arXiv
1605.08803); activation normalization that starts from the data as in Glow (Kingma and Dhariwal, arXiv 1807.03039).

Shape legend: B batch, C channels, H height and width, T patches, D values per patch. Log-determinants are in nats,
summed over all dimensions of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import FlowConfig
from training.baselines.direct import ClassEmbedding, DirectFlow

MAX_LEVELS = 3
RESIDUALS = 2
"""Residual blocks in the network of a coupling."""


class ActNorm(nn.Module):
    """An affine map of every channel; :meth:`initialize` makes its outputs standardized."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @torch.no_grad()
    def initialize(self, x_BCHW: Tensor) -> None:
        """Mean 0 and deviation 1 on these images."""
        deviation = x_BCHW.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-2)
        self.log_scale.copy_(-deviation.log())
        self.shift.copy_(-x_BCHW.mean(dim=(0, 2, 3), keepdim=True) / deviation)

    def forward(self, x_BCHW: Tensor, y_B: Tensor | None) -> tuple[Tensor, Tensor]:
        pixels = x_BCHW.shape[2] * x_BCHW.shape[3]
        logdet = pixels * self.log_scale.sum()
        return x_BCHW * self.log_scale.exp() + self.shift, logdet.expand(len(x_BCHW))

    def inverse(self, z_BCHW: Tensor, y_B: Tensor | None) -> Tensor:
        return (z_BCHW - self.shift) * torch.exp(-self.log_scale)


class _Network(nn.Module):
    """What a coupling computes from the values that stay: convolutions with residual blocks and a class."""

    def __init__(self, channels: int, outputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.classes = ClassEmbedding(num_classes, width)
        self.residuals = nn.ModuleList(
            nn.Sequential(
                nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1)
            )
            for _ in range(RESIDUALS)
        )  # fmt: skip
        self.last = nn.Conv2d(width, outputs, 3, padding=1)
        # A new coupling is the identity map.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor, y_B: Tensor | None) -> Tensor:
        h_BWHH = self.first(x_BCHW)
        condition_BW = self.classes(y_B, len(x_BCHW))
        if condition_BW is not None:
            h_BWHH = h_BWHH + condition_BW[:, :, None, None]
        for residual in self.residuals:
            h_BWHH = h_BWHH + residual(h_BWHH)
        return self.last(F.gelu(h_BWHH))


class Coupling(nn.Module):
    """z = m·x + (1 − m)·(x·exp(s(m·x)) + t(m·x)) with a mask m of zeros and ones; s = scale·tanh, as in RealNVP."""

    mask_CHW: Tensor

    def __init__(self, mask_CHW: Tensor, width: int, num_classes: int) -> None:
        super().__init__()
        channels = len(mask_CHW)
        self.register_buffer("mask_CHW", mask_CHW)
        self.network = _Network(channels, 2 * channels, width, num_classes)
        self.bound = nn.Parameter(torch.ones(channels, 1, 1))

    def _affine(self, kept_BCHW: Tensor, y_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift, zero where the mask is one."""
        scale, shift = self.network(kept_BCHW, y_B).to(kept_BCHW.dtype).chunk(2, dim=1)
        return (1 - self.mask_CHW) * self.bound * scale.tanh(), (1 - self.mask_CHW) * shift

    def forward(self, x_BCHW: Tensor, y_B: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, shift = self._affine(self.mask_CHW * x_BCHW, y_B)
        return x_BCHW * scale.exp() + shift, scale.sum(dim=(1, 2, 3))

    def inverse(self, z_BCHW: Tensor, y_B: Tensor | None) -> Tensor:
        scale, shift = self._affine(self.mask_CHW * z_BCHW, y_B)
        return (z_BCHW - shift) * torch.exp(-scale)


Step = ActNorm | Coupling


def checkerboard(channels: int, side: int, odd: bool) -> Tensor:
    """One where row + column is even (or odd), (C, H, H)."""
    index = torch.arange(side)
    return ((index[:, None] + index[None, :] + odd) % 2 == 0).float().expand(channels, -1, -1).clone()


def channel_half(channels: int, side: int, odd: bool) -> Tensor:
    """One in the first (or last) half of the channels, (C, H, H)."""
    first = (torch.arange(channels) < channels // 2) != odd
    return first.float()[:, None, None].expand(-1, side, side).clone()


class CouplingFlow(DirectFlow):
    """The baseline for images of ``config``, with networks of this width.

    Each level has four couplings with checkerboard masks, squeezes 2×2 pixels into channels, has four couplings with
    channel masks, and gives half of the channels to the latents; the last level keeps all.
    """

    def __init__(self, config: FlowConfig, width: int, couplings: int = 4) -> None:
        super().__init__(config)
        self.width = width
        channels, side = config.channels, config.image_size
        levels: list[nn.Module] = []
        while len(levels) < MAX_LEVELS and side % 2 == 0 and side >= 4:
            steps: list[nn.Module] = []
            for odd in range(couplings):
                mask = checkerboard(channels, side, bool(odd % 2))
                steps += [ActNorm(channels), Coupling(mask, width, config.num_classes)]
            before = nn.ModuleList(steps)
            channels, side, steps = 4 * channels, side // 2, []
            for odd in range(couplings):
                mask = channel_half(channels, side, bool(odd % 2))
                steps += [ActNorm(channels), Coupling(mask, width, config.num_classes)]
            levels.append(nn.ModuleList([before, nn.ModuleList(steps)]))
            channels //= 2
        if not levels:
            raise ValueError(f"image_size: got {config.image_size}, allowed is an even number >= 4 for a coupling flow")
        # The cast tells the type checker what nn.ModuleList forgets.
        self.levels = cast("Sequence[Sequence[Sequence[Step]]]", nn.ModuleList(levels))

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of one pass over one image: convolutions, as in :class:`FlowConfig`."""
        return sum(
            2 * convolution.weight.numel() * coupling.mask_CHW[0].numel()
            for coupling in self.modules()
            if isinstance(coupling, Coupling)
            for convolution in coupling.modules()
            if isinstance(convolution, nn.Conv2d)
        )

    def _run(
        self, x_BTD: Tensor, y_B: Tensor | None, visit: Callable[[ActNorm, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        x_BCHW, latents = self.unpatchify(x_BTD), []
        logdet_B = torch.zeros(len(x_BTD), dtype=x_BTD.dtype, device=x_BTD.device)
        for number, level in enumerate(self.levels):
            for part, steps in enumerate(level):
                x_BCHW = F.pixel_unshuffle(x_BCHW, 2) if part else x_BCHW
                for step in steps:
                    if isinstance(step, ActNorm):
                        visit(step, x_BCHW)
                    x_BCHW, step_logdet_B = step(x_BCHW, y_B)
                    logdet_B = logdet_B + step_logdet_B
            if number + 1 < len(self.levels):
                x_BCHW, latent = x_BCHW.chunk(2, dim=1)
                latents.append(latent.flatten(1))
        z_BN = torch.cat([*latents, x_BCHW.flatten(1)], dim=1)
        return z_BN.view(len(z_BN), self.config.num_patches, self.config.patch_dim), logdet_B

    def forward(self, x_BTD: Tensor, y_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x_BTD, y_B, lambda step, x_BCHW: None)

    @torch.no_grad()
    def initialize(self, x_BTD: Tensor) -> None:
        """Standardize what goes into every coupling, on these patches; to be done once, before training."""
        self._run(x_BTD, None, lambda step, x_BCHW: step.initialize(x_BCHW))

    def inverse(self, z_BTD: Tensor, y_B: Tensor | None = None) -> Tensor:
        sizes = list(self._latent_sizes())
        parts = list(z_BTD.flatten(1).split([c * s * s for c, s in sizes], dim=1))
        latents = [part.view(len(z_BTD), c, s, s) for part, (c, s) in zip(parts, sizes, strict=True)]
        x_BCHW = latents.pop()
        for number, level in reversed(list(enumerate(self.levels))):
            if number + 1 < len(self.levels):
                x_BCHW = torch.cat([x_BCHW, latents.pop()], dim=1)
            for part, steps in reversed(list(enumerate(level))):
                for step in reversed(steps):
                    x_BCHW = step.inverse(x_BCHW, y_B)
                x_BCHW = F.pixel_shuffle(x_BCHW, 2) if part else x_BCHW
        return self.patchify(x_BCHW)

    def _latent_sizes(self) -> Iterator[tuple[int, int]]:
        """Channels and side of what each level gives to the latents."""
        channels, side = self.config.channels, self.config.image_size
        for number in range(len(self.levels)):
            channels, side = 4 * channels, side // 2
            if number + 1 < len(self.levels):
                channels //= 2
            yield channels, side


def matched_width(config: FlowConfig, flops: int) -> int:
    """The largest multiple of 8 with which a pass over an image takes at most so many operations; at least 8."""

    def needed(width: int) -> int:
        with torch.device("meta"):
            return CouplingFlow(config, width).flops_per_image

    width = 8
    while needed(width + 8) <= flops:
        width += 8
    return width


def coupling_builder(width: int, first_BTD: Tensor) -> Callable[[FlowConfig], CouplingFlow]:
    """What the trainer builds the baseline with: its normalizations start from these patches."""

    def build(config: FlowConfig) -> CouplingFlow:
        flow = CouplingFlow(config, width)
        flow.initialize(first_BTD)
        return flow

    return build
