"""Samples that are no images are counted: those that are not finite, and values outside of the pixels' range."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import NoiseProtocol, SamplingDefaults
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from tests.model.conftest import tiny_flow
from training import soundness
from training.soundness import MARGIN, sample_soundness

GAUSSIAN, PLAIN = NoiseProtocol(kind="gaussian", std=0.1), SamplingDefaults(denoise=False)


@pytest.mark.parametrize("rows", [3, 64])
def test_it_counts_what_drawing_them_shows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Some rows overflow where their values are beyond what their neighbours are; batches don't matter."""
    monkeypatch.setattr(soundness, "ROWS_PER_BATCH", rows)
    flow = tiny_flow(dtype=torch.float32)
    with torch.no_grad():
        for block in flow.blocks:
            block.proj_out.weight.mul_(5)
    config, count = flow.config, 20
    labels = [seed % config.num_classes for seed in range(count)]
    u_BTD = latents(range(count), config.num_patches, config.patch_dim)
    x_BTD = finish(Sampler(flow).decode(make_rows(u_BTD, labels, [PLAIN] * count))).x_BTD
    finite_B = x_BTD.isfinite().all(dim=(1, 2))
    assert 0 < int(finite_B.sum()) < count, "the test's flow must make some of each kind"
    seen: list[int] = []
    found = sample_soundness(flow, GAUSSIAN, PLAIN, count, advance=seen.append)
    assert (found.num_samples, found.not_finite) == (count, count - int(finite_B.sum()))
    outside = float((x_BTD[finite_B].abs() > 1 + MARGIN).double().mean())
    assert 0 < outside < 1
    assert found.outside == pytest.approx(outside, abs=0.01)
    assert sum(seen) == count


def test_samples_of_which_none_is_finite() -> None:
    flow = tiny_flow(dtype=torch.float32)
    with torch.no_grad():
        flow.prior_variance.fill_(math.inf)
    found = sample_soundness(flow, GAUSSIAN, PLAIN, 5)
    assert (found.num_samples, found.not_finite) == (5, 5)
    assert math.isnan(found.outside)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_sound_model(num_classes: int) -> None:
    """As recommended, with denoising; a model without classes too."""
    flow = tiny_flow(dtype=torch.float32, num_classes=num_classes)
    found = sample_soundness(flow, GAUSSIAN, SamplingDefaults(denoise=True), 4)
    assert (found.num_samples, found.not_finite) == (4, 0)
    assert 0 <= found.outside <= 1
