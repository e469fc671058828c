"""The baseline of the sampling benchmark makes the same images as our decode."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import random_flow
from benchmarks.published import sample
from model.config import FlowConfig, SamplingDefaults
from model.flow import NO_CLASS
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sequential import decode

LABELS = [0, None, 2]


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        SamplingDefaults(),
        SamplingDefaults(guidance_scale=2),
        SamplingDefaults(guidance_scale=2, guidance_schedule="linear"),
        SamplingDefaults(guidance_scale=1, guidance_schedule="linear", attention_temperature=0.5),
    ],
    ids=["plain", "guided", "annealed", "tempered"],
)
def test_same_images(num_classes: int, volume_preserving: bool, options: SamplingDefaults) -> None:
    config = FlowConfig(
        image_size=8,
        channels=1,
        patch_size=2,
        width=16,
        num_blocks=3,
        layers_per_block=(2, 1, 2),
        num_classes=num_classes,
        volume_preserving=volume_preserving,
        head_dim=8,
    )
    flow = random_flow(config).double()
    for block in flow.blocks:
        # New positions and classes are almost zero; here they have to matter.
        block.position.mul_(30)
        if block.class_embedding is not None:
            block.class_embedding.mul_(30)
    flow.prior_variance.mul_(torch.linspace(0.5, 2, 16).double().unsqueeze(1) if volume_preserving else 1)
    latent_BTD = latents(range(3), 16, 4).double()
    labels = LABELS if num_classes else [None] * 3
    y_B = torch.tensor([NO_CLASS if y is None else y for y in labels])
    is_linear = options.guidance_schedule == "linear"
    theirs = sample(flow, latent_BTD, y_B, options.guidance_scale, is_linear, options.attention_temperature)
    ours = finish(decode(flow, make_rows(latent_BTD, labels, [options] * 3)))
    assert (ours - latent_BTD).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 1e-10
