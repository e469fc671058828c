"""A row is what it is alone: whatever its batch-mates are, when they converge, and when they leave.

In float64 within 1e-10 (matrix products of other sizes round otherwise), with the very same number of passes;
in float32 within 2e-5.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import SolverOptions
from model.flow import Flow
from model.sampling.plan import BlockPlan, Plan
from model.sampling.sampler import Decoded, Redone, Sampler, Sampling
from tests.model.sampling.cases import (
    ROUNDING,
    Case,
    case_of,
    cases,
    decode,
    distance,
    mixed_options,
    plans,
    run_dropping,
    sequential,
    tough_flow,
    whole_plan,
)

SMALL = {"num_blocks": 2, "layers_per_block": 1, "image_size": 6}
"""Nine patches."""
FLOW = tough_flow(2.0, **SMALL)
CARELESS = 1e-4
"""A gain so small that rows stop far above their tolerance, and are done again."""
MIXED_PLAN = (BlockPlan(segment=3), BlockPlan(segment=8, guess="zeros"))


def part(case: Case, index: list[int]) -> Case:
    """The rows of a case at ``index``."""
    return replace(
        case,
        latent_BTD=case.latent_BTD[index],
        labels=[case.labels[i] for i in index],
        options=[case.options[i] for i in index],
        tolerances=[case.tolerances[i] for i in index],
    )


def assert_same(got: Decoded, expected: Decoded, rounding: float = ROUNDING) -> None:
    """Everything that is returned of some rows, row by row."""
    assert distance(got.x_BTD, expected.x_BTD) < rounding
    assert len(got.trajectory) == len(expected.trajectory)
    for ours, theirs in zip(got.trajectory, expected.trajectory, strict=True):
        assert distance(ours, theirs) < rounding
    assert got.redone_B.tolist() == expected.redone_B.tolist()
    assert got.passes_B.tolist() == expected.passes_B.tolist()
    torch.testing.assert_close(
        got.backward_error_B, expected.backward_error_B, atol=rounding, rtol=1e-5, equal_nan=True
    )


@settings(deadline=None, max_examples=15)
@given(data=st.data(), case=cases(tolerances=[1e-2, 1e-6], most_rows=6))
def test_any_rows_of_a_batch_are_as_alone(data: st.DataObject, case: Case) -> None:
    """Mates converge sooner or later, are guided or not; some rows are done again, others are not."""
    plan = data.draw(plans(case.flow, data.draw(st.sampled_from([4.0, CARELESS]))))
    together = decode(case, plan, rows_per_pass=data.draw(st.integers(1, 7)))
    row = data.draw(st.integers(0, len(case.labels) - 1))
    assert_same(together.select(torch.tensor([row])), decode(part(case, [row]), plan))
    order = data.draw(st.permutations(range(len(case.labels))))
    assert_same(together.select(torch.tensor(order)), decode(part(case, order), plan))


@pytest.mark.parametrize("plan", [Plan(blocks=MIXED_PLAN), whole_plan(FLOW), Plan.sequential(FLOW.config)])
def test_rows_of_float32_are_as_alone(plan: Plan) -> None:
    flow = tough_flow(2.0, **SMALL, dtype=torch.float32)
    case = case_of(flow, mixed_options(2) * 2, 1e-3, dtype=torch.float32)
    together = decode(case, plan)
    # A residual may round to the other side of where a row stops; then it differs by its tolerance.
    for row in range(0, 16, 3):
        alone = decode(part(case, [row]), plan)
        assert alone.passes_B[0] == together.passes_B[row]
        assert distance(alone.x_BTD, together.x_BTD[row : row + 1]) < 2e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_mates_that_are_not_finite_change_nothing(bad: float, place: int) -> None:
    plan = Plan(blocks=MIXED_PLAN)
    case = case_of(FLOW, mixed_options(2), [1e-2, 1e-6] * 4)
    mates = [i for i in range(8) if i != place]
    spoilt = replace(case, latent_BTD=case.latent_BTD.clone())
    spoilt.latent_BTD[place, 4] = bad
    assert_same(decode(spoilt, plan).select(torch.tensor(mates)), decode(part(case, mates), plan))


def sampling(case: Case, plan: Plan, options: SolverOptions) -> Sampling:
    # Two rows in a parallel pass: rows leave before their pass, within it, and after it.
    return Sampler(case.flow, rows_per_pass=2).decode(case.rows(), options, plan=plan, trajectory=True)


def count_slices(case: Case, plan: Plan, options: SolverOptions) -> int:
    return sum(1 for _ in sampling(case, plan, options))


def spread(num_slices: int, count: int) -> list[int]:
    """Some numbers of slices, the first and the last among them."""
    return sorted({round(1 + i * (num_slices - 1) / (count - 1)) for i in range(count)})


def some_miss(flow: Flow) -> Case:
    """Every other row misses its tolerance where a plan is careless."""
    return case_of(flow, mixed_options(len(flow.blocks)), [1e-6, 5.0] * 4)


STAGES = {
    "sequential": (Plan.sequential(FLOW.config), SolverOptions(certify=True)),
    "whole": (whole_plan(FLOW), SolverOptions()),
    "mixed": (Plan(blocks=MIXED_PLAN), SolverOptions()),
    "done again": (Plan(blocks=MIXED_PLAN, gain=CARELESS), SolverOptions()),
    "only reported": (Plan(blocks=MIXED_PLAN, gain=CARELESS), SolverOptions(certify=False)),
}


def test_the_stages_are_what_they_are_called() -> None:
    redone = {name: decode(some_miss(FLOW), *stage).redone_B.tolist() for name, stage in STAGES.items()}
    assert redone.pop("done again") == [Redone.TOLERANCE, Redone.NO] * 4
    assert all(rows == [Redone.NO] * 8 for rows in redone.values())


@settings(deadline=None, max_examples=6)
@pytest.mark.parametrize("stage", STAGES)
@given(data=st.data())
def test_rows_may_leave_after_any_slice(data: st.DataObject, stage: str) -> None:
    """In any order, from any part of the work: what stays is as if nobody had left, and still in line."""
    case = some_miss(FLOW)
    num_slices = count_slices(case, *STAGES[stage])
    drops, left = {}, 8
    for number in sorted(data.draw(st.sets(st.integers(1, num_slices), min_size=1, max_size=3))):
        order = data.draw(st.permutations(range(left)))
        left = data.draw(st.integers(1, left))
        drops[number] = order[:left]
    got, kept = run_dropping(sampling(case, *STAGES[stage]), 8, drops)
    assert_same(got, decode(case, *STAGES[stage]).select(torch.tensor(kept)))


@pytest.mark.parametrize("stage", STAGES)
def test_rows_may_leave_all_along(stage: str) -> None:
    """The same rows, after slices spread over all the work."""
    case = some_miss(FLOW)
    expected = decode(case, *STAGES[stage]).select(torch.tensor([6, 1, 0, 3]))
    for number in spread(count_slices(case, *STAGES[stage]), 10):
        got, kept = run_dropping(sampling(case, *STAGES[stage]), 8, {number: [6, 1, 0, 3]})
        assert kept == [6, 1, 0, 3]
        assert_same(got, expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_all_rows_may_leave(stage: str, share: float) -> None:
    case = some_miss(FLOW)
    number = 1 + round(share * (count_slices(case, *STAGES[stage]) - 1))
    got, kept = run_dropping(sampling(case, *STAGES[stage]), 8, {number: []})
    assert kept == []
    assert got.x_BTD.shape == (0, 9, 4)
    assert (len(got.backward_error_B), len(got.redone_B), len(got.passes_B)) == (0, 0, 0)


@pytest.mark.parametrize("when", [1, 9, 16, 17, 19])
def test_all_rows_that_are_done_again_may_leave(when: int) -> None:
    """Those that were good from the start are returned."""
    case, stage = some_miss(FLOW), STAGES["done again"]
    # The last slices are sequential decoding, 2 · 8 of them, and a certificate of 2 passes through 2 blocks.
    number = count_slices(case, *stage) - 20 + when
    got, kept = run_dropping(sampling(case, *stage), 8, {number: [3, 1]})
    assert kept == [3, 1]
    assert_same(got, decode(case, *stage).select(torch.tensor([3, 1])))


DRAFT = (Plan(blocks=MIXED_PLAN), SolverOptions(precision="bf16"))


def draft_case() -> Case:
    return case_of(tough_flow(1.0, **SMALL, dtype=torch.float32), mixed_options(2), 1e-3, dtype=torch.float32)


def test_all_rows_may_leave_a_draft_or_its_polish() -> None:
    for number in spread(count_slices(draft_case(), *DRAFT), 6):
        got, _ = run_dropping(sampling(draft_case(), *DRAFT), 8, {number: []})
        assert got.x_BTD.shape == (0, 9, 4)


def test_rows_that_leave_a_draft_or_its_polish_leave_no_trace() -> None:
    exact, whole = sequential(draft_case()), decode(draft_case(), *DRAFT)
    for number in spread(count_slices(draft_case(), *DRAFT), 6):
        got, kept = run_dropping(sampling(draft_case(), *DRAFT), 8, {number: [5, 2, 3]})
        assert kept == [5, 2, 3]
        assert distance(got.x_BTD, exact[kept]) < 1e-3
        assert torch.equal(got.trajectory[-1], got.x_BTD)
        assert not got.redone_B.any()
        # Their polishing started from their own drafts: from others' it would take about twice as many passes.
        assert (got.passes_B - whole.passes_B[kept]).abs().max() <= 1
