"""Small flows with weights that do something, for the laws of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import FlowConfig
from model.flow import Flow

TINY = {
    "image_size": 8,
    "channels": 1,
    "patch_size": 2,
    "width": 16,
    "num_blocks": 3,
    "layers_per_block": 2,
    "num_classes": 3,
    "head_dim": 8,
    "expansion": 2,
}


def tiny_flow(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Flow:
    """A flow whose every parameter is random, so that none of them can be forgotten unnoticed."""
    config = FlowConfig.from_dict({**TINY, **changes})
    flow = Flow(config)
    generator = torch.Generator().manual_seed(seed)
    for name, value in flow.named_parameters():
        spread = 0.03 if "proj_out" in name else 0.2
        noise = spread * torch.randn(value.shape, generator=generator)
        value.data = noise + (1 if "norm.weight" in name else 0)
    if config.volume_preserving:
        flow.prior_variance = 0.5 + torch.rand(flow.prior_variance.shape, generator=generator)
    return flow.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def make_flow() -> Callable[..., Flow]:
    """Factory of tiny flows: keyword arguments change the configuration."""
    return tiny_flow


@pytest.fixture
def reference() -> Path:
    """Directory of the conformance vectors."""
    return Path(__file__).parents[1] / "reference"
