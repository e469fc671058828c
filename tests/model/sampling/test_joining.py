"""Two samplings that become one at a block boundary: every row is what it is alone, wherever they met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import SolverOptions
from model.sampling.batch import Boundary, Join
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import Progress, Rows
from model.sampling.sampler import Decoded, Message, Redone, Sampler, Sampling
from tests.model.sampling.cases import Case, case_of, distance, mixed_options, tough_flow, whole_plan
from tests.model.sampling.test_row_independence import CARELESS, assert_same, part

SMALL = {"num_blocks": 3, "layers_per_block": 1, "image_size": 6}
"""Nine patches."""
FLOW = tough_flow(2.0, **SMALL)
MIXED = (BlockPlan(segment=3), BlockPlan(segment=8, guess="zeros"), BlockPlan(segment=1))


class Work(NamedTuple):
    plan: Plan
    options: SolverOptions = SolverOptions()
    stages: tuple[str, ...] = ("blocks",)
    dtype: torch.dtype = torch.float64


WORK = {
    "sequential": Work(Plan.sequential(FLOW.config)),
    "certified": Work(Plan.sequential(FLOW.config), SolverOptions(certify=True)),
    "whole": Work(whole_plan(FLOW)),
    "mixed": Work(Plan(blocks=MIXED)),
    "done again": Work(Plan(blocks=MIXED, gain=CARELESS)),
    "only reported": Work(Plan(blocks=MIXED, gain=CARELESS), SolverOptions(certify=False)),
    "polished": Work(Plan(blocks=MIXED), SolverOptions(precision="bf16"), ("draft", "polish"), torch.float32),
}
PLACES = [(name, stage, block) for name, work in WORK.items() for stage in work.stages for block in range(3)]


def case_for(work: Work) -> Case:
    """Eight rows; every other one misses its tolerance where a plan is careless."""
    flow = tough_flow(1.0 if work.dtype is torch.float32 else 2.0, **SMALL, dtype=work.dtype)
    tolerances = [1e-3] * 8 if work.dtype is torch.float32 else [1e-6, 5.0] * 4
    return case_of(flow, mixed_options(3), tolerances, dtype=work.dtype)


def start(work: Work, rows: Rows, sampler: Sampler, *, boundaries: bool = True) -> Sampling:
    return sampler.decode(rows, work.options, plan=work.plan, trajectory=True, boundaries=boundaries)


def until(sampling: Sampling, stage: str, block: int) -> Boundary:
    """Run to a boundary."""
    while True:
        boundary = next(sampling).boundary
        if boundary is not None and (boundary.stage, boundary.block) == (stage, block):
            return boundary


def run(sampling: Sampling, first: Message = None, drops: Sequence[tuple[int, Sequence[int]]] = ()) -> Decoded:
    """To the end, dropping rows after some numbers of slices."""
    message, number, sends = first, 0, dict(drops)
    while True:
        try:
            sampling.send(message)
        except StopIteration as stop:
            return stop.value
        number += 1
        message = torch.tensor(sends[number], dtype=torch.long) if number in sends else None


def alone(work: Work, case: Case, index: Sequence[int]) -> Decoded:
    return run(start(work, part(case, list(index)).rows(), Sampler(case.flow, rows_per_pass=2), boundaries=False))


def assert_as_alone(work: Work, case: Case, got: Decoded, index: Sequence[int]) -> None:
    expected = alone(work, case, index)
    if work.dtype is torch.float64:
        assert_same(got, expected)
        return
    # Drafts round otherwise in another batch, and a polish may stop a pass sooner or later for that.
    assert distance(got.x_BTD, expected.x_BTD) < 1e-3
    assert (got.passes_B - expected.passes_B).abs().max() <= 1
    assert (got.backward_error_B <= 1e-3).all()


@pytest.mark.parametrize(("name", "stage", "block"), PLACES)
def test_rows_that_join_are_as_alone(name: str, stage: str, block: int) -> None:
    work = WORK[name]
    case = case_for(work)
    sampler = Sampler(case.flow, rows_per_pass=2)
    first, second = (start(work, part(case, i).rows(), sampler) for i in ([0, 1, 2], [3, 4, 5, 6, 7]))
    until(first, stage, block)
    other = until(second, stage, block)
    got = run(first, Join(other))
    second.close()
    assert len(got.trajectory) == 3
    assert_as_alone(work, case, got, range(8))


def test_the_works_are_what_they_are_called() -> None:
    redone = {name: alone(work, case_for(work), range(8)).redone_B.tolist() for name, work in WORK.items()}
    assert redone.pop("done again") == [Redone.TOLERANCE, Redone.NO] * 4
    assert all(rows == [Redone.NO] * 8 for rows in redone.values())


@settings(deadline=None, max_examples=25)
@given(data=st.data(), place=st.sampled_from([place for place in PLACES if place[0] != "polished"]))
def test_rows_may_leave_before_while_and_after_they_join(data: st.DataObject, place: tuple[str, str, int]) -> None:
    name, stage, block = place
    work = WORK[name]
    case = case_for(work)
    sampler = Sampler(case.flow, rows_per_pass=2)
    halves = []
    for index in ([0, 1, 2, 3], [4, 5, 6, 7]):
        staying = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
        sampling = start(work, part(case, index).rows(), sampler)
        if stage == "blocks" and block == 0:
            # Nothing has been done yet that rows could leave from.
            staying, boundary = list(range(4)), until(sampling, stage, block)
        else:
            next(sampling)
            sampling.send(torch.tensor(staying))
            boundary = until(sampling, stage, block)
        halves.append((sampling, boundary, [index[i] for i in staying]))
    (first, _, own), (second, other, others) = halves
    there = own + others
    keep = data.draw(st.none() | st.permutations(range(len(there))))
    if keep is not None:
        keep = keep[: data.draw(st.integers(1, len(there)))]
        there = [there[i] for i in keep]
    message = Join(other, keep=None if keep is None else torch.tensor(keep))
    later = data.draw(st.permutations(range(len(there))))[: data.draw(st.integers(1, len(there)))]
    got = run(first, message, [(1, later)])
    second.close()
    assert_as_alone(work, case, got, [there[i] for i in later])


def test_three_join_at_different_boundaries() -> None:
    work = WORK["mixed"]
    case = case_for(work)
    sampler = Sampler(case.flow, rows_per_pass=2)
    first, second, third = (start(work, part(case, i).rows(), sampler) for i in ([0, 1], [2, 3, 4], [5, 6, 7]))
    until(first, "blocks", 1)
    progress = first.send(Join(until(second, "blocks", 1)))
    assert progress.boundary is None
    until(first, "blocks", 2)
    got = run(first, Join(until(third, "blocks", 2)))
    assert_as_alone(work, case, got, range(8))


def test_all_rows_may_leave_when_others_join() -> None:
    work = WORK["mixed"]
    case = case_for(work)
    first, second = (start(work, case.rows(), Sampler(case.flow)) for _ in range(2))
    until(first, "blocks", 1)
    got = run(first, Join(until(second, "blocks", 1), keep=torch.tensor([], dtype=torch.long)))
    assert got.x_BTD.shape == (0, 9, 4)


def test_the_rest_may_get_another_plan() -> None:
    """Iterated so far, then sequential: the rows keep their tolerances, and their certificates."""
    work = WORK["mixed"]
    case = case_for(work)
    sampler = Sampler(case.flow)
    first, second = (start(work, part(case, i).rows(), sampler) for i in ([0, 1, 2, 3], [4, 5, 6, 7]))
    until(first, "blocks", 1)
    got = run(first, Join(until(second, "blocks", 1), plan=Plan.sequential(FLOW.config)))
    blocks = (MIXED[0], BlockPlan(segment=1), BlockPlan(segment=1))
    assert_as_alone(work._replace(plan=Plan(blocks=blocks)), case, got, range(8))
    assert (got.backward_error_B <= case.rows().tolerance_B).all()


@pytest.mark.parametrize("iterated", [0, 1])
def test_iterated_rows_have_a_certificate_whoever_takes_them_in(iterated: int) -> None:
    case = case_for(WORK["mixed"])
    plans = [Plan.sequential(FLOW.config)] * 2
    plans[iterated] = Plan(blocks=MIXED)
    sampler = Sampler(case.flow)
    samplings = [
        start(Work(plan), part(case, index).rows(), sampler)
        for plan, index in zip(plans, ([0, 1], [2, 3]), strict=True)
    ]
    boundaries = [until(sampling, "blocks", 2) for sampling in samplings]
    got = run(samplings[0], Join(boundaries[1]))
    assert torch.isfinite(got.backward_error_B).all()
    assert (got.backward_error_B <= case.rows().tolerance_B[:4]).all()


def test_what_does_not_meet_is_refused() -> None:
    case = case_for(WORK["polished"])
    sampler = Sampler(case.flow)

    def at(work: Work, stage: str, block: int, trajectory: bool = True) -> tuple[Sampling, Boundary]:
        sampling = sampler.decode(case.rows(), work.options, plan=work.plan, trajectory=trajectory, boundaries=True)
        return sampling, until(sampling, stage, block)

    rough = WORK["mixed"]._replace(options=SolverOptions(precision="bf16"))
    for _, other in (
        at(WORK["mixed"], "blocks", 2),
        at(WORK["mixed"], "blocks", 1, trajectory=False),
        at(WORK["certified"], "blocks", 1),
        at(rough, "draft", 1),
        at(rough, "polish", 1),
    ):
        receiver, boundary = at(WORK["mixed"], "blocks", 1)
        assert not boundary.meets(other)
        with pytest.raises(ValueError, match="cannot join"):
            receiver.send(Join(other))
    receiver, _ = at(WORK["mixed"], "blocks", 1)
    next(receiver)
    with pytest.raises(ValueError, match="at a boundary"):
        receiver.send(Join(at(WORK["mixed"], "blocks", 1)[1]))


@pytest.mark.parametrize("name", WORK)
def test_boundaries_are_shown_when_they_are_asked_for(name: str) -> None:
    """One before every block of every stage; and nothing else changes."""
    work = WORK[name]
    case = case_for(work)
    sampler = Sampler(case.flow, rows_per_pass=2)
    seen: list[Progress] = list(start(work, case.rows(), sampler))
    plain = list(start(work, case.rows(), sampler, boundaries=False))
    places = [(p.boundary.stage, p.boundary.block) for p in seen if p.boundary is not None]
    assert places == [(stage, block) for stage in work.stages for block in range(3)]
    passes = [replace(p, preview_BTD=None) for p in seen if p.boundary is None]
    assert passes == [replace(p, preview_BTD=None) for p in plain]
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
