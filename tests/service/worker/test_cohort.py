"""Cohorts: rows that leave do not change those that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from model.config import SolverOptions
from model.sampling.sampler import Redone
from service.jobs import REDONE, Job, Op
from service.worker.cohort import Cohort, group
from service.worker.loading import LoadedModel
from service.worker.parts import Part
from service.worker.scoring import Arrays


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-cond"), torch.device("cpu"))


def sample(
    job_id: str,
    model: LoadedModel,
    seeds: list[int],
    label: int | None,
    solver: dict[str, Any] | None = None,
    trajectory: bool = False,
    **options: Any,
) -> Job:
    payload = {
        "seeds": seeds,
        "label": label,
        "options": {**model.info.sampling.to_dict(), "denoise": True, **options},
        "solver": SolverOptions(**(solver or {})).to_dict(),
        "trajectory": trajectory,
        "floats": True,
    }
    return Job(id=job_id, op=Op.SAMPLE, model="tiny-cond", payload=payload, rows=len(seeds), cost=1)


def whole(*jobs: Job) -> list[Part]:
    return [Part.whole(job) for job in jobs]


def run(cohort: Cohort) -> dict[str, Arrays]:
    while not cohort.advance():
        pass
    return {part.job.id: arrays for part, arrays in cohort.results()}


def finish(cohort: Cohort) -> dict[str, np.ndarray]:
    return {job_id: arrays["images"] for job_id, arrays in run(cohort).items()}


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
    alone = {job.id: finish(Cohort(tiny, whole(job)))[job.id] for job in jobs}
    total = slices(Cohort(tiny, whole(*jobs)))
    assert total > 10
    for leaving in ("a", "b", "c"):
        for after in (0, 1, total // 3, 2 * total // 3, total - 1):
            cohort = Cohort(tiny, whole(*jobs))
            for _ in range(after):
                assert not cohort.advance()
            cohort.drop([leaving, "unknown"])
            results = finish(cohort)
            assert results.keys() == alone.keys() - {leaving}
            for job_id, images in results.items():
                np.testing.assert_allclose(images, alone[job_id], atol=1e-4)


def test_when_all_leave_the_work_ends(tiny: LoadedModel, jobs: list[Job]) -> None:
    cohort = Cohort(tiny, whole(*jobs))
    assert not cohort.advance()
    cohort.drop(["a", "b", "c"])
    assert cohort.advance()
    assert cohort.results() == []


def test_progress_grows_to_one(tiny: LoadedModel, jobs: list[Job]) -> None:
    cohort, seen = Cohort(tiny, whole(*jobs)), [0.0]
    while not cohort.advance():
        seen.append(cohort.fraction)
        assert 0 <= cohort.fraction <= 1


def test_jobs_of_the_same_stages_share_a_cohort(tiny: LoadedModel) -> None:
    jobs = [
        sample("clean", tiny, [1], 0),
        sample("noisy", tiny, [2], 0, denoise=False),
        sample("guided", tiny, [3], 1, guidance_scale=1.0, guidance_rule="closed_form"),
        sample("strict", tiny, [3], 1, {"tolerance": 1e-5}, trajectory=True),
        sample("jacobi", tiny, [4], 1, {"solver": "jacobi"}),
        sample("rough", tiny, [4], 1, {"precision": "bf16"}),
        sample("certified", tiny, [4], 1, {"certify": True}),
        sample("uncertified", tiny, [4], 1, {"certify": False}),
    ]
    together = [["clean", "guided", "strict"], *([name] for name in ("noisy", "jacobi", "rough"))]
    together += [["certified"], ["uncertified"]]
    assert [[part.job.id for part in parts] for parts in group(whole(*jobs))] == together


def test_the_reasons_have_the_numbers_of_the_sampler() -> None:
    assert [REDONE[code] is None for code in Redone] == [True, False, False]
    assert (REDONE[Redone.TOLERANCE], REDONE[Redone.NOT_FINITE]) == ("tolerance", "non_finite")
    assert len(REDONE) == len(Redone)


def test_every_job_has_its_own_tolerance(tiny: LoadedModel) -> None:
    lax = sample("lax", tiny, [1, 2], 0, {"solver": "jacobi", "tolerance": 1.0})
    strict = sample("strict", tiny, [1, 2], 0, {"solver": "jacobi", "tolerance": 1e-5})
    results = run(Cohort(tiny, whole(lax, strict)))
    assert results["strict"]["backward_error"].max() <= 1e-5 < results["lax"]["backward_error"].min()
    assert results["strict"]["passes"].min() > results["lax"]["passes"].max()


def test_only_who_asks_gets_a_trajectory(tiny: LoadedModel) -> None:
    wants = sample("wants", tiny, [1, 2], 0, trajectory=True)
    other = sample("other", tiny, [3], 0)
    results = run(Cohort(tiny, whole(other, wants)))
    assert "trajectory" not in results["other"]
    states = results["wants"]["trajectory"]
    config = tiny.flow.config
    assert states.shape == (2, config.num_blocks, 3, 16, 16)
    assert states.dtype == np.float32
    np.testing.assert_allclose(run(Cohort(tiny, whole(wants)))["wants"]["trajectory"], states, atol=1e-4)


def test_certificates_stay_with_their_images_while_others_leave(tiny: LoadedModel) -> None:
    how = {"solver": "jacobi"}
    jobs = [sample(name, tiny, [n, n + 10], 0, how, trajectory=True) for n, name in enumerate("abc")]
    alone = {job.id: run(Cohort(tiny, whole(job)))[job.id] for job in jobs}
    assert len({arrays["backward_error"][0] for arrays in alone.values()}) == 3
    total = slices(Cohort(tiny, whole(*jobs)))
    denoising = 2 * tiny.flow.config.num_blocks
    # In the iterations, in the certificate, and twice in the denoising, which the sampler does not see.
    for after in (2, total - denoising - 1, total - denoising + 1, total - 1):
        cohort = Cohort(tiny, whole(*jobs))
        for _ in range(after):
            assert not cohort.advance()
        cohort.drop(["b"])
        results = run(cohort)
        assert results.keys() == {"a", "c"}
        for job_id, arrays in results.items():
            for name in ("images", "trajectory", "backward_error"):
                np.testing.assert_allclose(arrays[name], alone[job_id][name], atol=1e-4)
            np.testing.assert_array_equal(arrays["passes"], alone[job_id]["passes"])


def test_sequential_images_have_no_certificate_unless_they_are_to(tiny: LoadedModel) -> None:
    plain = Cohort(tiny, whole(sample("a", tiny, [1], 0)))
    assert np.isnan(run(plain)["a"]["backward_error"]).all()
    assert plain.plan is not None
    assert plain.plan.is_sequential
    certified = run(Cohort(tiny, whole(sample("a", tiny, [1], 0, {"certify": True}))))["a"]
    assert 0 <= certified["backward_error"][0] < 1e-3
