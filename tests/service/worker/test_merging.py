"""Cohorts that meet at a block boundary become one, and no job can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundle import read_bundle
from model.sampling.plan import CostProfile, PassCost
from service.jobs import Job
from service.worker.cohort import Cohort
from service.worker.loading import LoadedModel
from service.worker.parts import Part
from service.worker.scoring import Arrays
from tests.service.worker.benches import decode
from tests.service.worker.desks import Desk, alone
from tests.service.worker.test_cohort import sample

NEAR = 1e-4
"""What float32 images of other batches may differ by."""


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-cond"), torch.device("cpu"))


def assert_same(got: Arrays, expected: Arrays) -> None:
    """All that a job is answered."""
    assert got.keys() == expected.keys()
    for name in ("images", "trajectory", "backward_error"):
        if name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=NEAR)
    for name in ("finite", "redone"):
        np.testing.assert_array_equal(got[name], expected[name])
    # A residual may round to the other side of where a row stops.
    assert np.abs(got["passes"] - expected["passes"]).max() <= 1


def until(cohort: Cohort, stage: str, block: int) -> None:
    while cohort.boundary is None or (cohort.boundary.stage, cohort.boundary.block) != (stage, block):
        assert not cohort.advance()


def run(cohort: Cohort) -> dict[str, Arrays]:
    while not cohort.advance():
        pass
    return {part.job.id: arrays for part, arrays in cohort.results()}


WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sequential": ({}, ("blocks",)),
    "certified": ({"certify": True}, ("blocks",)),
    "jacobi": ({"solver": "jacobi"}, ("blocks",)),
    "polished": ({"precision": "bf16"}, ("draft", "polish")),
}


@pytest.mark.parametrize(("way", "stage"), [(way, stage) for way, (_, stages) in WAYS.items() for stage in stages])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_merged_cohorts_are_as_apart(tiny: LoadedModel, way: str, stage: str, block: int) -> None:
    """Guided and not, with tolerances of their own; each has its own certificate and its own share of the time."""
    assert tiny.flow.config.num_blocks == 3
    solver = WAYS[way][0]
    jobs = [
        sample("a", tiny, [1, 2], 0, solver, trajectory=True, guidance_scale=1.0),
        sample("b", tiny, [3, 4, 5], 1, {**solver, "tolerance": 1e-4}, trajectory=True),
        sample("c", tiny, [6], None, solver, trajectory=True, guidance_scale=2.0, attention_temperature=0.5),
    ]
    first, second = Cohort(tiny, [Part.whole(jobs[0])]), Cohort(tiny, [Part.whole(job) for job in jobs[1:]])
    for cohort in (first, second):
        until(cohort, stage, block)
    assert first.meets(second)
    before = second.seconds
    assert not first.join(second)
    assert (first.rows, second.boundary) == (6, None)
    results = run(first)
    for job in jobs:
        assert_same(results[job.id], alone(tiny, job))
    seconds = [first.seconds_of(part) for part in first.parts]
    assert seconds[1] == seconds[2] > before
    assert all(len(first.plan_of(part)) == 3 for part in first.parts)


@pytest.mark.parametrize("leaving", [("a",), ("b",), ("c",), ("a", "c"), ("b", "c")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_rows_that_leave_a_merged_cohort_leave_no_trace(tiny: LoadedModel, leaving: Sequence[str], when: str) -> None:
    jobs = [sample(name, tiny, [n, n + 10], 0, {"solver": "jacobi"}) for n, name in enumerate("abc")]
    first, second = Cohort(tiny, [Part.whole(jobs[0])]), Cohort(tiny, [Part.whole(job) for job in jobs[1:]])
    for cohort in (first, second):
        until(cohort, "blocks", 1)
        if when == "before":
            cohort.drop(leaving)
    assert not first.join(second)
    if when == "after":
        first.drop(leaving)
    results = run(first)
    assert results.keys() == {"a", "b", "c"} - set(leaving)
    for job in jobs:
        if job.id in results:
            assert_same(results[job.id], alone(tiny, job))


def test_when_all_rows_left_before_they_merge_nothing_is_left(tiny: LoadedModel) -> None:
    first, second = (Cohort(tiny, [Part.whole(sample(name, tiny, [1], 0))]) for name in "ab")
    for cohort in (first, second):
        until(cohort, "blocks", 1)
        cohort.drop(["a", "b"])
    assert first.join(second)
    assert first.results() == []


def test_what_was_exact_stays_exact(tiny: LoadedModel) -> None:
    """Sequential so far: iterating the rest for the sake of a mate would cost a certificate nobody asked for."""
    first, second = (Cohort(tiny, [Part.whole(sample(name, tiny, [1], 0))]) for name in "ab")
    for cohort in (first, second):
        until(cohort, "blocks", 1)
    first.join(second)
    assert all(np.isnan(arrays["backward_error"]).all() for arrays in run(first).values())


def test_the_rest_is_planned_anew_for_the_rows_of_both(models: Path) -> None:
    """Here one row is iterated and two are decoded patch by patch; both keep their certificates."""
    model = LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))
    patches = model.flow.config.num_patches
    seconds = {(1, 1): 1e-3, (2, 1): 1e-3, (1, patches): 1e-4, (2, patches): 1.0}
    model.sampler.costs = CostProfile(
        [PassCost(rows=rows, patches=n, seconds=time, threads=1) for (rows, n), time in seconds.items()]
    )
    jobs = [decode(name, seed=n) for n, name in enumerate("ab")]
    first, second = (Cohort(model, [Part.whole(job)]) for job in jobs)
    for cohort in (first, second):
        until(cohort, "blocks", 1)
    assert not first.join(second)
    results = run(first)
    for part, job in zip(first.parts, jobs, strict=True):
        begun, then = first.plan_of(part)
        assert (begun.split("/")[0], then) == ("jacobi", "sequential")
        assert results[job.id]["backward_error"].max() <= 1e-3
        np.testing.assert_allclose(results[job.id]["images"], alone(model, job)["images"], atol=2e-3)


# Who waits for whom.


def started(desk: Desk, *jobs: Job) -> list[Cohort]:
    """A cohort for each of some jobs, in flight."""
    for job in jobs:
        desk.add(job)
    desk.long.turn()
    return sorted(desk.long.cohorts, key=lambda cohort: cohort.jobs[0].id)


def test_the_first_waits_for_one_in_the_block_before_and_then_they_are_one(tiny: LoadedModel) -> None:
    desk, jobs = Desk(tiny), [sample(name, tiny, [n], 0, {"solver": "jacobi"}) for n, name in enumerate("ab")]
    [first] = started(desk, jobs[0])
    while first.boundary is None or first.boundary.block != 1:
        desk.long.turn()
        if first.block == 0 and first.boundary is None and not desk.long.jobs[1:]:
            desk.add(jobs[1])
    seconds = first.seconds
    while len(desk.long.cohorts) == 2:
        assert first.seconds == seconds
        desk.long.turn()
    assert desk.counted("tarflow_cohort_merges_total") == 1
    results = desk.finish()
    for job in jobs:
        assert_same(dict(results[job.id].arrays), alone(tiny, job))
        assert results[job.id].arrays["backward_error"].max() <= 1e-3
        assert len(results[job.id].plan) == 3


def test_nobody_waits_for_one_that_does_not_fit(tiny: LoadedModel) -> None:
    desk = Desk(tiny, batch_rows=3)
    jobs = [sample(name, tiny, [n, n + 10], 0) for n, name in enumerate("ab")]
    for cohort in started(desk, *jobs):
        until(cohort, "blocks", 1)
    assert desk.finish().keys() == {"a", "b"}
    assert desk.counted("tarflow_cohort_merges_total") == 0


def test_the_wait_is_for_a_block_at_most(tiny: LoadedModel) -> None:
    """One that comes into the block before after the first has come to its end is not waited for."""
    desk = Desk(tiny)
    first, second, third = started(desk, *(sample(name, tiny, [n], 0) for n, name in enumerate("abc")))
    until(first, "blocks", 1)
    until(second, "blocks", 0)
    assert not second.advance()
    until(third, "blocks", 0)
    meetings = desk.long._meetings
    everyone = [first, second, third]
    assert meetings.waits(first, everyone)
    assert not third.advance()
    assert first.is_followed_by(third)
    until(second, "blocks", 1)
    assert not meetings.waits(first, everyone)
    assert meetings.partner(first, everyone) is second


def test_a_job_that_was_lost_before_goes_alone(tiny: LoadedModel) -> None:
    """It may be what its worker died of: others must not be in its batch."""
    desk, together = Desk(tiny), set[tuple[str, ...]]()
    desk.add(sample("a", tiny, [1], 0), replace(sample("b", tiny, [2], 0), attempt=2))
    desk.add(sample("c", tiny, [3], 0))
    while desk.long.turn():
        together.update(tuple(sorted(job.id for job in cohort.jobs)) for cohort in desk.long.cohorts)
    assert ("b",) in together
    assert ("a", "c") in together
    assert all(jobs == ("b",) for jobs in together if "b" in jobs)


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_whatever_comes_and_goes_every_job_is_as_alone(tiny: LoadedModel, data: st.DataObject) -> None:
    """Jobs of several kinds and sizes come at any time, and some leave at any time."""
    most = data.draw(st.integers(2, 8))
    desk = Desk(tiny, batch_rows=most, max_cohorts=data.draw(st.integers(1, 4)))
    kinds = st.sampled_from([{}, {"solver": "jacobi"}, {"certify": True}])
    jobs = [
        sample(
            f"job-{n}",
            tiny,
            list(range(10 * n, 10 * n + data.draw(st.integers(1, 5)))),
            n % 3,
            data.draw(kinds),
            denoise=data.draw(st.booleans()),
            guidance_scale=data.draw(st.sampled_from([0.0, 1.0])),
        )
        for n in range(data.draw(st.integers(2, 5)))
    ]
    waiting, left = list(jobs), set[str]()
    while waiting or desk.long.busy:
        action = data.draw(st.integers(0, 9)) if waiting or len(left) < 2 else 2
        if waiting and action < 2:
            desk.add(waiting.pop(0))
        elif action == 9 and len(left) < 2 and desk.long.jobs:
            leaving = data.draw(st.sampled_from([job.id for job in desk.long.jobs]))
            left.add(leaving)
            desk.long.drop([leaving])
        else:
            for _ in range(data.draw(st.sampled_from([1, 4, 16]))):
                desk.long.turn()
        assert all(cohort.rows <= most for cohort in desk.long.cohorts)
        assert all(0 <= held.fraction <= 1 for held in desk.long.held())
    assert desk.tray.results.keys() == {job.id for job in jobs} - left
    assert not desk.tray.errors
    for job in jobs:
        if job.id not in left:
            assert_same(dict(desk.tray.results[job.id].arrays), alone(tiny, job))
