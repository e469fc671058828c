"""Bayes accuracy: what is counted, and the interval around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import FlowConfig, NoiseProtocol
from model.flow import Flow
from model.likelihood import add_noise, log_likelihood
from model.noise import input_noise
from training.accuracy import Z_95, Accuracy, recognize_images, wilson_interval
from training.data import Images

GAUSSIAN, UNIFORM = NoiseProtocol(kind="gaussian", std=0.1), NoiseProtocol(kind="uniform")
EVEN = (0.5, 0.5)
CONFIG = FlowConfig(
    image_size=8, channels=1, patch_size=4, width=16, num_blocks=2, layers_per_block=1, head_dim=8, num_classes=2
)


@pytest.fixture
def flow() -> Flow:
    """A flow whose classes matter."""
    torch.manual_seed(1)
    flow = Flow(CONFIG).eval().requires_grad_(False)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_where_the_score_test_does_not_reject(case: tuple[int, int]) -> None:
    """Its ends p solve |share − p| = z √(p (1 − p) / n), which is how Wilson defines them."""
    successes, count = case
    share = successes / count
    low, high = wilson_interval(successes, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        # Squared: at the ends 0 and 1 a root would magnify rounding.
        assert (share - end) ** 2 == pytest.approx(Z_95**2 * end * (1 - end) / count, abs=1e-12)


def test_the_interval_mirrors_and_shrinks() -> None:
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    widths = [high - low for low, high in (wilson_interval(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    # A published example: 81 of 263 (Newcombe, Statistics in Medicine 1998, table I).
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_accuracy_is_the_share_of_the_recognized() -> None:
    accuracy = Accuracy(correct=np.array([True, True, False, True]), prior=EVEN)
    assert accuracy.value == 0.75
    assert accuracy.interval == wilson_interval(3, 4)


@pytest.mark.parametrize("noise", [GAUSSIAN, UNIFORM])
@pytest.mark.parametrize("prior", [EVEN, (0.9, 0.1)])
def test_each_image_is_classified_by_the_definition(
    flow: Flow, images: Images, noise: NoiseProtocol, prior: tuple[float, float]
) -> None:
    few, seen = images.part(0, 6), list[int]()
    found = recognize_images(flow, few, noise, prior, draws=3, seed=40, batch_size=4, advance=seen.append)
    assert seen == [8, 4]
    assert found.prior == prior
    for i in range(6):
        pixels = torch.from_numpy(few.pixels[i : i + 1])
        odds = []
        for draw in input_noise(noise.kind, 40 + i, 3, (1, 8, 8)):
            x_BTD = flow.patchify(add_noise(pixels, noise, draw))
            odds.append([float(log_likelihood(flow, x_BTD, torch.tensor([y]))) for y in (0, 1)])
        nats = np.array(odds)
        if noise.kind == "uniform":
            nats = np.logaddexp.reduce(nats, axis=0, keepdims=True) - math.log(3)
        # The mean over the copies of p(1 | x).
        posterior = (1 / (1 + np.exp(nats[:, 0] - nats[:, 1]) * prior[0] / prior[1])).mean()
        assert found.correct[i] == ((posterior > 0.5) == bool(few.labels[i]))


def test_it_does_not_depend_on_the_batch(flow: Flow, images: Images) -> None:
    results = [recognize_images(flow, images, GAUSSIAN, EVEN, batch_size=size).correct for size in (1, 7, 128)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_an_overwhelming_prior_decides(images: Images) -> None:
    flow = Flow(CONFIG)
    found = recognize_images(flow, images, GAUSSIAN, (0.25, 0.75))
    # A new flow is the same map for every class, so that only the prior is left.
    assert np.array_equal(found.correct, images.labels == 1)


def test_what_is_not_finite_is_not_recognized(flow: Flow, make_images: Callable[..., Images]) -> None:
    images = make_images(6)
    embedding = flow.blocks[0].class_embedding
    assert embedding is not None
    embedding[0] = torch.nan
    assert not recognize_images(flow, replace(images, labels=np.zeros(6, np.int64)), GAUSSIAN, EVEN).correct.any()
