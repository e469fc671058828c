"""Images with the noise they are evaluated under: image i of a split with that of ``seed + i``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.config import NoiseProtocol
from model.likelihood import add_noise
from model.noise import input_noise
from training.data import Images


def noisy_batches(
    images: Images, noise: NoiseProtocol, *, draws: int, seed: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Iterator[Tensor], Tensor]]:
    """Batches in order: an iterator over the draws' continuous images (B, C, H, W), and the labels (B,).

    An image's noise depends on its number alone, not on the batch. Raises ``ValueError`` when seed + N is not a seed.
    """
    shape = images.pixels.shape[1:]
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images.pixels[start : start + batch_size].copy()).to(device)
        labels = torch.from_numpy(images.labels[start : start + batch_size].copy()).to(device)
        indices = range(start, start + len(pixels))
        noise_KBCHW = torch.stack([input_noise(noise.kind, seed + i, draws, shape) for i in indices], dim=1)
        yield _noisy(pixels, noise, noise_KBCHW.to(device)), labels


def _noisy(pixels: Tensor, noise: NoiseProtocol, noise_KBCHW: Tensor) -> Iterator[Tensor]:
    """One draw at a time: beside their noise, all of them together would double the memory."""
    return (add_noise(pixels, noise, draw_BCHW) for draw_BCHW in noise_KBCHW)
