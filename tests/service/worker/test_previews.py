"""Previews: the states of the trajectory while it is being made, and nothing where nobody asked."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundle import read_bundle
from service.jobs import Job
from service.worker.cohort import Cohort, preview_blocks
from service.worker.loading import LoadedModel
from service.worker.parts import Part
from tests.service.worker.desks import Desk, alone
from tests.service.worker.test_cohort import sample

BLOCKS = 3


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-cond"), torch.device("cpu"))


@given(st.integers(1, 40), st.integers(0, 100))
def test_blocks_are_spread_evenly_and_the_last_is_never_shown(num_blocks: int, previews: int) -> None:
    blocks = sorted(preview_blocks(num_blocks, previews))
    assert len(blocks) == min(previews, num_blocks - 1)
    assert all(0 < block < num_blocks for block in blocks)
    gaps = np.diff([0, *blocks, num_blocks])
    assert gaps.max() - gaps.min() <= 1 or not previews


def asked(job: Job, previews: int) -> Job:
    return replace(job, payload={**job.payload, "previews": previews})


def assert_shown(desk: Desk, job: Job, previews: int) -> None:
    """What was published of a job are the states that it goes through, of each of its rows once."""
    expected = alone(desk.model, replace(job, payload={**job.payload, "trajectory": True, "floats": False}))
    shown: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for job_id, kind, data in desk.tray.published:
        if job_id == job.id:
            assert (kind, data["blocks"], data["pixels"].dtype) == ("preview", BLOCKS, np.uint8)
            shown[data["block"]].append((data["start"], data["pixels"]))
    assert shown.keys() == preview_blocks(BLOCKS, previews)
    for block, pieces in shown.items():
        pieces.sort(key=lambda piece: piece[0])
        states = np.concatenate([pixels for _, pixels in pieces])
        assert [start for start, _ in pieces] == list(np.cumsum([0, *(len(pixels) for _, pixels in pieces)])[:-1])
        # Rounded from floats that agree but for their last digits.
        assert np.abs(states.astype(int) - expected["trajectory"][:, block - 1]).max() <= 1


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_whatever_comes_and_goes_everyone_sees_his_own(tiny: LoadedModel, data: st.DataObject) -> None:
    """Jobs with and without previews share cohorts, meet others, are cut in parts, and some leave."""
    most = data.draw(st.integers(2, 8))
    desk = Desk(tiny, batch_rows=most, max_cohorts=data.draw(st.integers(1, 4)))
    jobs = {
        f"job-{n}": (
            sample(
                f"job-{n}",
                tiny,
                list(range(10 * n, 10 * n + data.draw(st.integers(1, 5)))),
                n % 3,
                data.draw(st.sampled_from([{}, {"certify": True}])),
                denoise=data.draw(st.booleans()),
            ),
            data.draw(st.integers(0, 3)),
        )
        for n in range(data.draw(st.integers(2, 4)))
    }
    waiting, left = [asked(job, previews) for job, previews in jobs.values()], set[str]()
    while waiting or desk.long.busy:
        action = data.draw(st.integers(0, 9)) if waiting or not left else 2
        if waiting and action < 2:
            desk.add(waiting.pop(0))
        elif action == 9 and not left and desk.long.jobs:
            left.add(data.draw(st.sampled_from([job.id for job in desk.long.jobs])))
            desk.long.drop(left)
        else:
            for _ in range(data.draw(st.sampled_from([1, 4, 16]))):
                desk.long.turn()
    for job_id, (job, previews) in jobs.items():
        if job_id not in left:
            assert_shown(desk, job, previews)


def test_a_draft_is_shown_and_its_polish_is_not(tiny: LoadedModel) -> None:
    desk = Desk(tiny)
    desk.add(asked(sample("a", tiny, [1, 2], 0, {"precision": "bf16"}), 2))
    desk.finish()
    assert [data["block"] for _, _, data in desk.tray.published] == [1, 2]


def test_nothing_is_made_for_nobody(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Cohort(tiny, [Part.whole(sample("a", tiny, [1], 0)), Part.whole(sample("b", tiny, [2], 0))])
    monkeypatch.setattr(LoadedModel, "pixels", lambda *_: pytest.fail("nobody asked"))
    while cohort.fraction < 1 and cohort.stage != "denoise":
        cohort.advance()
        assert cohort.previews() == []
