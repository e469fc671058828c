"""Cohorts: rows that leave do not change those that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from model.weights import load_flow
from service.jobs import Job, ModelInfo, Op
from service.worker.cohort import Cohort, group
from service.worker.loading import LoadedModel


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    bundle = read_bundle(models / "tiny-cond")
    return LoadedModel(ModelInfo.of(bundle), load_flow(bundle), torch.device("cpu"))


def sample(job_id: str, model: LoadedModel, seeds: list[int], label: int | None, **options: Any) -> Job:
    payload = {
        "seeds": seeds,
        "label": label,
        "options": {**model.info.sampling.to_dict(), "denoise": True, **options},
        "floats": True,
    }
    return Job(id=job_id, op=Op.SAMPLE, model="tiny-cond", payload=payload, rows=len(seeds), cost=1)


def finish(cohort: Cohort) -> dict[str, np.ndarray]:
    while not cohort.advance():
        pass
    return {job.id: arrays["images"] for job, arrays in cohort.results()}


def slices(cohort: Cohort) -> int:
    count = 0
    while not cohort.advance():
        count += 1
    return count


@pytest.fixture(scope="module")
def jobs(tiny: LoadedModel) -> list[Job]:
    return [
        sample("a", tiny, [1, 2], 0, guidance_scale=1.0),
        sample("b", tiny, [3, 4, 5], 1),
        sample("c", tiny, [6], None, guidance_scale=2.0, guidance_schedule="linear", attention_temperature=0.5),
    ]


def test_whoever_leaves_whenever_the_others_keep_their_images(tiny: LoadedModel, jobs: list[Job]) -> None:
    alone = {job.id: finish(Cohort(tiny, [job]))[job.id] for job in jobs}
    total = slices(Cohort(tiny, jobs))
    assert total > 10
    for leaving in ("a", "b", "c"):
        for after in (0, 1, total // 3, 2 * total // 3, total - 1):
            cohort = Cohort(tiny, jobs)
            for _ in range(after):
                assert not cohort.advance()
            cohort.drop([leaving, "unknown"])
            results = finish(cohort)
            assert results.keys() == alone.keys() - {leaving}
            for job_id, images in results.items():
                np.testing.assert_allclose(images, alone[job_id], atol=1e-4)


def test_when_all_leave_the_work_ends(tiny: LoadedModel, jobs: list[Job]) -> None:
    cohort = Cohort(tiny, jobs)
    assert not cohort.advance()
    cohort.drop(["a", "b", "c"])
    assert cohort.advance()
    assert cohort.results() == []


def test_progress_grows_to_one(tiny: LoadedModel, jobs: list[Job]) -> None:
    cohort, seen = Cohort(tiny, jobs), [0.0]
    while not cohort.advance():
        seen.append(cohort.fraction)
        assert 0 <= cohort.fraction <= 1


def test_jobs_of_the_same_stages_share_a_cohort(tiny: LoadedModel) -> None:
    clean, noisy, more = (
        sample("a", tiny, [1], 0),
        sample("b", tiny, [2], 0, denoise=False),
        sample("c", tiny, [3], 1, guidance_scale=1.0),
    )
    assert [[job.id for job in jobs] for jobs in group([clean, noisy, more])] == [["a", "c"], ["b"]]
