"""A worker that lost a job and gets it again: what it had begun of the earlier attempt does not get in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from service.worker.loading import LoadedModel
from tests.service.worker.benches import decode
from tests.service.worker.desks import Desk, alone


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))


@pytest.mark.parametrize("turns", [1, 5, 20, 60, 80])
def test_attempts_of_one_job_do_not_mix(tiny: LoadedModel, turns: int) -> None:
    """After an outage longer than the lease a worker may be given its own job before it hears that it lost it."""
    desk, job = Desk(tiny, batch_rows=4, max_cohorts=2), decode("a", rows=10)
    desk.add(job)
    for _ in range(turns):
        desk.long.turn()
    assert desk.long.busy
    desk.add(replace(job, attempt=2))
    assert [held.attempt for held in desk.long.held()] == [2]
    result = desk.finish()["a"].arrays
    assert len(result["pixels"]) == job.rows
    np.testing.assert_allclose(result["images"], alone(tiny, job)["images"], atol=1e-4)
