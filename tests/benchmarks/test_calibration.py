"""Calibration finds the loosest tolerance that keeps a method's images, and the fastest way within it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.calibration import (
    GREY_LEVEL,
    LADDER,
    Method,
    Trial,
    calibrate,
    calibrate_fastest,
    gs_jacobi_method,
    gs_jacobi_strategies,
    make_trials,
    published_gs_jacobi_strategy,
    selective_jacobi_method,
    try_out,
)
from benchmarks.models import random_flow
from benchmarks.published import sample
from benchmarks.published.guidance import Guidance
from model.config import FlowConfig
from model.flow import Flow

TRIALS = [Trial(torch.zeros(2, 3, 4), None, torch.ones(2, 3, 4)), Trial(torch.ones(2, 3, 4), None, torch.ones(2, 3, 4))]
GUIDANCE = Guidance(2.0, True, 1.0)


def off_by(factor: float) -> Method:
    """A method whose worst value is wrong by ``factor`` times its tolerance, in the first trial alone."""

    def method(latent_BTD: Tensor, y_B: Tensor | None, tolerance: float) -> tuple[Tensor, list[int]]:
        x_BTD = torch.ones_like(latent_BTD)
        x_BTD[0, 1, 2] += factor * tolerance * (1 - latent_BTD[0, 1, 2])
        return x_BTD, [3, 1 + int(latent_BTD[0, 0, 0])]

    return method


@pytest.fixture(scope="module")
def flow() -> Flow:
    config = FlowConfig(
        image_size=8,
        channels=1,
        patch_size=2,
        width=16,
        num_blocks=3,
        layers_per_block=1,
        num_classes=3,
        head_dim=8,
    )
    return random_flow(config)


def test_the_ladder_descends() -> None:
    assert LADDER[:4] == pytest.approx([0.5, 0.2, 0.1, 0.05])
    assert list(LADDER) == sorted(LADDER, reverse=True)


@pytest.mark.parametrize(("factor", "tolerance"), [(0.01, 0.5), (0.1, 0.05), (1, 0.005), (10, 0.0005)])
def test_the_loosest_tolerance_that_holds(factor: float, tolerance: float) -> None:
    outcome = calibrate(off_by(factor), TRIALS)
    assert outcome.tolerance == pytest.approx(tolerance)
    assert outcome.max_difference == pytest.approx(factor * tolerance, rel=1e-3)
    assert outcome.within(GREY_LEVEL)
    assert outcome.iterations == [3, 1.5]


@pytest.mark.parametrize("factor", [1e9, math.nan])
def test_where_none_holds_the_outcome_says_so(factor: float) -> None:
    outcome = calibrate(off_by(factor), TRIALS)
    assert outcome.tolerance == LADDER[-1]
    assert not outcome.within(GREY_LEVEL)


def test_only_methods_that_hold_compete() -> None:
    assert calibrate_fastest({"wrong": off_by(math.nan), "right": off_by(1)}, TRIALS)[0] == "right"
    key, outcome = calibrate_fastest({1: off_by(math.nan), 2: off_by(math.inf)}, TRIALS)
    assert key in {1, 2}
    assert not outcome.within(GREY_LEVEL)


def test_trials_are_the_published_images_of_distinct_seeds(flow: Flow) -> None:
    trials = make_trials(flow, batch=2, count=3, guidance=GUIDANCE)
    rows = torch.cat([trial.latent_BTD for trial in trials])
    assert len(rows.flatten(1).unique(dim=0)) == 6
    for trial in trials:
        assert torch.equal(trial.exact_BTD, sample(flow, trial.latent_BTD, trial.y_B, *GUIDANCE))


def test_both_accelerations_can_be_calibrated(flow: Flow) -> None:
    trials = make_trials(flow, batch=2, count=2, guidance=GUIDANCE)
    selective = selective_jacobi_method(flow, GUIDANCE)
    strategies = gs_jacobi_strategies(flow, trials, segments=(0, 1, 3))
    methods = {count: gs_jacobi_method(flow, GUIDANCE, strategy) for count, strategy in strategies.items()}
    assert calibrate(selective, trials).within(GREY_LEVEL)
    count, outcome = calibrate_fastest(methods, trials, repeats=1)
    assert outcome.within(GREY_LEVEL)
    assert count in strategies[count].segments
    published = published_gs_jacobi_strategy(flow, trials)
    assert set(published.segments) == {1, 8}
    assert try_out(gs_jacobi_method(flow, GUIDANCE, published), trials, 1e-6).within(GREY_LEVEL)


def test_a_model_without_classes_has_trials_without_labels() -> None:
    flow = random_flow(
        FlowConfig(image_size=4, channels=1, patch_size=2, width=8, num_blocks=2, layers_per_block=1, head_dim=8)
    )
    trials = make_trials(flow, batch=1, count=1, guidance=Guidance(1.0, False, 0.5))
    assert trials[0].y_B is None
    assert set(gs_jacobi_strategies(flow, trials)) == {0, 1, 2, 4, 7}
