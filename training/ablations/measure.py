"""What a row of the table says: bits/dim, the distance of samples from real images, samples that are not finite."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.codecs.base import Codec, Identity
from model.config import NoiseProtocol, SamplingDefaults
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import log_likelihood, to_pixels
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from training.baselines.direct import DirectFlow
from training.checkpoint import data_fingerprint
from training.data import Images
from training.features import Extractor
from training.frechet import Figure, Moments, Reference
from training.tensors import write_tensors

ROWS_PER_BATCH, ROWS_PER_DENOISING = 128, 64


@dataclass(frozen=True)
class Drawn:
    """Samples of one flow."""

    pixels: NDArray[np.uint8]
    """The finite ones (N, C, H, W), in the order of their seeds."""
    not_finite: int
    """How many had values that are not."""
    seconds: float
    """Time to draw them."""


@torch.no_grad()
def draw_samples(
    flow: Flow,
    noise: NoiseProtocol,
    setting: SamplingDefaults,
    seeds: range,
    labels: Sequence[int | None],
    codec: Codec | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Drawn:
    """A sample for every seed, of the class that stands for it; guidance is not for flows with a direct inverse.

    ``codec`` makes images of latents; ``advance`` is told the number of samples after each batch.
    """
    config, device = flow.config, flow.prior_variance.device
    sampler = None if isinstance(flow, DirectFlow) else Sampler(flow)
    batches, started = [], time.perf_counter()
    for start in range(0, len(seeds), ROWS_PER_BATCH):
        batch = slice(start, start + ROWS_PER_BATCH)
        u_BTD = latents(seeds[batch], config.num_patches, config.patch_dim).to(device)
        rows = make_rows(u_BTD, labels[batch], [setting] * len(u_BTD))
        x_BTD = _invert(flow, u_BTD, rows.label_B) if sampler is None else finish(sampler.decode(rows)).x_BTD
        finite_B = _are_finite(x_BTD)
        x_BTD, y_B = x_BTD[finite_B], rows.label_B[finite_B]
        if setting.denoise and len(x_BTD):
            x_BTD = _denoised(flow, x_BTD, y_B, noise.std)
            x_BTD = x_BTD[_are_finite(x_BTD)]
        if len(x_BTD):
            images_BCHW = (codec or Identity()).images(flow.unpatchify(x_BTD))
            # An autoencoder may have no finite image of finite latents.
            images_BCHW = images_BCHW[_are_finite(images_BCHW)]
            batches.append(to_pixels(images_BCHW, noise.kind).cpu().numpy())
        advance(len(u_BTD))
    empty = np.zeros((0, config.channels, config.image_size, config.image_size), np.uint8)
    pixels = np.concatenate(batches) if batches else empty
    return Drawn(pixels, len(seeds) - len(pixels), time.perf_counter() - started)


def _invert(flow: Flow, u_BTD: Tensor, y_B: Tensor) -> Tensor:
    if not isinstance(flow, DirectFlow):
        raise TypeError(f"{type(flow).__name__} has no direct inverse")
    return flow.inverse(u_BTD * flow.prior_variance.sqrt(), y_B)


def _are_finite(x_BTD: Tensor) -> Tensor:
    return x_BTD.isfinite().flatten(1).all(dim=1)


def _denoised(flow: Flow, x_BTD: Tensor, y_B: Tensor, std: float) -> Tensor:
    """Tweedie's formula, as :func:`model.denoise.denoise`, for either kind of flow."""
    if not isinstance(flow, DirectFlow):
        return finish(denoise(flow, x_BTD, y_B, std, ROWS_PER_DENOISING))
    with torch.enable_grad():
        leaf = x_BTD.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_likelihood(flow, leaf, y_B).sum(), leaf)
    return x_BTD + std**2 * gradient


@dataclass(frozen=True)
class Ruler:
    """Real images and the features that distances from them are measured in."""

    extractor: Extractor
    reference: Reference
    device: torch.device
    """Where the extractor is."""

    def measure(self, pixels: NDArray[np.uint8]) -> Figure | None:
        """The distance of these samples; None where too few are left."""
        if len(pixels) < self.reference.min_samples:
            return None
        return self.reference.measure(self.extractor(torch.from_numpy(pixels).to(self.device)).cpu())


def make_ruler(
    extractor: Extractor,
    images: Images,
    components: int,
    cache: Path,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> Ruler:
    """The ruler of these real images; their features' moments are kept in ``cache`` for the next time."""
    key = f"{extractor.name} {data_fingerprint(images)}"
    moments = _read_moments(cache, key)
    if moments is None:
        pixels_NCHW = torch.from_numpy(np.ascontiguousarray(images.pixels)).to(device)
        features_NF = extractor(pixels_NCHW, advance).cpu()
        moments = Moments.of(features_NF)
        tensors = {"mean_F": moments.mean_F, "scatter_FF": moments.scatter_FF}
        write_tensors(cache, tensors, {"key": key, "count": str(moments.count)})
    return Ruler(extractor, Reference.fit(extractor.name, moments, components), device)


def _read_moments(cache: Path, key: str) -> Moments | None:
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, "pt") as file:
            about = file.metadata() or {}
        if about.get("key") != key:
            return None
        tensors = load_file(cache)
    except SafetensorError:
        # Damaged: it is made again.
        return None
    return Moments(int(about["count"]), tensors["mean_F"], tensors["scatter_FF"])


def figure_json(figure: Figure | None) -> dict[str, Any] | None:
    """A figure with the pseudo-values that differences are made of."""
    if figure is None:
        return None
    return {
        "value": figure.value,
        "standard_error": figure.standard_error,
        "uncorrected": figure.uncorrected,
        "pseudo_values": figure.pseudo_values_G.tolist(),
    }


def figure_from_json(content: dict[str, Any] | None) -> Figure | None:
    """The inverse of :func:`figure_json`."""
    if content is None:
        return None
    return Figure(torch.tensor(content["pseudo_values"], dtype=torch.float64), content["uncorrected"])


def sample_labels(flow: Flow, real_labels: NDArray[np.int64], count: int) -> list[int | None]:
    """Classes in the shares of the real images, the same for every row; none for a model without classes."""
    if not flow.config.num_classes:
        return [None] * count
    return [int(real_labels[i % len(real_labels)]) for i in range(count)]
