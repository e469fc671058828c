"""The interface between images and what a flow models of them: the pixels, or the latents of an autoencoder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.codecs.autoencoder_kl import AutoencoderKL
from model.likelihood import to_model_range

ROWS_PER_PASS = 8
"""Images that go through an autoencoder together: its activations at full size are by far its most memory."""


class Codec(Protocol):
    """Two maps without randomness; only the identity's are each other's inverse."""

    def modelled(self, pixels_BCHW: Tensor) -> Tensor:
        """Of 8-bit images what :func:`model.likelihood.add_noise` takes, (B, C', H', W'), where the images are."""
        ...

    def images(self, values_BCHW: Tensor) -> Tensor:
        """Of what the flow models images (B, C, H, W), about on [-1, 1]."""
        ...


class Identity:
    """The flow models the pixels themselves."""

    def modelled(self, pixels_BCHW: Tensor) -> Tensor:
        """The pixels."""
        return pixels_BCHW

    def images(self, values_BCHW: Tensor) -> Tensor:
        """The values."""
        return values_BCHW


class Latents:
    """The flow models the latents of an autoencoder, a few images at a time."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.autoencoder = autoencoder

    def modelled(self, pixels_BCHW: Tensor) -> Tensor:
        """The latents of the images, of which each has one: they are made without noise."""
        device = next(self.autoencoder.parameters()).device
        parts = [
            self.autoencoder.encode(to_model_range(part.to(device))).to(pixels_BCHW.device)
            for part in pixels_BCHW.split(ROWS_PER_PASS)
        ]
        return torch.cat(parts)

    def images(self, values_BCHW: Tensor) -> Tensor:
        """What the latents decode to."""
        return torch.cat([self.autoencoder.decode(part) for part in values_BCHW.split(ROWS_PER_PASS)])
