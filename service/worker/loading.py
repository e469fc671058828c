"""Bundles in memory: loaded, measured, warmed up, ready for batches."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.anomaly.calibration import Calibration, CalibrationError
from model.bundle import CALIBRATION, Bundle, BundleDamaged
from model.codecs.autoencoder_kl import AutoencoderKL
from model.codecs.base import Codec, Identity
from model.codecs.config import CodecConfig
from model.codecs.weights import load_codec
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults
from model.denoise import ROWS_PER_SLICE, denoise
from model.flow import Flow
from model.likelihood import log_likelihood, to_pixels
from model.noise import latents
from model.sampling.costs import cost_steps
from model.sampling.plan import CostProfile
from model.sampling.rows import Progress, finish, make_rows
from model.sampling.sampler import SLICE_SECONDS, Sampler
from model.weights import load_flow
from service.jobs import ModelInfo

WARM_UP_SLICES = 8
PASS_FLOPS = {"cpu": 30 * 10**9, "cuda": 10 * 10**12}
"""Work of one parallel pass: about a second on two slow cores, some tens of milliseconds on a GPU."""
MOST_SLICE_ROWS = {"cpu": ROWS_PER_SLICE, "cuda": 64}
"""Most images in a slice of parallel passes: on a CPU a slice should stay short; a GPU wants rows."""
GUIDED_PASSES = 2
DENOISE_PASSES = 3
"""A block of denoising is about as long as so many passes of it: again, and backward."""


@dataclass(frozen=True)
class LoadedModel:
    """A flow with its sampler on its device, and what the service needs to know of it."""

    info: ModelInfo
    sampler: Sampler
    device: torch.device
    codec: Codec = field(default_factory=Identity)
    """What the flow models of images, and back."""

    @classmethod
    def load(cls, bundle: Bundle, device: torch.device) -> LoadedModel:
        """The weights in memory; nothing is measured yet. Raises a ``BundleError``."""
        check_calibration(bundle)
        flow, codec = load_flow(bundle, device), load_codec(bundle, device)
        model = cls(ModelInfo.of(bundle), Sampler(flow, bundle.convergence), device, codec)
        model.sampler.rows_per_pass = model.slice_rows(GUIDED_PASSES)
        return model

    @property
    def flow(self) -> Flow:
        """The network."""
        return self.sampler.flow

    @property
    def noise(self) -> NoiseProtocol:
        """Noise protocol of training and scoring."""
        return self.info.noise

    @property
    def modelled_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the flow models of an image."""
        config = self.flow.config
        return config.channels, config.image_size, config.image_size

    def images(self, x_BTD: Tensor) -> Tensor:
        """Images (B, C, H, W), about on [-1, 1], of the flow's patches."""
        return self.codec.images(self.flow.unpatchify(x_BTD))

    def pixels(self, image_BCHW: Tensor) -> NDArray[np.uint8]:
        """8-bit images of :meth:`images`, confined to what pixels can show."""
        finite = torch.nan_to_num(image_BCHW, nan=0.0, posinf=1.0, neginf=-1.0)
        return to_pixels(finite, self.noise.kind).cpu().numpy()

    def check_label(self, label: int | None) -> None:
        """Raise ``ValueError`` for a class that the model has not: on a GPU such an index would end the process.

        A job may have been accepted for another version of the model.
        """
        classes = self.flow.config.num_classes
        if label is not None and classes and not 0 <= label < classes:
            raise ValueError(f"class {label}: model {self.info.name} has {classes} classes")

    def pass_rows(self, most: int) -> int:
        """Images in one parallel pass: up to ``most``, fewer for a large model, so that no pass takes long."""
        budget = PASS_FLOPS[self.device.type]
        return max(1, min(most, budget // self.flow.config.flops_per_image))

    def slice_rows(self, passes: int) -> int:
        """Images in a slice that takes a block's parallel pass ``passes`` times, so that it keeps to its time."""
        rows, costs = self.pass_rows(MOST_SLICE_ROWS[self.device.type]), self.sampler.costs
        if costs is not None:
            return costs.most_rows(SLICE_SECONDS, self.flow.config.num_patches, passes, rows)
        return rows

    def measure(self, most_rows: int) -> None:
        """Measure what passes cost here, for batches of up to ``most_rows`` images with guidance."""
        finish(self._measuring(most_rows))

    def _measuring(self, most_rows: int) -> Generator[None, None, None]:
        sampler = self.sampler
        sampler.costs = yield from cost_steps(
            sampler.kernel, GUIDED_PASSES * most_rows, sampler.graphs, segments=sampler.profile is not None
        )
        sampler.rows_per_pass = self.slice_rows(GUIDED_PASSES)

    def prepare(self, most_rows: int) -> Generator[None, None, None]:
        """Warm up and measure, as :meth:`measure` does, step by step, so that other work can go on in between.

        Raises ``RuntimeError`` when the model gives values that are not finite: it must not serve.
        """
        yield from warm_up(self)
        yield from self._measuring(most_rows)


def weight_bytes(config: FlowConfig, codec: CodecConfig | None = None) -> int:
    """Memory of a model's weights, without making them."""
    with torch.device("meta"):
        modules = [Flow(config), *([] if codec is None else [AutoencoderKL(codec)])]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_calibration(bundle: Bundle) -> None:
    """Raise ``BundleDamaged`` unless the bundle's own calibration, if it has one, is its own."""
    if bundle.calibration is None:
        return
    path = bundle.path / CALIBRATION
    try:
        Calibration.from_bytes(bundle.calibration, str(path)).check_model(bundle.name, bundle.model_id)
    except CalibrationError as error:
        raise BundleDamaged(f"{path}: {error}") from error


def describe(costs: CostProfile | None) -> str:
    """What passes cost, in a line: the shortest and the longest of a single patch and of a whole sequence."""
    if costs is None:
        return "nothing was measured"
    parts = []
    for patches in sorted({min(c.patches for c in costs.costs), max(c.patches for c in costs.costs)}):
        known = sorted((c for c in costs.costs if c.patches == patches), key=lambda c: c.rows)
        shown = " to ".join(f"{1000 * c.seconds:.1f} ms for {c.rows}" for c in (known[0], known[-1]))
        parts.append(f"a pass of {patches} patches takes {shown} rows with {known[-1].threads} threads")
    return ", ".join(parts)


def warm_up(model: LoadedModel) -> Generator[None, None, None]:
    """Run a little of everything once, so that the first request does not pay for it.

    Raises ``RuntimeError`` when the model gives values that are not finite.
    """
    config = model.flow.config
    latent = latents([0], config.num_patches, config.patch_dim).to(model.device)
    label = 0 if config.num_classes else None
    options = SamplingDefaults(guidance_scale=1.0, attention_temperature=0.5)
    slices: list[Generator[Progress, Tensor | None, object]] = []
    slices.append(model.sampler.decode(make_rows(latent, [label], [options])))
    if model.noise.kind == "gaussian":
        slices.append(denoise(model.flow, latent, None, model.noise.std))
    for generator in slices:
        for _ in zip(range(WARM_UP_SLICES), generator, strict=False):
            yield
    with torch.no_grad():
        value = log_likelihood(model.flow, torch.zeros_like(latent))
    image = model.images(torch.zeros_like(latent))
    if not bool(torch.isfinite(value).all()) or not bool(torch.isfinite(image).all()):
        raise RuntimeError(
            f"model {model.info.name}: the log-likelihood of a grey image is not finite, or the image of zeros"
        )
    yield
