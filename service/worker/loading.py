"""Bundles in memory: loaded, warmed up, ready for batches."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.bundle import find_bundles
from model.config import NoiseProtocol, SamplingDefaults
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import log_likelihood
from model.noise import latents
from model.sampling.rows import make_rows
from model.sampling.sequential import decode
from model.weights import load_flow
from service.jobs import ModelInfo

log = logging.getLogger(__name__)
WARM_UP_SLICES = 8
PASS_FLOPS = {"cpu": 30 * 10**9, "cuda": 10 * 10**12}
"""Work of one parallel pass: about a second on two slow cores, some tens of milliseconds on a GPU."""


@dataclass(frozen=True)
class LoadedModel:
    """A flow on its device, with what the service needs to know of it."""

    info: ModelInfo
    flow: Flow
    device: torch.device

    def pass_rows(self, most: int) -> int:
        """Images in one parallel pass: up to ``most``, fewer for a large model, so that no pass takes long."""
        budget = PASS_FLOPS[self.device.type]
        return max(1, min(most, budget // self.flow.config.flops_per_image))

    @property
    def noise(self) -> NoiseProtocol:
        """Noise protocol of training and scoring."""
        return self.info.noise


def load_models(directory: Path, device: torch.device) -> dict[str, LoadedModel]:
    """Load and warm up every bundle in a directory, by name; raises a ``BundleError``."""
    models = {}
    for bundle in find_bundles(directory):
        start = time.monotonic()
        model = LoadedModel(ModelInfo.of(bundle), load_flow(bundle, device), device)
        warm_up(model)
        models[bundle.name] = model
        log.info("model %s is warm on %s after %.1f s", bundle.name, device, time.monotonic() - start)
    return models


def warm_up(model: LoadedModel) -> None:
    """Run a little of everything once, so that the first request does not pay for it.

    Raises ``RuntimeError`` when the model gives values that are not finite: it must not serve.
    """
    config = model.flow.config
    latent = latents([0], config.num_patches, config.patch_dim).to(model.device)
    label = 0 if config.num_classes else None
    options = SamplingDefaults(guidance_scale=1.0, attention_temperature=0.5)
    slices = [decode(model.flow, make_rows(latent, [label], [options]))]
    if model.noise.kind == "gaussian":
        slices.append(denoise(model.flow, latent, None, model.noise.std))
    for generator in slices:
        for _ in zip(range(WARM_UP_SLICES), generator, strict=False):
            pass
    with torch.no_grad():
        value = log_likelihood(model.flow, torch.zeros_like(latent))
    if not bool(torch.isfinite(value).all()):
        raise RuntimeError(f"model {model.info.name}: the log-likelihood of a grey image is not finite")
