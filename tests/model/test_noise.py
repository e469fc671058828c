"""Seeded noise: reproducible for ever, independent, and normal or uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import MAX_SEED
from model.noise import Stream, input_noise, latents

# Stored once; a seed gives these numbers on every machine and in every later version.
GOLDEN_LATENTS = {
    0: [-0.1400938, -0.7435261, -0.083889, -0.0600132, -0.0111177, 0.478787],
    42: [-1.4607806, -0.4378324, -1.8429635, 1.1392629, 0.477371, 0.805146],
    MAX_SEED: [0.5889035, -0.7914462, 0.473434, -0.8315063, -0.7476202, 0.8098656],
}
GOLDEN_GAUSSIAN = [[-1.4074039, 1.5169982], [0.609796, 1.3726902]]
GOLDEN_UNIFORM = [[0.8824669, 0.3690383], [0.676341, 0.1834655]]


@pytest.mark.parametrize("seed", GOLDEN_LATENTS)
def test_golden_latents(seed: int) -> None:
    ours = latents([seed], 2, 3).flatten()
    torch.testing.assert_close(ours, torch.tensor(GOLDEN_LATENTS[seed]), atol=1e-6, rtol=0)


def test_golden_input_noise() -> None:
    gaussian, uniform = input_noise("gaussian", 7, 2, (2,)), input_noise("uniform", 7, 2, (2,))
    torch.testing.assert_close(gaussian, torch.tensor(GOLDEN_GAUSSIAN), atol=1e-6, rtol=0)
    torch.testing.assert_close(uniform, torch.tensor(GOLDEN_UNIFORM), atol=1e-7, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=5), place=st.integers(0, 4))
def test_a_row_depends_on_its_seed_alone(seeds: list[int], place: int) -> None:
    place %= len(seeds)
    assert torch.equal(latents(seeds, 3, 5)[place], latents([seeds[place]], 3, 5)[0])


def test_draws_do_not_depend_on_their_number() -> None:
    many = input_noise("gaussian", 5, 6, (3, 4))
    assert many.shape == (6, 3, 4)
    assert torch.equal(many[:2], input_noise("gaussian", 5, 2, (3, 4)))
    assert torch.equal(many[4:], input_noise("gaussian", 5, 2, (3, 4), first=4))


def test_a_global_seed_changes_nothing() -> None:
    torch.manual_seed(1)
    before = latents([3], 2, 2)
    torch.manual_seed(2)
    np.random.default_rng(1).random()
    assert torch.equal(latents([3], 2, 2), before)


def test_latents_are_standard_normal() -> None:
    values = latents(range(20), 100, 50).double().flatten()
    count = len(values)
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs(values.pow(3).mean()) < 4 * (15 / count) ** 0.5
    assert abs(values.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert values.abs().max() < 6
    assert torch.isfinite(values).all()


def test_uniform_noise_is_uniform() -> None:
    values = input_noise("uniform", 3, 10, (10_000,)).double().flatten()
    count = len(values)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * (1 / 12 / count) ** 0.5
    histogram = torch.histc(values, 20, 0, 1)
    assert ((histogram - count / 20).square() / (count / 20)).sum() < 50


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def test_seeds_streams_and_draws_are_independent() -> None:
    shape = (100, 100)
    latent, neighbour = latents([0, 1], *shape)
    first, second = input_noise("gaussian", 0, 2, shape)
    values = [latent, neighbour, first, second, input_noise("gaussian", 1, 1, shape)[0]]
    for i, a in enumerate(values):
        for b in values[:i]:
            assert abs(correlation(a, b)) < 0.04
    assert Stream.LATENT != Stream.INPUT_NOISE


def test_halves_of_a_row_are_independent() -> None:
    """Box-Muller makes two numbers of each pair of bits."""
    row = latents([9], 1, 20_000).flatten()
    assert abs(correlation(row[:10_000], row[10_000:])) < 0.04
    assert abs(correlation(row[:10_000].abs(), row[10_000:].abs())) < 0.04


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed: got {seed}, allowed is an integer in \[0, {MAX_SEED}\]"):
        latents([seed], 1, 2)
    with pytest.raises(ValueError, match="seed: got"):
        input_noise("uniform", seed, 1, (2,))
