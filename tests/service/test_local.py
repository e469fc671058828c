"""Sampling without a server: several batches, each by its own plan, told as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import SolverOptions
from model.sampling.plan import CostProfile, PassCost
from service import local
from service.worker.loading import LoadedModel


def test_certificates_of_some_batches_are_not_lost_among_others(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images together are decoded patch by patch here, and one alone is iterated and has a certificate."""

    def measure(model: LoadedModel, most_rows: int) -> None:
        assert most_rows == 2
        patches = model.flow.config.num_patches
        costs = [
            PassCost(rows=1, patches=1, seconds=1e-3, threads=1),
            PassCost(rows=2, patches=1, seconds=1e-3, threads=1),
        ]
        costs += [
            PassCost(rows=1, patches=patches, seconds=1e-4, threads=1),
            PassCost(rows=2, patches=patches, seconds=1.0, threads=1),
        ]
        model.sampler.costs = CostProfile(costs)

    monkeypatch.setattr(LoadedModel, "measure", measure)
    monkeypatch.setattr(local, "BATCH_ROWS", 2)
    options = {"label": None, "overrides": {"denoise": False, "guidance_scale": 0.0}}
    drawn = local.sample(str(models / "tiny-vp"), "cpu", seeds=range(3), solver=SolverOptions(), **options)
    assert len(drawn.plans) == 2
    assert drawn.certified is True
    assert drawn.backward_error is not None
    assert 0 < drawn.backward_error <= 1e-3
    alone = local.sample(str(models / "tiny-vp"), "cpu", seeds=range(2), solver=SolverOptions(), **options)
    assert (alone.backward_error, alone.certified) == (None, None)
