"""The certificate: an independent look at a finished sample, and what is done about what it sees."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import model.sampling.sampler as sampler_module
from model.config import SolverOptions
from model.sampling.certificate import backward_error
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import finish
from model.sampling.sampler import Redone, Sampler
from model.sampling.solver import BlockSolver
from tests.model.sampling.cases import (
    ROUNDING,
    Case,
    case_of,
    cases,
    decode,
    direct_affine,
    direct_backward_error,
    distance,
    mixed_options,
    sequential,
    tough_flow,
    whole_plan,
)

FLOW = tough_flow(2.0, layers_per_block=1)
CARELESS = 1e-4
"""A gain so small that rows stop far above their tolerance."""


def errors(case: Case, x_BTD: Tensor, rows_per_pass: int = 3) -> Tensor:
    return finish(backward_error(case.flow, case.rows(), x_BTD, rows_per_pass))


@settings(deadline=None, max_examples=12)
@given(data=st.data(), case=cases(tolerances=[1e-3]))
def test_it_is_the_direct_formula_row_by_row(data: st.DataObject, case: Case) -> None:
    """For samples that are exact, nearly so, and not at all."""
    size = data.draw(st.sampled_from([0.0, 1e-4, 0.1]))
    x_BTD = sequential(case)
    assume(bool(torch.isfinite(x_BTD).all()))
    offset_BTD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(1), dtype=x_BTD.dtype)
    got_B = errors(case, x_BTD + size * offset_BTD, data.draw(st.integers(1, 6)))
    expected_B = direct_backward_error(case, x_BTD + size * offset_BTD)
    torch.testing.assert_close(got_B, expected_B, atol=1e-11, rtol=1e-6)
    assert (got_B > size / 100).all()
    assert size or (got_B < 1e-11).all()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
def test_what_is_exact_has_an_error_of_rounding(dtype: torch.dtype, most: float) -> None:
    case = case_of(tough_flow(2.0, dtype=dtype), mixed_options(3), dtype=dtype)
    decoded = decode(case, options=SolverOptions(solver="sequential", certify=True))
    assert decoded.backward_error_B.dtype == dtype
    assert 0 < decoded.backward_error_B.max() < most
    assert not decoded.redone_B.any()


@pytest.mark.parametrize("rows_per_pass", [1, 3, 8])
def test_it_advances_by_passes_of_bounded_size(rows_per_pass: int) -> None:
    case = case_of(FLOW, mixed_options(3))
    shares = list(backward_error(FLOW, case.rows(), sequential(case), rows_per_pass))
    assert len(shares) == 3 * -(-8 // rows_per_pass)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1


def test_a_perturbation_of_known_size_is_seen_in_its_row_alone() -> None:
    """In one block the noise of the last patch moves by δ·exp(−α), and that of the others not at all."""
    flow = tough_flow(2.0, num_blocks=1)
    case = case_of(flow, mixed_options(1))
    x_BTD = sequential(case)
    alpha, _ = direct_affine(case, flow.blocks[0], 0, x_BTD, range(16))
    x_BTD[5, 15, 2] += 0.25
    error_B = errors(case, x_BTD)
    torch.testing.assert_close(error_B[5], 0.25 * torch.exp(-alpha[5, 15, 2]))
    assert (error_B[[0, 1, 2, 3, 4, 6, 7]] < 1e-12).all()


def corrupt(monkeypatch: pytest.MonkeyPatch, number: int, row: int, amount: float) -> None:
    """From now on iterations of a block return one wrong patch in one row; single patches stay right."""

    class Corrupting(BlockSolver):
        def run(self) -> Generator[float, Tensor | None, Tensor]:
            x_TBD = yield from super().run()
            if self._number == number and self._segment > 1:
                x_TBD[7, row] += amount
            return x_TBD

    monkeypatch.setattr(sampler_module, "BlockSolver", Corrupting)


@pytest.mark.parametrize(("number", "amount"), [(0, 1.0), (1, 1e-2), (2, 0.1)])
def test_a_corrupted_iterate_is_seen_and_its_row_is_done_again(
    monkeypatch: pytest.MonkeyPatch, number: int, amount: float
) -> None:
    case = case_of(FLOW, mixed_options(3), 1e-4)
    good = decode(case, whole_plan(FLOW))
    assert not good.redone_B.any()
    corrupt(monkeypatch, number, 4, amount)
    seen = decode(case, whole_plan(FLOW), SolverOptions(certify=False))
    assert (seen.backward_error_B > case.tolerances[0]).nonzero().tolist() == [[4]]
    assert distance(seen.x_BTD[4], good.x_BTD[4]) > amount / 10
    mended = decode(case, whole_plan(FLOW))
    assert mended.redone_B.tolist() == [Redone.TOLERANCE if row == 4 else Redone.NO for row in range(8)]
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(mended.x_BTD[others], good.x_BTD[others])
    assert distance(mended.x_BTD[4], sequential(case)[4]) < ROUNDING
    assert mended.backward_error_B[4] < ROUNDING
    assert mended.passes_B[4] == seen.passes_B[4] + 3 * 15
    for ours, exact in zip(mended.trajectory, decode(case, Plan.sequential(FLOW.config)).trajectory, strict=True):
        assert distance(ours[4], exact[4]) < ROUNDING


def test_corruption_below_the_tolerance_is_reported_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(FLOW, mixed_options(3), [1e-4] * 4 + [1.0] * 4)
    corrupt(monkeypatch, 2, 4, 1e-2)
    decoded = decode(case, whole_plan(FLOW))
    assert not decoded.redone_B.any()
    assert 1e-4 < decoded.backward_error_B[4] < 1.0


def test_every_row_has_its_own_tolerance() -> None:
    """The one in the options is for the choice of plan."""
    rows = replace(case_of(FLOW, mixed_options(3)).rows(), tolerance_B=torch.tensor([1e-6, 1e3] * 4).double())
    for tolerance in (1e-6, 1.0):
        steps = Sampler(FLOW).decode(rows, SolverOptions(tolerance=tolerance), plan=whole_plan(FLOW, CARELESS))
        decoded = finish(steps)
        assert decoded.redone_B.tolist() == [Redone.TOLERANCE, Redone.NO] * 4
        assert (decoded.backward_error_B[::2] < ROUNDING).all()
        assert (decoded.backward_error_B[1::2] > 1e-6).all()


SEQUENTIAL, WHOLE = Plan.sequential(FLOW.config), whole_plan(FLOW, CARELESS)
PARTLY = Plan(blocks=(*SEQUENTIAL.blocks[:2], BlockPlan(segment=4)), gain=CARELESS / 100)


@pytest.mark.parametrize(
    ("plan", "certify", "has_error", "redoes"),
    [
        (SEQUENTIAL, None, False, False),
        (SEQUENTIAL, True, True, False),
        (SEQUENTIAL, False, False, False),
        (WHOLE, None, True, True),
        (WHOLE, True, True, True),
        (WHOLE, False, True, False),
        (PARTLY, None, True, True),
        (PARTLY, False, True, False),
    ],
)
def test_what_is_certified_and_what_is_done_again(
    plan: Plan, certify: bool | None, has_error: bool, redoes: bool
) -> None:
    case = case_of(FLOW, mixed_options(3), 1e-6)
    decoded = decode(case, plan, SolverOptions(certify=certify))
    assert bool(decoded.backward_error_B.isnan().all()) is not has_error
    assert bool(decoded.backward_error_B.isfinite().all()) is has_error
    assert decoded.redone_B.tolist() == [Redone.TOLERANCE if redoes else Redone.NO] * 8


def test_what_is_done_again_is_final() -> None:
    """A tolerance below what rounding leaves is missed, reported, and not tried a third time."""
    case = case_of(FLOW, mixed_options(3), 1e-30)
    decoded = decode(case, whole_plan(FLOW, 1e-20))
    assert decoded.redone_B.tolist() == [Redone.TOLERANCE] * 8
    assert (decoded.backward_error_B > 1e-30).all()
    assert distance(decoded.x_BTD, sequential(case)) < ROUNDING
    vain = decode(case, whole_plan(FLOW, 1e-20), SolverOptions(certify=False)).passes_B
    assert torch.equal(decoded.passes_B, vain + 3 * 15)


class TestDrafts:
    FLOW = tough_flow(1.0, dtype=torch.float32, layers_per_block=1)
    PLANS = (whole_plan(FLOW), SEQUENTIAL, Plan(blocks=PARTLY.blocks))

    def case(self) -> Case:
        return case_of(self.FLOW, mixed_options(3), 1e-4, dtype=torch.float32)

    @pytest.mark.parametrize("plan", PLANS, ids=["whole", "sequential", "partly"])
    def test_a_draft_alone_is_far_off_and_says_so(self, plan: Plan) -> None:
        decoded = decode(self.case(), plan, SolverOptions(precision="bf16", certify=False))
        assert decoded.x_BTD.dtype == torch.float32
        assert (decoded.backward_error_B > 3e-3).all()
        assert not decoded.redone_B.any()
        off = (decoded.x_BTD - sequential(self.case())).abs().amax(dim=(1, 2))
        assert ((off > 1e-3) & (off < 0.5)).all()

    @pytest.mark.parametrize("plan", PLANS, ids=["whole", "sequential", "partly"])
    @pytest.mark.parametrize("certify", [None, True])
    def test_a_polished_draft_meets_the_tolerance(self, plan: Plan, certify: bool | None) -> None:
        decoded = decode(self.case(), plan, SolverOptions(precision="bf16", certify=certify))
        assert (decoded.backward_error_B < 1e-4).all()
        assert not decoded.redone_B.any(), "it is not sequential decoding that mends the draft"
        assert distance(decoded.x_BTD, sequential(self.case())) < 1e-3

    def test_polishing_starts_from_the_draft(self) -> None:
        """It takes fewer passes than iterations from the latents do."""
        draft = decode(self.case(), whole_plan(self.FLOW), SolverOptions(precision="bf16", certify=False))
        polished = decode(self.case(), whole_plan(self.FLOW), SolverOptions(precision="bf16"))
        fresh = decode(self.case(), whole_plan(self.FLOW))
        assert (polished.passes_B - draft.passes_B < fresh.passes_B).all()

    def test_a_draft_that_misses_its_tolerance_is_done_again_in_float32(self) -> None:
        decoded = decode(self.case(), whole_plan(self.FLOW, CARELESS), SolverOptions(precision="bf16"))
        assert decoded.redone_B.tolist() == [Redone.TOLERANCE] * 8
        assert distance(decoded.x_BTD, sequential(self.case())) < 1e-4
