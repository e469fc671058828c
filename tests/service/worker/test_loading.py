"""Loading: costs are measured, and bound the slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.sampling.plan import CostProfile, PassCost
from model.sampling.sampler import SLICE_SECONDS
from service.worker.loading import MOST_SLICE_ROWS, LoadedModel, describe
from service.worker.models import load_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(models: Path) -> LoadedModel:
    return load_models(models / "tiny-vp", CPU, batch_rows=4)["tiny-vp"]


def test_a_worker_knows_what_passes_cost_and_how_its_model_converges(loaded: LoadedModel) -> None:
    costs = loaded.sampler.costs
    assert costs is not None
    assert max(cost.rows for cost in costs.costs) <= 8  # four images with guidance
    assert {1, loaded.flow.config.num_patches} <= {cost.patches for cost in costs.costs}
    assert loaded.sampler.profile is not None
    assert loaded.info.convergence is not None
    assert loaded.info.convergence["gain"] == loaded.sampler.profile.gain


@pytest.mark.parametrize(("seconds_a_row", "rows"), [(SLICE_SECONDS / 100, 8), (SLICE_SECONDS / 6, 3), (1.0, 1)])
def test_slices_are_as_large_as_their_time_allows(loaded: LoadedModel, seconds_a_row: float, rows: int) -> None:
    patches = loaded.flow.config.num_patches
    known = [PassCost(rows=n, patches=patches, seconds=n * seconds_a_row * 0.999, threads=1) for n in (1, 2, 4, 8, 16)]
    model = replace(loaded)
    assert MOST_SLICE_ROWS["cpu"] == 8
    before = model.sampler.costs
    try:
        model.sampler.costs = CostProfile(known)
        assert model.slice_rows(2) == rows
    finally:
        model.sampler.costs = before


def test_costs_are_told_in_a_line(loaded: LoadedModel) -> None:
    line = describe(loaded.sampler.costs)
    assert "\n" not in line
    assert f"a pass of {loaded.flow.config.num_patches} patches takes" in line
    assert "not tuned" not in line
