"""What a sampler shows while it is at work, and that it leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.config import SolverOptions
from model.flow import Flow
from model.sampling.kernel import BlockKernel
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import Progress, finish
from model.sampling.sampler import Decoded, Sampler, Sampling
from tests.model.sampling.cases import Case, case_of, decode, mixed_options, tough_flow, whole_plan
from tests.model.sampling.profiles import costs_of

SMALL = {"image_size": 6, "layers_per_block": 1}
"""Nine patches."""
FLOW = tough_flow(1.0, **SMALL)
MIXED = (BlockPlan(segment=8), BlockPlan(segment=3, guess="zeros"), BlockPlan(segment=1))
WORK: dict[str, tuple[Plan, SolverOptions]] = {
    "sequential": (Plan.sequential(FLOW.config), SolverOptions()),
    "certified": (Plan.sequential(FLOW.config), SolverOptions(certify=True)),
    "whole": (whole_plan(FLOW), SolverOptions()),
    "mixed": (Plan(blocks=MIXED), SolverOptions()),
    "done again": (whole_plan(FLOW, 1e-4), SolverOptions()),
    "draft": (Plan(blocks=MIXED), SolverOptions(precision="bf16", certify=False)),
    "polished": (Plan(blocks=MIXED), SolverOptions(precision="bf16")),
}


def case_for(work: str) -> Case:
    dtype = torch.float32 if work in ("draft", "polished") else torch.float64
    return case_of(tough_flow(1.0, dtype=dtype, **SMALL), mixed_options(3), 1e-4, dtype=dtype)


def start(work: str, case: Case) -> Sampling:
    plan, options = WORK[work]
    return Sampler(case.flow, rows_per_pass=3).decode(case.rows(), options, plan=plan, trajectory=True)


def watch(slices: Sampling) -> tuple[list[Progress], list[Tensor], Decoded]:
    """All that is shown, with copies of the previews as they were; and the result."""
    seen, previews = [], []
    while True:
        try:
            progress = next(slices)
        except StopIteration as stop:
            return seen, previews, stop.value
        seen.append(progress)
        assert progress.preview_BTD is not None
        previews.append(progress.preview_BTD.clone())


@pytest.mark.parametrize("work", WORK)
def test_fractions_grow_within_zero_and_one(work: str) -> None:
    seen, _, _ = watch(start(work, case_for(work)))
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert all(0 < fraction <= 1 for fraction in fractions)
    assert fractions[0] < 0.1
    assert fractions[-1] > 0.95
    # Only what is done again cannot be foreseen.
    assert work == "done again" or len(set(fractions)) == len(fractions)


@pytest.mark.parametrize("work", WORK)
def test_finished_blocks_are_counted(work: str) -> None:
    """From none on, one after another, up to all but the one at work; then all, while the sample is certified."""
    seen, _, _ = watch(start(work, case_for(work)))
    assert {progress.num_blocks for progress in seen} == {3}
    changes = [seen[0].block]
    for progress in seen:
        if progress.block != changes[-1]:
            changes.append(progress.block)
    # Polishing a draft counts anew.
    assert changes == [0, 1, 2] * (1 + (work == "polished")) + [3] * (work != "sequential")


@pytest.mark.parametrize("work", ["sequential", "certified", "whole", "mixed", "draft"])
def test_the_preview_is_the_state_after_the_last_finished_block(work: str) -> None:
    case = case_for(work)
    seen, previews, decoded = watch(start(work, case))
    states = [case.latent_BTD * case.flow.prior_variance.sqrt(), *decoded.trajectory]
    for progress, preview_BTD in zip(seen, previews, strict=True):
        assert torch.equal(preview_BTD, states[progress.block])
    assert torch.equal(decoded.trajectory[-1], decoded.x_BTD)


def test_a_volume_preserving_flow_starts_from_its_prior() -> None:
    flow = tough_flow(1.0, volume_preserving=True)
    case = case_of(flow, mixed_options(3))
    _, previews, _ = watch(Sampler(flow).decode(case.rows()))
    assert torch.equal(previews[0], case.latent_BTD * flow.prior_variance.sqrt())


def test_the_preview_of_what_is_done_again_is_what_it_was() -> None:
    """Rows that wait for the others are shown as they are, and those that are decoded again as they were."""
    case = case_for("done again")
    _, previews, decoded = watch(start("done again", case))
    assert decoded.redone_B.any()
    reported = decode(case, WORK["done again"][0], SolverOptions(certify=False), rows_per_pass=3)
    assert torch.equal(previews[-1], reported.x_BTD)


@pytest.mark.parametrize("work", WORK)
def test_rows_that_left_are_not_shown(work: str) -> None:
    slices = start(work, case_for(work))
    for _ in range(5):
        next(slices)
    preview_BTD = slices.send(torch.tensor([4, 1])).preview_BTD
    assert preview_BTD is not None
    assert len(preview_BTD) == 2


@pytest.mark.parametrize("work", WORK)
def test_inputs_and_weights_are_left_alone(work: str) -> None:
    case = case_for(work)
    rows = case.rows()
    before = {name: value.clone() for name, value in (vars(rows) | case.flow.state_dict()).items()}
    plan, options = WORK[work]
    finish(Sampler(case.flow).decode(rows, options, plan=plan))
    for name, value in (vars(rows) | case.flow.state_dict()).items():
        assert torch.equal(before[name], value), name


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("mode", [True, False])
def test_grad_mode_is_the_callers_between_slices(work: str, mode: bool) -> None:
    case = case_for(work)
    case.flow.requires_grad_(True)
    with torch.set_grad_enabled(mode):
        slices = start(work, case)
        while True:
            try:
                next(slices)
            except StopIteration as stop:
                decoded: Decoded = stop.value
                break
            assert torch.is_grad_enabled() is mode
        assert torch.is_grad_enabled() is mode
    assert not decoded.x_BTD.requires_grad
    assert not decoded.backward_error_B.requires_grad


@pytest.mark.parametrize("work", WORK)
def test_samplings_in_flight_do_not_disturb_each_other(work: str) -> None:
    """Of one sampler, slice by slice in turn, also where a third one drops rows."""
    case = case_for(work)
    other = case_of(case.flow, mixed_options(3)[:3], 1e-4, 50, case.latent_BTD.dtype)
    plan, options = WORK[work]
    sampler = Sampler(case.flow, rows_per_pass=3)
    expected = [finish(sampler.decode(c.rows(), options, plan=plan)) for c in (case, other)]
    flights = [sampler.decode(c.rows(), options, plan=plan) for c in (case, other)]
    disturber = sampler.decode(other.rows(), options, plan=plan)
    next(disturber)
    keep: Tensor | None = torch.tensor([1])
    results: dict[int, Decoded] = {}
    while len(results) < 2:
        for number, flight in enumerate(flights):
            try:
                next(flight)
            except StopIteration as stop:
                results.setdefault(number, stop.value)
        try:
            disturber.send(keep)
            keep = None
        except StopIteration:
            pass
    for number, right in enumerate(expected):
        assert torch.equal(results[number].x_BTD, right.x_BTD)
        assert torch.equal(results[number].passes_B, right.passes_B)


class TestThreads:
    @pytest.fixture
    def one_thread(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    @pytest.fixture
    def inside(self, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
        """Patches and threads of every pass of the kernel."""
        seen: set[tuple[int, int]] = set()
        run = BlockKernel.run

        def recording(kernel: BlockKernel, x_NRD: Tensor, *rest: object) -> Tensor:
            seen.add((len(x_NRD), torch.get_num_threads()))
            return run(kernel, x_NRD, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(BlockKernel, "run", recording)
        return seen

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("work", ["sequential", "mixed", "done again"])
    def test_they_are_chosen_for_a_slice_and_restored_after_it(self, work: str, inside: set[tuple[int, int]]) -> None:
        flow: Flow = tough_flow(1.0, **SMALL)
        case = case_of(flow, mixed_options(3), 1e-4)
        costs = costs_of(lambda r, p: 1e-9, threads=lambda r, p: 1 if p == 1 else 2)
        plan, options = WORK[work]
        for _ in Sampler(flow, costs=costs).decode(case.rows(), options, plan=plan):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        threads = {n: {t for length, t in inside if length == n} for n, _ in inside}
        if work == "sequential":
            assert threads == {1: {1}}
        else:
            assert threads[8] == {2}

    @pytest.mark.usefixtures("one_thread")
    def test_they_are_restored_when_a_slice_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            assert torch.get_num_threads() == 2
            raise RuntimeError("out of memory")

        monkeypatch.setattr(BlockKernel, "run", fail)
        case = case_of(FLOW, mixed_options(3))
        costs = costs_of(lambda r, p: 1.0, threads=lambda r, p: 2)
        with pytest.raises(RuntimeError, match="out of memory"):
            finish(Sampler(FLOW, costs=costs).decode(case.rows(), plan=whole_plan(FLOW)))
        assert torch.get_num_threads() == 1

    @pytest.mark.usefixtures("one_thread")
    def test_without_costs_they_are_the_callers(self, inside: set[tuple[int, int]]) -> None:
        finish(Sampler(FLOW).decode(case_of(FLOW, mixed_options(3)).rows(), plan=whole_plan(FLOW)))
        assert {threads for _, threads in inside} == {1}
