"""Jobs that come at a bad time: again, before the worker knows that it lost them, or for another version of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from service.jobs import Job
from service.worker.loading import LoadedModel
from tests.service.worker.benches import decode, score
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


def test_a_class_that_a_new_version_has_not_fails_alone(models: Path) -> None:
    """Jobs that waited while a model was replaced were accepted for the old one."""
    model = LoadedModel.load(read_bundle(models / "tiny-cond"), torch.device("cpu"))
    config = model.flow.config

    def labelled(job: Job, label: int) -> Job:
        return replace(job, model="tiny-cond", payload={**job.payload, "label": label})

    def pixels(job: Job) -> Job:
        shape = (1, config.channels, config.image_size, config.image_size)
        return replace(job, payload={**job.payload, "pixels": np.zeros(shape, np.uint8)})

    def latents(job: Job) -> Job:
        shape = (1, config.num_patches, config.patch_dim)
        return replace(job, payload={**job.payload, "latents": np.zeros(shape, np.float32)})

    desk, unknown = Desk(model), config.num_classes
    desk.urgent.run([(model, labelled(pixels(score(f"s{y}")), y)) for y in (0, unknown)])
    desk.add(*(labelled(latents(decode(f"d{y}")), y) for y in (0, unknown)))
    desk.finish()
    assert desk.tray.results.keys() == {"s0", "d0"}
    assert desk.tray.errors.keys() == {f"s{unknown}", f"d{unknown}"}
