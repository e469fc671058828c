"""Jacobi iteration is sequential decoding by other means: the same image, in at most as many passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import SolverOptions
from model.sampling.kernel import FlowKernel, Memory
from model.sampling.plan import BlockPlan, Guess, Plan
from model.sampling.solver import BlockSolver
from tests.model.sampling.cases import (
    ROUNDING,
    Case,
    case_of,
    cases,
    decode,
    direct_backward_error,
    distance,
    mixed_options,
    plans,
    sequential,
    tough_flow,
)

ONLY_REPORT = SolverOptions(certify=False)
"""Nothing is done again, so that what the iterations leave can be seen."""


@settings(deadline=None, max_examples=25)
@given(data=st.data(), case=cases(tolerances=[0.0]))
def test_iterated_to_the_end_every_plan_gives_the_sequential_images(data: st.DataObject, case: Case) -> None:
    plan = data.draw(plans(case.flow))
    decoded = decode(case, plan, ONLY_REPORT)
    assert distance(decoded.x_BTD, sequential(case)) < ROUNDING
    assert not decoded.redone_B.any()


@settings(deadline=None, max_examples=25)
@given(data=st.data(), case=cases(tolerances=[1e-2, 1e-5, 1e-8]))
def test_rows_stop_within_their_own_tolerance(data: st.DataObject, case: Case) -> None:
    plan = data.draw(plans(case.flow))
    decoded = decode(case, plan)
    tolerance_B = torch.tensor(case.tolerances, dtype=torch.float64)
    assert (direct_backward_error(case, decoded.x_BTD) <= tolerance_B + ROUNDING).all()
    # These flows amplify an error of the noise by less than that.
    assert ((decoded.x_BTD - sequential(case)).abs().amax(dim=(1, 2)) <= 30 * tolerance_B).all()


@pytest.mark.parametrize("variant", [{}, {"num_classes": 0}, {"volume_preserving": True}], ids=str)
@pytest.mark.parametrize("guess", ["latent", "zeros"])
def test_a_smaller_tolerance_takes_more_passes_and_leaves_less(variant: dict[str, Any], guess: Guess) -> None:
    """The iterations stop early, and not too early: the laws above do not hold because rows were done again."""
    flow = tough_flow(2.0, **variant)
    plan = Plan(blocks=(BlockPlan(segment=15, guess=guess),) * 3)
    passes, errors = [], []
    for tolerance in (1e-2, 1e-5, 1e-8):
        case = case_of(flow, mixed_options(3), tolerance)
        decoded = decode(case, plan, ONLY_REPORT)
        assert not decoded.redone_B.any()
        passes.append(int(decoded.passes_B.sum()))
        errors.append(float(decoded.backward_error_B.max()))
        assert ROUNDING / 100 < errors[-1] < tolerance
    assert passes[0] < passes[1] < passes[2] < len(case.options) * 3 * 15
    assert errors[0] > errors[1] > errors[2]


def block_solver(
    case: Case, number: int, segment: int, residual: float | Tensor = 0.0, guess_TBD: Tensor | None = None
) -> BlockSolver:
    """Solver of one block, whose latents are those of the whole flow."""
    kernel, rows = FlowKernel(case.flow).blocks[number], case.rows()
    z_TBD = case.latent_BTD.transpose(0, 1).contiguous()
    network_rows = len(rows) + len(rows.guided(number, kernel.block))
    return BlockSolver(
        kernel,
        rows,
        number,
        z_TBD,
        Memory.allocate(case.flow.config, network_rows, kernel.dtype, z_TBD.device),
        segment=segment,
        residual_B=torch.zeros_like(rows.tolerance_B) + residual,
        guess_TBD=guess_TBD,
    )


def iterates(solver: BlockSolver) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """After every pass how many patches are said to be exact besides the first, and the iterate; the result."""
    slices, seen = solver.run(), []
    while True:
        try:
            share = next(slices)
        except StopIteration as stop:
            return seen, stop.value
        seen.append((round(share * (len(solver.z_TBD) - 1)), solver._x_TBD.clone()))


@settings(deadline=None, max_examples=20)
@given(data=st.data(), case=cases(tolerances=[1e-3]))
def test_after_k_passes_the_first_k_patches_of_a_segment_are_exact(data: st.DataObject, case: Case) -> None:
    last = case.flow.config.num_patches - 1
    number = data.draw(st.integers(0, len(case.flow.blocks) - 1))
    segment = data.draw(st.integers(1, last + 1))
    zeros = torch.zeros_like(case.latent_BTD.transpose(0, 1))
    guess_TBD = data.draw(st.sampled_from([None, zeros]))
    _, exact_TBD = iterates(block_solver(case, number, segment=1))
    # Residuals of zero: unless the iterations come to a standstill, every pass makes one more patch exact.
    seen, result = iterates(block_solver(case, number, segment, guess_TBD=guess_TBD))
    assert distance(result, exact_TBD) < ROUNDING
    counts = [count for count, _ in seen]
    assert set(counts) <= set(range(1, last + 1))
    assert counts == sorted(set(counts))
    assert counts[: min(segment, 2)] == [1, 2][: min(segment, 2)]
    for count, x_TBD in seen:
        assert distance(x_TBD[: count + 1], exact_TBD[: count + 1]) < ROUNDING


def test_patches_beyond_the_exact_ones_are_not_yet() -> None:
    """The law above is tested on iterates that have something left to do."""
    case = case_of(tough_flow(2.0), mixed_options(3))
    _, exact_TBD = iterates(block_solver(case, 0, segment=1))
    seen, _ = iterates(block_solver(case, 0, segment=15))
    assert [count for count, _ in seen] == list(range(1, 16))
    for count, x_TBD in seen[:6]:
        assert distance(x_TBD[count + 1], exact_TBD[count + 1]) > 1e-6


@settings(deadline=None, max_examples=25)
@given(data=st.data(), case=cases(tolerances=[0.0, 1e-6, 1e-2]))
def test_a_segment_of_n_takes_at_most_n_passes(data: st.DataObject, case: Case) -> None:
    last = case.flow.config.num_patches - 1
    segment = data.draw(st.integers(1, last + 2))
    residual = data.draw(st.sampled_from([0.0, 1e-6, 1e-2]))
    solver = block_solver(case, data.draw(st.integers(0, len(case.flow.blocks) - 1)), segment, residual)
    seen, _ = iterates(solver)
    assert int(solver.passes_B.max()) <= len(seen) <= last
    assert int(solver.passes_B.min()) >= -(-last // segment)
    of_segment: dict[int, list[tuple[int, int]]] = {}
    for first, count, active in solver.history:
        of_segment.setdefault(first, []).append((count, active))
    for first, passes in of_segment.items():
        assert [count for count, _ in passes] == list(range(1, len(passes) + 1))
        assert len(passes) <= min(segment, last + 1 - first)
        active = [rows for _, rows in passes]
        assert active == sorted(active, reverse=True)
        assert active[0] == len(case.labels)
        assert min(active) >= 1
    assert sum(rows for passes in of_segment.values() for _, rows in passes) <= int(solver.passes_B.sum())


@pytest.mark.parametrize("segment", [15, 7, 4])
def test_a_row_that_converges_leaves_the_passes(segment: int) -> None:
    """A tolerant row costs less than an exact one beside it, and later segments see what it left behind."""
    case = case_of(tough_flow(1.0), mixed_options(3), [1e-1, 1e-3, 1e-6, 1e-9] * 2)
    plan = Plan(blocks=(BlockPlan(segment=segment),) * 3)
    decoded = decode(case, plan, ONLY_REPORT)
    assert int(decoded.passes_B[::4].max()) < int(decoded.passes_B[3::4].min())
    assert (decoded.backward_error_B < torch.tensor(case.tolerances)).all()
    exact = sequential(case)
    assert all(distance(decoded.x_BTD[row], exact[row]) < 10 * case.tolerances[row] for row in range(8))


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_rows_of_one_block_may_leave_in_any_order(data: st.DataObject) -> None:
    """Also where others have left the iterations before."""
    case = case_of(tough_flow(1.0), mixed_options(3))
    segment = data.draw(st.sampled_from([15, 7, 4, 1]))
    residual_B = torch.tensor([1e-1, 1e-3, 1e-6, 1e-9] * 2)
    _, whole = iterates(block_solver(case, 1, segment, residual_B))
    solver = block_solver(case, 1, segment, residual_B)
    slices, kept, number, keep = solver.run(), list(range(8)), 0, None
    leave_after = data.draw(st.sets(st.integers(2, 8), min_size=1, max_size=3))
    while True:
        try:
            slices.send(keep)
        except StopIteration as stop:
            result: Tensor = stop.value
            break
        number, keep = number + 1, None
        if number in leave_after:
            order = data.draw(st.permutations(range(len(kept))))
            index = order[: data.draw(st.integers(1, len(kept)))]
            kept, keep = [kept[i] for i in index], torch.tensor(index)
    assert distance(result, whole[:, kept]) < ROUNDING
    assert len(solver.passes_B) == len(kept)


def test_an_iteration_that_starts_at_the_solution_stops_after_one_pass() -> None:
    case = case_of(tough_flow(2.0), mixed_options(3))
    _, exact_TBD = iterates(block_solver(case, 1, segment=1))
    near, far = (block_solver(case, 1, 15, 1e-6, guess_TBD=exact_TBD + offset) for offset in (0.0, 0.1))
    iterates(near)
    iterates(far)
    assert near.passes_B.tolist() == [1] * 8
    assert int(far.passes_B.min()) > 1
