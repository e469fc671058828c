"""The choice of plan: what is cheapest by expectation, and sequential wherever nothing is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import FlowConfig, Solver, SolverOptions
from model.flow import Flow
from model.sampling.plan import (
    FLOOR_DISTANCE,
    MARGIN,
    SHORTEST_SEGMENT,
    BlockPlan,
    ConvergenceProfile,
    CostProfile,
    Plan,
    choose,
    expected_seconds,
    segment_lengths,
)
from model.sampling.sampler import Sampler
from tests.model.sampling.cases import case_of, mixed_options, tough_flow
from tests.model.sampling.profiles import CONFIG, all_need, block, costs_of, profile_of

FREE = costs_of(lambda rows, patches: 1.0)
"""A pass costs the same whatever is in it: parallel hardware that is never full."""
LINEAR = costs_of(lambda rows, patches: float(rows * patches))
"""A pass costs what it computes: hardware that is always full."""
BETWEEN = costs_of(lambda rows, patches: 1 + 0.2 * rows * patches)
EASY, TOUGH = all_need(3), all_need(15)
SEQUENTIAL = ["sequential"] * 3


def choice(
    profile: ConvergenceProfile | None,
    costs: CostProfile | None,
    *,
    solver: Solver = "auto",
    tolerance: float = 1e-3,
    rows: int = 1,
    guided: int = 0,
    config: FlowConfig = CONFIG,
) -> Plan:
    return choose(solver, tolerance, config, profile, costs, rows, [rows + guided] * config.num_blocks)


class TestChoice:
    def test_passes_that_cost_the_same_are_iterated_whole(self) -> None:
        plan = choice(profile_of([EASY] * 3), FREE)
        assert plan.describe() == ["jacobi/15"] * 3
        assert not plan.is_sequential

    def test_passes_that_cost_what_they_compute_are_not(self) -> None:
        plan = choice(profile_of([EASY] * 3), LINEAR)
        assert plan.describe() == SEQUENTIAL
        assert plan.is_sequential

    def test_one_tough_block_is_sequential_and_the_others_are_not(self) -> None:
        assert choice(profile_of([TOUGH, EASY, EASY]), BETWEEN).describe() == ["sequential", "jacobi/15", "jacobi/15"]
        assert choice(profile_of([EASY, EASY, TOUGH]), BETWEEN).describe() == ["jacobi/15", "jacobi/15", "sequential"]

    def test_a_block_that_converges_in_short_segments_gets_them(self) -> None:
        """15 passes in the whole, 2 in each of the four segments of 4."""
        short = block({15: [1.0] * 15, 8: [1.0] * 8, 4: [1.0] * 2})
        assert choice(profile_of([short, EASY, EASY]), BETWEEN).describe()[0] == "jacobi/4"

    @pytest.mark.parametrize(("profile", "costs"), [(None, FREE), (profile_of([EASY] * 3), None), (None, None)])
    def test_what_is_not_known_is_sequential(
        self, profile: ConvergenceProfile | None, costs: CostProfile | None
    ) -> None:
        assert choice(profile, costs).describe() == SEQUENTIAL

    def test_a_tolerance_near_the_floor_is_sequential(self) -> None:
        profile = profile_of([EASY] * 3, floor=1e-4)
        assert choice(profile, FREE, tolerance=1e-4 * FLOOR_DISTANCE * 0.99).describe() == SEQUENTIAL
        assert choice(profile, FREE, tolerance=1e-4 * FLOOR_DISTANCE * 1.01).describe() == ["jacobi/15"] * 3

    def test_what_is_forced_is_obeyed(self) -> None:
        easy, near = profile_of([EASY] * 3), profile_of([EASY] * 3, floor=1.0)
        assert choice(easy, FREE, solver="sequential").describe() == SEQUENTIAL
        for profile, costs in ((easy, LINEAR), (near, FREE), (None, None), (easy, None)):
            assert choice(profile, costs, solver="jacobi").describe() == ["jacobi/15"] * 3

    def test_starts_gain_and_floor_are_those_of_the_profile(self) -> None:
        zeros = replace(EASY, igm_zeros=1.0)
        profile = profile_of([EASY, zeros, EASY])
        for plan in (choice(profile, FREE), choice(profile, None, solver="jacobi")):
            assert [b.guess for b in plan.blocks] == ["latent", "zeros", "latent"]
            assert (plan.gain, plan.floor) == (profile.gain, profile.floor)

    def test_savings_below_the_price_of_a_certificate_are_none(self) -> None:
        """Each block saves 15 − 3 passes; the certificate is one long pass through each."""
        for price, expected in ((11.9, ["jacobi/15"] * 3), (12.1, SEQUENTIAL)):
            costs = costs_of(lambda rows, patches, price=price: price if patches == 16 else 1.0)
            assert choice(profile_of([EASY] * 3), costs).describe() == expected

    def test_shallow_blocks_count_by_their_depth(self) -> None:
        """The block next to the noise has 3 layers, the others 1: what only a shallow one saves is a third of it."""
        config = replace(CONFIG, layers_per_block=(1, 1, 3))
        costs = costs_of(lambda rows, patches: 5.0 if patches == 16 else 1.0)
        slow = all_need(15)
        # A certificate is 5 · (1 + 1/3 + 1/3) = 8.3; a deep block saves 12 and a shallow one 4.
        deep, shallow = profile_of([EASY, slow, slow]), profile_of([slow, EASY, EASY])
        assert choice(deep, costs, config=config).describe() == ["jacobi/15", "sequential", "sequential"]
        assert choice(shallow, costs, config=config).describe() == SEQUENTIAL

    def test_a_large_batch_waits_for_its_slowest_row(self) -> None:
        """One row of ten takes all passes: rare alone, certain among many."""
        stragglers = block({15: [1.0] * 2 + [0.1] * 13})
        costs = costs_of(lambda rows, patches: 1 + 0.05 * patches)
        assert choice(profile_of([stragglers] * 3), costs, rows=1).describe() == ["jacobi/15"] * 3
        assert choice(profile_of([stragglers] * 3), costs, rows=64).describe() == SEQUENTIAL

    def test_guidance_makes_passes_larger(self) -> None:
        costs = costs_of(lambda rows, patches: 1 + 0.16 * (rows - 1) * patches + 0.08 * patches)
        profile = profile_of([all_need(5)] * 3)
        assert choice(profile, costs, rows=1).describe() != SEQUENTIAL
        assert choice(profile, costs, rows=1, guided=1).describe() == SEQUENTIAL


def test_expected_seconds_are_passes_of_shrinking_segments() -> None:
    """Two segments of 8, where half of the rows take a second pass, which is one patch shorter."""
    convergence = block({8: [1.0, 0.5]})
    seconds = expected_seconds(convergence, 8, LINEAR, CONFIG, num_rows=2, network_rows=4)
    any_row = 1 - 0.5**2
    assert seconds == pytest.approx(2 * (4 * 8 + any_row * 2 * 7))
    assert expected_seconds(convergence, 1, LINEAR, CONFIG, 2, 4) == pytest.approx(15 * 4)


@st.composite
def convergences(draw: st.DrawFn) -> Any:
    active = {}
    for segment in segment_lengths(CONFIG.num_patches):
        more = draw(st.lists(st.floats(0, 1), max_size=segment - 1))
        active[segment] = [1.0, *sorted(more, reverse=True)]
    return block(active)


@settings(deadline=None, max_examples=50)
@given(
    blocks=st.lists(convergences(), min_size=3, max_size=3),
    fixed=st.floats(0.01, 10),
    each=st.floats(0.01, 1),
    rows=st.sampled_from([1, 3, 16, 64]),
    guided=st.booleans(),
)
def test_no_other_choice_is_expected_to_be_faster(
    blocks: list[Any], fixed: float, each: float, rows: int, guided: bool
) -> None:
    costs = costs_of(lambda r, p: fixed + each * r * p)
    network_rows = rows * (1 + guided)

    def total(segments: list[int]) -> float:
        certificate = 0.0 if set(segments) == {1} else 3 * costs.seconds(network_rows, 16)
        work = sum(
            expected_seconds(b, segment, costs, CONFIG, rows, network_rows)
            for b, segment in zip(blocks, segments, strict=True)
        )
        return certificate + work

    plan = choice(profile_of(blocks), costs, rows=rows, guided=rows * guided)
    chosen = total([b.segment for b in plan.blocks])
    for first in (1, 4, 8, 15):
        for others in (1, 4, 8, 15):
            assert chosen <= total([first, others, others]) * (1 + 1e-9)
            assert chosen <= total([others, first, others]) * (1 + 1e-9)


@settings(deadline=None, max_examples=50)
@given(side=st.integers(2, 64))
def test_segment_lengths_are_the_whole_and_its_halves(side: int) -> None:
    whole = side**2 - 1
    lengths = segment_lengths(side**2)
    assert lengths[0] == whole
    assert lengths == sorted(set(lengths), reverse=True)
    assert all(length >= SHORTEST_SEGMENT for length in lengths[1:])
    for longer, shorter in pairwise(lengths):
        assert shorter == math.ceil(longer / 2)
    assert math.ceil(lengths[-1] / 2) < SHORTEST_SEGMENT


@pytest.mark.parametrize("gain", [0.5, 4.0])
@pytest.mark.parametrize("floor", [0.0, 1e-4, 1e-2])
def test_rows_stop_so_that_gain_and_floor_stay_below_the_tolerance(gain: float, floor: float) -> None:
    plan = Plan(blocks=(BlockPlan(segment=2),), gain=gain, floor=floor)
    for tolerance in (1e-3, 1e-2, 1.0):
        error = plan.residual(tolerance) * gain * MARGIN + min(floor, tolerance / 2)
        assert plan.residual(tolerance) > 0
        assert error <= tolerance * (1 + 1e-12)


def test_a_sampler_chooses_by_its_profiles_and_rows() -> None:
    flow: Flow = tough_flow(1.0)
    rows = case_of(flow, mixed_options(3)).rows()
    profile = profile_of([EASY] * 3)
    options = SolverOptions()
    assert Sampler(flow).plan(rows, options).is_sequential
    assert Sampler(flow, profile).plan(rows, options).is_sequential
    assert Sampler(flow, profile, LINEAR).plan(rows, options).is_sequential
    assert Sampler(flow, profile, FREE).plan(rows, options).describe() == ["jacobi/15"] * 3
    assert Sampler(flow).plan(rows, SolverOptions(solver="jacobi")).describe() == ["jacobi/15"] * 3
    # The expected price of passes counts the second ones: 8 rows, of which 5 are guided in the first block.
    calls: list[float] = []

    class Counting(CostProfile):
        def seconds(self, rows: float, patches: int) -> float:
            calls.append(rows)
            return super().seconds(rows, patches)

    Sampler(flow, profile, Counting(LINEAR.costs)).plan(rows, options)
    assert max(calls) == 8 + len(rows.guided(0, flow.blocks[-1]))
