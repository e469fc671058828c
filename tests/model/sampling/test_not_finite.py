"""Rows that are not finite: done again alone, counted, and never the concern of their mates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.config import SolverOptions
from model.flow import Flow
from model.sampling.certificate import backward_error
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import finish
from model.sampling.sampler import Redone
from tests.model.sampling.cases import (
    PLAIN,
    ROUNDING,
    Case,
    case_of,
    decode,
    distance,
    mixed_options,
    sequential,
    tough_flow,
    whole_plan,
)

BAD = 3
"""The row that overflows."""


def explosive_flow() -> Flow:
    """A flow of which the block next to the noise overflows where its second patch keeps its latent.

    There unit 0 of the transformer carries the first value of a patch and unit 1 marks the first patch, both
    untouched by class and layers. α of all values is 300 times the first value of the patch before, and −8 more for
    the first value after the first patch. So a patch that is (3, …) in the latents is (0.001, …) in the image, and
    by the one the next patch has α = 900, by the other 0.3.
    """
    flow = tough_flow(1.0)
    block = flow.blocks[-1]
    assert not block.reverse
    block.proj_in.weight[:2], block.proj_in.bias[:2] = 0, 0
    block.proj_in.weight[0, 0] = 1
    block.position[:, :2] = 0
    block.position[0, 1] = 1
    assert block.class_embedding is not None
    block.class_embedding[:, :2] = 0
    for layer in block.layers:
        for linear in (layer.attention.out, layer.mlp.down):
            linear.weight[:2], linear.bias[:2] = 0, 0
    values = flow.config.patch_dim
    # The shift of the first value is zero.
    block.proj_out.weight[: values + 1], block.proj_out.bias[: values + 1] = 0, 0
    block.proj_out.weight[:values, 0] = 300
    block.proj_out.weight[0, 1] = -8
    return flow


def explosive_case(tolerances: list[float] | float = 1e-4) -> Case:
    case = case_of(explosive_flow(), mixed_options(3), tolerances)
    case.latent_BTD[:, :, 0] = 0
    case.latent_BTD[BAD, 1, 0] = 3
    return case


def without(case: Case, row: int) -> Case:
    others = [i for i in range(len(case.labels)) if i != row]
    return replace(
        case,
        latent_BTD=case.latent_BTD[others],
        labels=[case.labels[i] for i in others],
        options=[case.options[i] for i in others],
        tolerances=[case.tolerances[i] for i in others],
    )


GAIN = 1e5
"""The explosive block makes much of a small residual of the others."""
PLANS = [
    whole_plan(explosive_flow(), GAIN),
    Plan(blocks=(BlockPlan(segment=4), BlockPlan(segment=15, guess="zeros"), BlockPlan(segment=1)), gain=GAIN),
    Plan(blocks=(BlockPlan(segment=15), BlockPlan(segment=1), BlockPlan(segment=1)), gain=GAIN),
]


def test_the_flow_overflows_in_iterations_and_not_in_sequence() -> None:
    case = explosive_case()
    assert torch.isfinite(sequential(case)).all()
    only_first = PLANS[2]
    assert decode(case, only_first).redone_B.tolist() == [2 if row == BAD else 0 for row in range(8)]
    # From zeros instead of from the latents, the iterations are fine.
    from_zeros = replace(only_first, blocks=(BlockPlan(segment=15, guess="zeros"), *only_first.blocks[1:]))
    assert not decode(case, from_zeros).redone_B.any()


@pytest.mark.parametrize("plan", PLANS, ids=["whole", "mixed", "first"])
@pytest.mark.parametrize("certify", [None, False])
def test_a_row_that_overflows_in_iterations_is_done_again_alone(plan: Plan, certify: bool | None) -> None:
    case = explosive_case()
    decoded = decode(case, plan, SolverOptions(certify=certify))
    assert decoded.redone_B.tolist() == [Redone.NOT_FINITE if row == BAD else Redone.NO for row in range(8)]
    assert distance(decoded.x_BTD[BAD], sequential(case)[BAD]) < ROUNDING
    assert all(torch.isfinite(x_BTD).all() for x_BTD in decoded.trajectory)
    assert distance(decoded.trajectory[-1], decoded.x_BTD) == 0
    assert decoded.backward_error_B[BAD] < ROUNDING
    assert decoded.passes_B[BAD] > 3 * 15, "passes in vain count"
    mates = [row for row in range(8) if row != BAD]
    alone = decode(without(case, BAD), plan, SolverOptions(certify=certify))
    assert distance(decoded.x_BTD[mates], alone.x_BTD) < ROUNDING
    assert decoded.passes_B[mates].tolist() == alone.passes_B.tolist()
    for ours, theirs in zip(decoded.trajectory, alone.trajectory, strict=True):
        assert distance(ours[mates], theirs) < ROUNDING


def test_a_row_that_is_not_finite_stops_at_once() -> None:
    """Its mates need more passes than it was given."""
    case = explosive_case(1e-8)
    decoded = decode(case, PLANS[0])
    vain = int(decoded.passes_B[BAD]) - 3 * 15
    assert vain == 1 + 1 + 1, "one pass of each block"
    assert int(decoded.passes_B[[0, 1, 2]].min()) > 3


def test_a_row_may_miss_its_tolerance_beside_one_that_is_not_finite() -> None:
    case = explosive_case([0.0 if row < 2 else 1e-4 for row in range(8)])
    decoded = decode(case, PLANS[0])
    missed, spoilt, no = Redone.TOLERANCE, Redone.NOT_FINITE, Redone.NO
    assert decoded.redone_B.tolist() == [missed, missed, no, spoilt, no, no, no, no]
    assert distance(decoded.x_BTD[[0, 1, BAD]], sequential(case)[[0, 1, BAD]]) < ROUNDING


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize(("patch", "certify"), [(0, None), (7, False), (15, None)])
def test_a_row_that_is_never_finite_is_returned_as_it_is(bad: float, patch: int, certify: bool | None) -> None:
    flow = tough_flow(1.0)
    case = case_of(flow, mixed_options(3))
    spoilt = replace(case, latent_BTD=case.latent_BTD.clone())
    spoilt.latent_BTD[BAD, patch, 1] = bad
    decoded = decode(spoilt, PLANS[0], SolverOptions(certify=certify))
    exact = sequential(spoilt)
    assert not torch.isfinite(exact[BAD]).all()
    assert torch.equal(torch.isfinite(decoded.x_BTD), torch.isfinite(exact))
    assert decoded.backward_error_B[BAD] == math.inf
    assert decoded.redone_B.tolist() == [Redone.NOT_FINITE if row == BAD else Redone.NO for row in range(8)]
    mates = [row for row in range(8) if row != BAD]
    assert torch.isfinite(decoded.x_BTD[mates]).all()
    assert torch.isfinite(decoded.backward_error_B[mates]).all()


def test_a_backward_error_that_overflows_is_infinite() -> None:
    """A finite sample that is the image of infinite noise."""
    flow = tough_flow(1.0, num_blocks=1)
    block = flow.blocks[0]
    block.proj_out.weight.zero_()
    block.proj_out.bias[: flow.config.patch_dim] = -800
    case = case_of(flow, [PLAIN, PLAIN])
    error_B = finish(backward_error(flow, case.rows(), torch.ones_like(case.latent_BTD), 8))
    assert error_B.tolist() == [math.inf, math.inf]
