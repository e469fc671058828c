"""Statistics of score jobs: those of the model, whatever the batch, and only where they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.anomaly.statistics import image_statistics, likelihood_and_statistics
from model.bundle import read_bundle
from service.jobs import STATISTICS, Job, Op
from service.worker import statistics as statistics_of_jobs
from service.worker.loading import LoadedModel
from service.worker.scoring import score


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-cond"), torch.device("cpu"))


def job(rows: int, *, label: int | None = None, statistics: dict[str, Any] | None = None) -> Job:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 3, 16, 16), dtype=np.uint8)
    payload = {"pixels": pixels, "label": label, "draws": 2, "seed": 1, "statistics": statistics}
    return Job(id=f"{rows}", op=Op.SCORE, model="tiny-cond", payload=payload, rows=rows, cost=1)


@pytest.mark.parametrize("gradient", [False, True])
def test_they_are_those_of_the_images_without_a_class(tiny: LoadedModel, gradient: bool) -> None:
    wanted = [{"seed": seed, "gradient": gradient} for seed in (5, 6)]
    jobs = [job(3, statistics=wanted[0]), job(10, label=2, statistics=wanted[1]), job(2)]
    for batch_rows in (1, 4, 64):
        *asked, plain = score(tiny, jobs, batch_rows)
        assert plain.keys() == {"log_likelihood", "log_likelihood_std", "bits_per_dim"}
        for one, arrays, seed in zip(jobs[:2], asked, (5, 6), strict=True):
            pixels = torch.from_numpy(one.payload["pixels"])
            expected = image_statistics(tiny.flow, tiny.noise, pixels, None, seed=seed, gradient=gradient)
            assert {name for name in arrays if name.startswith(STATISTICS)} == {STATISTICS + name for name in expected}
            for name, values in expected.items():
                tolerance = 1e-3 * np.abs(values).max()
                np.testing.assert_allclose(arrays[STATISTICS + name], values, rtol=1e-3, atol=tolerance)


def test_they_leave_the_likelihood_as_it_is(tiny: LoadedModel) -> None:
    plain, asking = job(4, label=1), job(4, label=1, statistics={"seed": 0, "gradient": True})
    [expected], [found] = score(tiny, [plain], 64), score(tiny, [asking], 64)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["tiny-cond", "tiny-uniform", "tiny-vp"])
def test_one_pass_gives_both_where_noise_and_class_are_the_same(models: Path, name: str, gradient: bool) -> None:
    """The numbers are those of two passes, to the last digit; otherwise each has its own."""
    model = LoadedModel.load(read_bundle(models / name), torch.device("cpu"))
    shape = (model.flow.config.channels, *[model.flow.config.image_size] * 2)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    plain = replace(job(5), model=name, payload={**job(5).payload, "pixels": pixels, "draws": 1})
    same = {"seed": 1, "gradient": gradient}
    cases = {
        "shared": {"statistics": same},
        "other noise": {"statistics": {**same, "seed": 2}},
        "more draws": {"statistics": same, "draws": 3},
    } | ({"a class": {"statistics": same, "label": 1}} if model.flow.config.num_classes else {})
    passed: list[int] = []
    model.flow.blocks[0].register_forward_pre_hook(lambda _, given: passed.append(len(given[0])))
    asking = {case: replace(plain, payload={**plain.payload, **changes}) for case, changes in cases.items()}
    alone, rows = {}, {}
    for case, one in asking.items():
        [expected] = score(model, [replace(one, payload={**one.payload, "statistics": None})], 64)
        passed.clear()
        [alone[case]] = score(model, [one], 64)
        rows[case] = sum(passed)
        for key, values in expected.items():
            np.testing.assert_array_equal(alone[case][key], values, err_msg=f"{case}: {key}")
    # Five images: those of the statistics alone, and beside them five for every draw.
    assert rows["other noise"] == rows["shared"] + 5
    assert rows["more draws"] == rows["shared"] + 15
    if "a class" in cases:
        assert rows["a class"] == rows["shared"] + 5
    # Shared and unshared ones in one batch come back in their order.
    together = score(model, [*asking.values()][::-1], 64)
    for case, arrays in zip([*asking][::-1], together, strict=True):
        np.testing.assert_allclose(arrays["log_likelihood"], alone[case]["log_likelihood"], rtol=1e-5)


def test_nothing_is_computed_that_nobody_asked_for(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[2]))
        return likelihood_and_statistics(*arguments, **options)

    monkeypatch.setattr(statistics_of_jobs, "likelihood_and_statistics", counted)
    absent = job(3)
    absent = replace(absent, payload={k: v for k, v in absent.payload.items() if k != "statistics"})
    score(tiny, [absent, job(2)], 64)
    assert calls == []
    score(tiny, [job(11, statistics={"seed": 0, "gradient": True})], 64)
    # Backward passes have few rows.
    assert calls == [8, 3]
