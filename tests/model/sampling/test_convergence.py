"""What tuning measures of a model: how many rows still need a k-th pass, and what a residual is worth."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import SamplingDefaults, SolverOptions
from model.flow import Block, Flow
from model.sampling.convergence import measure_convergence
from model.sampling.plan import MARGIN, BlockPlan, ConvergenceProfile, Plan, segment_lengths
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Sampler
from tests.model.sampling.cases import noise, tough_flow

GUIDANCE = SamplingDefaults(guidance_scale=1.0, guidance_schedule="linear")
TOLERANCE = 1e-3
TOUGH = {"toughness": 2.0, "layers_per_block": 1}
VARIANTS: list[dict[str, Any]] = [
    TOUGH,
    {**TOUGH, "volume_preserving": True, "num_classes": 0},
    {**TOUGH, "num_blocks": 2, "layers_per_block": (1, 3), "image_size": 6, "channels": 3},
]


def rows_of(flow: Flow, count: int = 16, first: int = 0, tolerance: float = TOLERANCE) -> Rows:
    labels: list[int | None] = [i % 3 if flow.config.num_classes else None for i in range(count)]
    return make_rows(noise(flow, range(first, first + count)), labels, [GUIDANCE] * count, tolerance)


def images_of(flow: Flow) -> tuple[Tensor, Tensor]:
    """Stand-ins for noised images, and their labels."""
    return 0.5 * noise(flow, range(100, 105)), torch.tensor([0, 1, 2, 0, 1])


def measure(flow: Flow, tolerance: float = TOLERANCE) -> ConvergenceProfile:
    x_BTD, y_B = images_of(flow)
    labels = y_B if flow.config.num_classes else None
    return finish(
        measure_convergence(Sampler(flow), rows_of(flow, tolerance=tolerance), x_BTD, labels, GUIDANCE, tolerance)
    )


@cache
def measured(index: int) -> tuple[Flow, ConvergenceProfile]:
    flow = tough_flow(**VARIANTS[index])
    return flow, measure(flow)


@pytest.mark.parametrize("index", range(len(VARIANTS)))
def test_shares_start_at_one_and_never_grow(index: int) -> None:
    flow, profile = measured(index)
    profile.check_fits(flow.config)
    assert len(profile.blocks) == flow.config.num_blocks
    for block in profile.blocks:
        assert list(map(int, block.active)) == segment_lengths(flow.config.num_patches)
        for segment, shares in block.active.items():
            assert 1 <= len(shares) <= int(segment)
            assert shares[0] == 1
            assert list(shares) == sorted(shares, reverse=True)
            assert shares[-1] > 0
    assert profile.num_images == 16
    assert profile.tolerance == TOLERANCE
    assert SamplingDefaults.from_dict(dict(profile.guidance)) == GUIDANCE


@pytest.mark.parametrize("index", range(len(VARIANTS)))
def test_gain_and_floor_are_positive_and_crm_is_a_share(index: int) -> None:
    _, profile = measured(index)
    assert 0 < profile.floor < 1e-6, "in float64 rounding leaves next to nothing"
    assert 0 < profile.gain < 100
    assert sum(block.crm for block in profile.blocks) == pytest.approx(1)
    assert all(block.crm > 0 and block.igm_latent > 0 and block.igm_zeros > 0 for block in profile.blocks)


@pytest.mark.parametrize("index", range(len(VARIANTS)))
@pytest.mark.parametrize("tolerance", [TOLERANCE, 1e-5])
def test_other_images_by_any_plan_of_the_profile_pass_their_tolerance(index: int, tolerance: float) -> None:
    """Few of them because they were done again: that is what the gain is measured for."""
    flow, profile = measured(index)
    rows = rows_of(flow, 16, first=500, tolerance=tolerance)
    for segment in segment_lengths(flow.config.num_patches):
        blocks = tuple(BlockPlan(segment=segment, guess=block.guess) for block in profile.blocks)
        plan = Plan(blocks=blocks, gain=profile.gain, floor=profile.floor)
        decoded = finish(Sampler(flow).decode(rows, plan=plan))
        assert (decoded.backward_error_B <= tolerance).all()
        assert decoded.redone_B.sum() <= 2
        if segment == flow.config.num_patches - 1 and tolerance == TOLERANCE:
            assert decoded.backward_error_B.max() > tolerance / 100, "nor is it much too careful"


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_shares_are_the_passes_of_a_sampler(volume_preserving: bool) -> None:
    """In a flow of one block, the mean passes of the profile are those that rows take."""
    flow = tough_flow(2.0, num_blocks=1, volume_preserving=volume_preserving)
    profile = measure(flow)
    for segment in (15, 8, 4):
        plan = Plan(blocks=(BlockPlan(segment=segment, guess=profile.blocks[0].guess),), gain=profile.gain)
        decoded = finish(Sampler(flow).decode(rows_of(flow), SolverOptions(certify=False), plan=plan))
        passes = decoded.passes_B.double().mean()
        assert float(passes) / math.ceil(15 / segment) == pytest.approx(profile.blocks[0].passes[segment], abs=1e-3)


def test_a_smaller_tolerance_takes_more_passes() -> None:
    flow = tough_flow(2.0, layers_per_block=1)
    loose, tight = measure(flow, 1e-2), measure(flow, 1e-5)
    for a, b in zip(loose.blocks, tight.blocks, strict=True):
        assert all(a.passes[segment] <= b.passes[segment] for segment in a.passes)
        assert a.passes[15] + 1 < b.passes[15]


@pytest.mark.parametrize("tough", [0, 1, 2])
def test_a_tough_block_has_the_largest_share_and_takes_most_passes(tough: int) -> None:
    """Blocks are listed in the order of sampling, which is not that of the flow."""
    flow = tough_flow(0.5, layers_per_block=1)
    flow.blocks[2 - tough].proj_out.weight.mul_(5)
    blocks = measure(flow).blocks
    assert max(range(3), key=lambda number: blocks[number].crm) == tough
    assert max(range(3), key=lambda number: blocks[number].passes[15]) == tough


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


def block_inputs(flow: Flow) -> list[tuple[Block, Tensor, Tensor, Tensor]]:
    """In the order of sampling each block with its x, z and α on images, in image order."""
    x_BTD, y_B = images_of(flow)
    states = [x_BTD]
    steps = flow.trace(x_BTD, y_B)
    states += [z_BTD for z_BTD, _ in steps]
    return [(flow.blocks[i], states[i], states[i + 1], steps[i][1]) for i in (2, 1, 0)]


def test_ranking_and_guess_metrics_are_the_published_formulas() -> None:
    """2505.12849: CRM ‖mean(e^{−α}⊙x)‖₂·‖W_α‖₂ + ‖W_μ‖₂ and IGM ‖mean(exp(α(x⁰))z + μ(x⁰) − x)‖₂."""
    flow, profile = measured(0)
    _, y_B = images_of(flow)
    values = flow.config.patch_dim
    crm = []
    for (block, x_BTD, z_BTD, alpha_BTD), found in zip(block_inputs(flow), profile.blocks, strict=True):
        weight = block.proj_out.weight
        moved = (torch.exp(-alpha_BTD) * x_BTD).mean(dim=0)
        crm.append(spectral(moved) * spectral(weight[:values]) + spectral(weight[values:]))
        x_BTD, z_BTD = block.in_block_order(x_BTD), block.in_block_order(z_BTD)
        zeros_BTD = torch.zeros_like(z_BTD)
        zeros_BTD[:, 0] = z_BTD[:, 0]
        for start_BTD, igm in ((z_BTD, found.igm_latent), (zeros_BTD, found.igm_zeros)):
            alpha, mu = block.affine(start_BTD, y_B)
            assert igm == pytest.approx(spectral((alpha.exp() * z_BTD + mu - x_BTD).mean(dim=0)))
    assert [block.crm for block in profile.blocks] == pytest.approx([value / sum(crm) for value in crm])


def test_the_floor_is_what_rounding_leaves_of_sequential_decoding() -> None:
    flow = tough_flow(2.0, dtype=torch.float32, layers_per_block=1)
    x_BTD, y_B = images_of(flow)
    rows = rows_of(flow)
    single = make_rows(rows.latent_BTD.float(), [i % 3 for i in range(16)], [GUIDANCE] * 16, TOLERANCE)
    profile = finish(measure_convergence(Sampler(flow), single, x_BTD.float(), y_B, GUIDANCE, TOLERANCE))
    exact = finish(Sampler(flow).decode(single, SolverOptions(solver="sequential", certify=True)))
    assert profile.floor == pytest.approx(float(exact.backward_error_B.max()))
    assert 1e-8 < profile.floor < 1e-3


def test_it_says_what_comes_next() -> None:
    flow = tough_flow(1.0, layers_per_block=1)
    x_BTD, y_B = images_of(flow)
    steps = list(measure_convergence(Sampler(flow), rows_of(flow), x_BTD, y_B, GUIDANCE, TOLERANCE))
    assert steps[0] == "sequential decoding"
    assert sum(step.startswith("block ") for step in steps) == 3 * 3
    assert steps[-1] == "block 3 of 3, segments of 4"


def test_iterations_without_an_error_still_have_a_gain() -> None:
    """Blocks that depend on nothing before converge at once; their gain is small but positive."""
    flow = tough_flow(0.0, layers_per_block=1)
    profile = measure(flow)
    assert profile.gain > 0
    assert all(shares == (1.0,) or len(shares) <= 2 for block in profile.blocks for shares in block.active.values())
    assert Plan.jacobi(flow.config, profile).residual(TOLERANCE) >= TOLERANCE / (2 * MARGIN)


def test_a_model_that_is_not_finite_cannot_be_tuned() -> None:
    flow = tough_flow(1.0, layers_per_block=1)
    flow.blocks[0].proj_out.bias.fill_(1e4)
    with pytest.raises(ValueError, match="not finite; lower the guidance scale"):
        measure(flow)
