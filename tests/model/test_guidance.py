"""Every rule of guidance against scalar formulas written from the papers, and the laws it keeps."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import SCHEDULES, SamplingDefaults, SolverOptions
from model.flow import Flow
from model.guidance import guide_closed_form, guide_linear, patch_weights
from model.sampling.rows import finish
from model.sampling.sampler import Sampler
from tests.model.conftest import tiny_flow
from tests.model.sampling.cases import (
    PLAIN,
    Case,
    direct_decode,
    distance,
    guide_scalar,
    noise,
    patch_weight,
    sequential,
    tough_flow,
)

RULES = [("linear", "both"), ("linear", "scale"), ("linear", "shift"), ("closed_form", "both")]
WINDOWS = [None, (0, 1), (1, 3), (2, 3)]
LAW = settings(deadline=None, max_examples=50)
numbers = st.floats(-4, 4)
weights = st.sampled_from([0.0, 0.3, 1.0, 2.0, 7.5])


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@LAW
@given(alpha=numbers, mu=numbers, other_alpha=numbers, other_mu=numbers, w=weights)
def test_rules_are_the_formulas(alpha: float, mu: float, other_alpha: float, other_mu: float, w: float) -> None:
    values = (alpha, mu, other_alpha, other_mu)
    pairs = ((alpha, other_alpha), (mu, other_mu))
    linear = tuple(guide_linear(scalar(own), scalar(other), scalar(w)).item() for own, other in pairs)
    closed = tuple(value.item() for value in guide_closed_form(*map(scalar, values), scalar(w)))
    assert linear == pytest.approx(guide_scalar(SamplingDefaults(), w, *values), abs=1e-12)
    assert closed == pytest.approx(guide_scalar(SamplingDefaults(guidance_rule="closed_form"), w, *values), abs=1e-11)


@LAW
@given(alpha=numbers, mu=numbers, other_alpha=numbers, other_mu=numbers)
def test_a_weight_of_zero_is_exactly_no_guidance(alpha: float, mu: float, other_alpha: float, other_mu: float) -> None:
    for dtype in (torch.float32, torch.float64):
        a, m, b, n, w = (torch.tensor([v], dtype=dtype) for v in (alpha, mu, other_alpha, other_mu, 0.0))
        assert torch.equal(guide_linear(a, b, w), a)
        guided_alpha, guided_mu = guide_closed_form(a, m, b, n, w)
        assert torch.equal(guided_alpha, a)
        assert torch.equal(guided_mu, m)


@LAW
@given(alpha=numbers, mu=numbers, w=weights)
def test_where_both_passes_agree_guidance_changes_nothing(alpha: float, mu: float, w: float) -> None:
    a, m = scalar(alpha), scalar(mu)
    for got in (
        (guide_linear(a, a, scalar(w)), guide_linear(m, m, scalar(w))),
        guide_closed_form(a, m, a, m, scalar(w)),
    ):
        torch.testing.assert_close(torch.cat(got), torch.cat([a, m]), atol=1e-12, rtol=1e-12)


@LAW
@given(alpha=numbers, mu=numbers, gap=st.floats(0, 4), other_mu=numbers, w=weights)
def test_the_closed_form_is_the_product_of_gaussians(
    alpha: float, mu: float, gap: float, other_mu: float, w: float
) -> None:
    """p·(p/p_u)^w, where p is the narrower: precisions and precision-weighted means add (STARFlow)."""
    other_alpha = alpha + gap
    precision, other_precision = math.exp(-2 * alpha), math.exp(-2 * other_alpha)
    total = (1 + w) * precision - w * other_precision
    mean = ((1 + w) * precision * mu - w * other_precision * other_mu) / total
    guided_alpha, guided_mu = guide_closed_form(*map(scalar, (alpha, mu, other_alpha, other_mu, w)))
    assert guided_alpha.item() == pytest.approx(-math.log(total) / 2, abs=1e-9)
    assert guided_mu.item() == pytest.approx(mean, abs=1e-9)


@LAW
@given(alpha=numbers, mu=numbers, gap=st.floats(0, 4), other_mu=numbers, w=weights)
def test_a_wider_conditional_is_guided_as_if_as_wide(
    alpha: float, mu: float, gap: float, other_mu: float, w: float
) -> None:
    """The ratio of variances is bounded by one: then the deviation stays, and the mean is guided linearly."""
    guided_alpha, guided_mu = guide_closed_form(*map(scalar, (alpha, mu, alpha - gap, other_mu, w)))
    assert guided_alpha.item() == pytest.approx(alpha, abs=1e-9)
    assert guided_mu.item() == pytest.approx(mu + w * (mu - other_mu), abs=1e-9)


@LAW
@given(num_patches=st.integers(2, 30), w=st.floats(0.125, 10))
def test_weights_of_patches(num_patches: int, w: float) -> None:
    count = len(SCHEDULES)
    scale_B = torch.full((count,), w, dtype=torch.float64)
    weight_BT = patch_weights(scale_B, torch.arange(count), num_patches)
    for row, schedule in zip(weight_BT.tolist(), SCHEDULES, strict=True):
        options = SamplingDefaults(guidance_scale=w, guidance_schedule=schedule)  # type: ignore[arg-type]
        assert row == pytest.approx([patch_weight(options, k, num_patches) for k in range(num_patches)], abs=1e-12)
        assert row == sorted(row)
        assert row[-1] == pytest.approx(w)


def case_of(flow: Flow, options: list[SamplingDefaults], label: int | None = 1, seed: int = 4) -> Case:
    """The same latents and class under all options."""
    latent_BTD = noise(flow, [seed] * len(options))
    return Case(flow, latent_BTD, [label] * len(options), options, [1e-3] * len(options))


GRID = [
    SamplingDefaults(
        guidance_scale=1.5,
        guidance_rule=rule,
        guidance_target=target,
        guidance_schedule=schedule,
        guidance_window=window,
        attention_temperature=temperature,
    )
    for (rule, target), schedule, window, temperature in product(RULES, SCHEDULES, WINDOWS, (1.0, 0.6))
]


@pytest.mark.parametrize("label", [2, None])
def test_every_rule_schedule_and_window_is_the_published_loop(label: int | None) -> None:
    """All of them in one batch, against uncached passes and scalar arithmetic."""
    case = case_of(tiny_flow(image_size=6), GRID, label)
    images = sequential(case)
    assert distance(images, direct_decode(case)) < 1e-9
    # With a class or a temperature, every setting is its own image.
    different = [i for i, o in enumerate(GRID) if label is not None or o.attention_temperature != 1]
    apart = torch.cdist(images[different].flatten(1), images[different].flatten(1))
    assert (apart + torch.eye(len(different)) > 1e-5).all()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), volume_preserving=st.booleans(), index=st.integers(0, len(GRID) - 1))
def test_iterations_invert_the_same_map(seed: int, volume_preserving: bool, index: int) -> None:
    flow = tough_flow(2.0, seed, image_size=4, volume_preserving=volume_preserving)
    case = case_of(flow, [GRID[index]], seed=seed)
    iterated = finish(Sampler(flow).decode(case.rows(), SolverOptions(solver="jacobi")))
    assert distance(iterated.x_BTD, direct_decode(case)) < 1e-2
    assert iterated.backward_error_B.item() < 1e-3


@pytest.mark.parametrize(("rule", "target"), RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_weight_is_no_guidance_and_no_second_pass(rule: str, target: str, schedule: str) -> None:
    options = SamplingDefaults.from_dict(
        {
            "guidance_scale": 0.0,
            "guidance_rule": rule,
            "guidance_target": target,
            "guidance_schedule": schedule,
            "attention_temperature": 0.5,
        }
    )
    flow = tiny_flow(image_size=6)
    case = case_of(flow, [PLAIN, options])
    assert not len(case.rows().guided(0, flow.blocks[-1]))
    images = sequential(case)
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("window", [(0, 1), (1, 2), (1, 3), (2, 3)])
def test_blocks_outside_the_window_take_no_second_pass(window: tuple[int, int]) -> None:
    """Before the window the row is the unguided one; the blocks are counted from the noise."""
    flow = tiny_flow(image_size=6)
    case = case_of(flow, [PLAIN, SamplingDefaults(guidance_scale=2, guidance_window=window), PLAIN])
    for number in range(3):
        expected = [1] if window[0] <= number < window[1] else []
        assert case.rows().guided(number, flow.blocks[-1 - number]).tolist() == expected
    states = finish(Sampler(flow).decode(case.rows(), trajectory=True)).trajectory
    for number, x_BTD in enumerate(states):
        assert (distance(x_BTD[0], x_BTD[1]) < 1e-12) is (number < window[0])
        assert distance(x_BTD[0], x_BTD[2]) < 1e-12


def test_after_the_window_the_map_is_the_unguided_one() -> None:
    """The forward pass of a block without guidance gives back what it was decoded from."""
    flow = tiny_flow(image_size=6)
    case = case_of(flow, [SamplingDefaults(guidance_scale=2, guidance_window=(0, 1))])
    first, second, third = finish(Sampler(flow).decode(case.rows(), trajectory=True)).trajectory
    before = case.latent_BTD * flow.prior_variance.sqrt()
    near = [
        distance(block(x_BTD, case.label_tensor())[0], z_BTD) < 1e-11
        for block, x_BTD, z_BTD in zip(flow.blocks, (third, second, first), (second, first, before), strict=True)
    ]
    assert near == [True, True, False]


def test_a_whole_window_is_no_window() -> None:
    options = [SamplingDefaults(guidance_scale=2, guidance_window=window) for window in (None, (0, 3))]
    images = sequential(case_of(tiny_flow(image_size=6), options))
    assert distance(images[0], images[1]) < 1e-12


def test_temperature_acts_in_the_second_pass_alone() -> None:
    """Where only the scale is guided, the shift is that of the image's own pass, without a temperature."""
    flow = tiny_flow(image_size=6)
    tempered = SamplingDefaults(guidance_scale=1, attention_temperature=0.5, guidance_target="scale")
    case = case_of(flow, [tempered], label=None)
    block = flow.blocks[-1]
    states = finish(Sampler(flow).decode(case.rows(), trajectory=True)).trajectory
    x_BTD = block.in_block_order(states[0])
    z_BTD = block.in_block_order(case.latent_BTD * flow.prior_variance.sqrt())
    alpha, mu = block.affine(x_BTD, case.label_tensor())
    guided_alpha = torch.log(((x_BTD - mu) / z_BTD)[:, 1:])
    other_alpha, _ = block.affine(x_BTD, case.label_tensor(), torch.full((1, 1, 1, 1), 2.0).double())
    assert distance(guided_alpha, (2 * alpha - other_alpha)[:, 1:]) < 1e-8
