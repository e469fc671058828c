"""A tiny tuned bundle, for benchmarks that take one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.bundle import Bundle, BundleConfig
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults
from model.weights import update_bundle, write_bundle
from tests.model.conftest import tiny_flow
from tests.model.sampling.profiles import all_need, profile_of


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A tiny tuned model."""
    flow = tiny_flow(dtype=torch.float32)
    config: FlowConfig = flow.config
    described = BundleConfig(
        name="tiny", flow=config, noise=NoiseProtocol(kind="gaussian", std=0.1), class_names=("0", "1", "2")
    )
    sampling = SamplingDefaults(guidance_scale=1.0, denoise=True)
    written = write_bundle(tmp_path / "tiny", described, flow, sampling, card="")
    profile = profile_of([all_need(2, config)] * config.num_blocks)
    return update_bundle(written, convergence=replace(profile, gain=10.0))
