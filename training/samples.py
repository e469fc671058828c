"""Grids of samples: the same seeds each time, so that one sees a model getting better."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from model.codecs.base import Codec, Identity
from model.config import NoiseProtocol, SamplingDefaults
from model.denoise import denoise
from model.flow import Flow
from model.images import encode_image, grid
from model.likelihood import to_pixels
from model.noise import latents
from model.sampling.rows import Progress, make_rows
from model.sampling.sampler import Sampler

Result = TypeVar("Result")
SAMPLES_PER_CLASS = 2
MAX_CLASSES = 16
UNCONDITIONAL_SAMPLES, UNCONDITIONAL_COLUMNS = 16, 8


class Interrupted(Exception):
    """The run was asked to stop while it was drawing samples."""


def write_sample_grid(
    path: Path,
    flow: Flow,
    noise: NoiseProtocol,
    sampling: SamplingDefaults,
    should_stop: Callable[[], bool],
    codec: Codec | None = None,
) -> bytes:
    """Draw :func:`sample_grid` into a PNG file and return its bytes; raises :class:`Interrupted` as it does."""
    picture = encode_image(sample_grid(flow, noise, sampling, should_stop, codec), "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    return picture


def sample_grid(
    flow: Flow,
    noise: NoiseProtocol,
    sampling: SamplingDefaults,
    should_stop: Callable[[], bool],
    codec: Codec | None = None,
) -> NDArray[np.uint8]:
    """Samples with seeds 0, 1, … as one picture (C, H', W') of 8-bit pixels.

    A column for each class (the first 16 of them) and two samples in it; 16 samples when there are
    no classes. ``codec`` makes images of latents. Raises :class:`Interrupted` soon after ``should_stop()`` turns true.
    """
    config = flow.config
    device = flow.prior_variance.device
    labels: list[int | None]
    if config.num_classes:
        columns = min(config.num_classes, MAX_CLASSES)
        labels = [*range(columns)] * SAMPLES_PER_CLASS
    else:
        columns, labels = UNCONDITIONAL_COLUMNS, [None] * UNCONDITIONAL_SAMPLES
    u_BTD = latents(range(len(labels)), config.num_patches, config.patch_dim).to(device)
    rows = make_rows(u_BTD, labels, [sampling] * len(labels))
    x_BTD = _finish(Sampler(flow).decode(rows), should_stop).x_BTD
    if sampling.denoise:
        x_BTD = _finish(denoise(flow, x_BTD, rows.label_B, noise.std), should_stop)
    images_BCHW = (codec or Identity()).images(flow.unpatchify(x_BTD))
    pixels = to_pixels(images_BCHW, noise.kind).cpu().numpy()
    return grid(list(pixels), columns)


def _finish(slices: Generator[Progress, torch.Tensor | None, Result], should_stop: Callable[[], bool]) -> Result:
    """Run a sampler to its end, unless asked to stop between two slices."""
    while not should_stop():
        try:
            next(slices)
        except StopIteration as stop:
            return stop.value
    slices.close()
    raise Interrupted
