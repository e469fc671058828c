"""Batches that run out of memory get smaller, and only what does not fit alone fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.bundle import read_bundle
from model.device import is_out_of_memory
from model.sampling.kernel import BlockKernel
from model.sampling.rows import Rows
from service.jobs import EXIT_DEVICE_LOST, Job
from service.worker import ceilings as ceilings_module
from service.worker import faults, outcomes, room
from service.worker.faults import DeviceLost, check_device
from service.worker.loading import LoadedModel
from service.worker.parts import Part, pack
from service.worker.room import Room, row_bytes
from service.worker.urgent import batches
from tests.service.worker.benches import decode, score
from tests.service.worker.desks import Desk, alone

LARGE = 64.0
"""A latent or a grey value that no other has: the mark of a row that never fits."""


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))


@contextmanager
def small_device(model: LoadedModel, most_rows: int) -> Iterator[list[int]]:
    """A device on which a pass of more network rows runs out of memory; the rows of all passes that were tried.

    A row with a value of :data:`LARGE` never fits. Sampling's passes go through the kernel, all others through the
    modules.
    """
    tried: list[int] = []

    def check(rows: int, values: Tensor) -> None:
        tried.append(rows)
        if rows > most_rows or bool((values.abs() >= LARGE).any()):
            raise torch.OutOfMemoryError(f"{rows} rows")

    run = BlockKernel.run

    def kernel(own: BlockKernel, x_NRD: Tensor, *rest: Any) -> Tensor:
        check(x_NRD.shape[1], x_NRD)
        return run(own, x_NRD, *rest)

    hooks = [
        block.register_forward_pre_hook(lambda _, given: check(len(given[0]), given[0])) for block in model.flow.blocks
    ]
    BlockKernel.run = kernel  # type: ignore[method-assign]
    try:
        yield tried
    finally:
        BlockKernel.run = run  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


def assert_images(desk: Desk, jobs: list[Job], model: LoadedModel) -> None:
    for job in jobs:
        got, expected = desk.tray.results[job.id].arrays, alone(model, job)
        assert got.keys() == expected.keys()
        assert len(got["pixels"]) == job.rows
        np.testing.assert_allclose(got["images"], expected["images"], atol=1e-4)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_sampling_goes_on_in_smaller_batches(tiny: LoadedModel, most: int, solver: str) -> None:
    desk = Desk(tiny, batch_rows=16)
    jobs = [decode(name, rows=rows, seed=rows, solver=solver) for name, rows in (("a", 9), ("b", 1), ("c", 4))]
    with small_device(tiny, most):
        desk.add(*jobs)
        desk.finish()
        assert not desk.tray.errors
        failures = desk.counted("tarflow_oom_total")
        assert failures > 0
        # What was learnt is remembered: the same again does not fail again.
        again = decode("d", rows=14, solver=solver)
        desk.add(again)
        desk.finish()
        assert desk.counted("tarflow_oom_total") == failures
    assert_images(desk, [*jobs, again], tiny)
    assert desk.counted("tarflow_batch_ceiling_rows", model="tiny-vp", op="sample") >= 1


def test_denoising_goes_on_in_smaller_slices(models: Path) -> None:
    model = LoadedModel.load(read_bundle(models / "tiny-uncond"), torch.device("cpu"))
    desk, size = Desk(model, batch_rows=16), model.flow.config
    job = decode("a", size.num_patches, 9, denoise=True)
    latents = np.random.default_rng(0).normal(size=(9, size.num_patches, size.patch_dim)).astype(np.float32)
    job = Job(**{**vars(job), "model": "tiny-uncond", "payload": {**job.payload, "latents": latents}})
    expected = alone(model, job)
    with small_device(model, 100):
        # Denoising is the only one here to use the modules: their blocks hold no more than three rows.
        limits = [
            block.register_forward_pre_hook(lambda _, given: _at_most(3, len(given[0]))) for block in model.flow.blocks
        ]
        desk.add(job)
        desk.finish()
        for limit in limits:
            limit.remove()
    np.testing.assert_allclose(desk.tray.results["a"].arrays["images"], expected["images"], atol=1e-4)
    assert desk.counted("tarflow_batch_ceiling_rows", op="denoise") == 2
    assert desk.counted("tarflow_batch_ceiling_rows", op="sample") == 0


def _at_most(most: int, rows: int) -> None:
    if rows > most:
        raise torch.OutOfMemoryError(f"{rows} rows")


@pytest.mark.parametrize("most", [1, 2, 5])
def test_scores_go_on_in_smaller_batches(tiny: LoadedModel, most: int) -> None:
    desk = Desk(tiny, batch_rows=16)
    jobs = [score(name, rows=rows, draws=2) for name, rows in (("a", 3), ("b", 1), ("c", 4))]
    desk.urgent.run([(tiny, job) for job in jobs])
    expected, desk.tray.results = desk.tray.results, {}
    with small_device(tiny, most) as tried:
        desk.urgent.run([(tiny, job) for job in jobs])
        assert max(tried) > most
        assert not desk.urgent.jobs
        failures = desk.counted("tarflow_oom_total", op="score")
        tried.clear()
        desk.urgent.run([(tiny, score("d", rows=16))])
        assert max(tried) <= most
        assert desk.counted("tarflow_oom_total", op="score") == failures > 0
    for job_id, result in expected.items():
        got = desk.tray.results[job_id].arrays["log_likelihood"]
        np.testing.assert_allclose(got, result.arrays["log_likelihood"], rtol=1e-5)


def test_gradients_have_a_ceiling_of_their_own(tiny: LoadedModel) -> None:
    desk = Desk(tiny, batch_rows=16)
    job = score("a", rows=7)
    job = replace(job, payload={**job.payload, "statistics": {"seed": 0, "gradient": True}})
    with small_device(tiny, 3):
        desk.urgent.run([(tiny, job)])
    assert desk.tray.results["a"].arrays["statistics.gradient"].shape[0] == 7
    assert desk.ceilings.most("tiny-vp", "score_gradient", 16) == 3
    assert desk.ceilings.most("tiny-vp", "score", 16) == 16


def test_urgent_batches_are_of_one_kind_and_the_large_come_last(tiny: LoadedModel) -> None:
    gradient = {"statistics": {"seed": 0, "gradient": True}}
    jobs = [score("large", rows=4, draws=4), score("a", rows=3), score("b", rows=4), score("c", rows=2)]
    jobs.insert(2, replace(jobs[1], id="g", payload={**jobs[1].payload, **gradient}))
    found = [[job.id for _, job in batch] for batch in batches([(tiny, job) for job in jobs], 8)]
    assert found == [["a", "b"], ["c"], ["g"], ["large"]]


def test_only_the_sample_that_never_fits_fails(tiny: LoadedModel) -> None:
    desk = Desk(tiny, batch_rows=16)
    jobs = [decode("a", rows=5), decode("bad", rows=3), decode("b", rows=2)]
    jobs[1].payload["latents"][1] = 2 * LARGE
    with small_device(tiny, 100):
        desk.add(*jobs)
        desk.finish()
    assert desk.tray.errors.keys() == {"bad"}
    assert desk.tray.errors["bad"].code == "out_of_memory"
    assert_images(desk, [jobs[0], jobs[2]], tiny)
    # It was the row; batches of others need not be small for it.
    assert desk.ceilings.most("tiny-vp", "sample", 16) == 16
    assert desk.counted("tarflow_batch_ceiling_rows") == 0


def test_only_the_score_that_never_fits_fails(tiny: LoadedModel) -> None:
    desk = Desk(tiny, batch_rows=16)
    jobs = [score("a", rows=5), score("bad", rows=3), score("b", rows=2)]
    with small_device(tiny, 100):
        hook = tiny.flow.blocks[0].register_forward_pre_hook(lambda _, given: _no_white(given[0]))
        jobs[1].payload["pixels"][1] = 255
        desk.urgent.run([(tiny, job) for job in jobs])
        hook.remove()
    assert desk.tray.results.keys() == {"a", "b"}
    assert {job_id: error.code for job_id, error in desk.tray.errors.items()} == {"bad": "out_of_memory"}
    assert not desk.urgent.jobs


def _no_white(x_BTD: Tensor) -> None:
    if bool((x_BTD.mean(dim=(1, 2)) > 0.5).any()):
        raise torch.OutOfMemoryError("white")


def test_a_row_that_lacks_memory_beside_others_is_tried_without_them(tiny: LoadedModel) -> None:
    """Two at a time do not fit, each for itself does."""
    desk, others = Desk(tiny, batch_rows=1), [decode("a"), decode("b", seed=1)]
    hooked = BlockKernel.run

    def run(own: BlockKernel, x_NRD: Tensor, *rest: Any) -> Tensor:
        if len(desk.long.cohorts) > 1:
            raise torch.OutOfMemoryError("two cohorts")
        return hooked(own, x_NRD, *rest)

    BlockKernel.run = run  # type: ignore[method-assign]
    try:
        desk.add(*others)
        desk.finish()
    finally:
        BlockKernel.run = hooked  # type: ignore[method-assign]
    assert_images(desk, others, tiny)


def test_a_ceiling_is_lifted_after_a_while(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = Desk(tiny).ceilings
    assert ceilings.failed("m", "sample", 9) == 4
    assert [ceilings.most("m", "sample", n) for n in (16, 3)] == [4, 3]
    assert ceilings.most("m", "score", 16) == 16
    monkeypatch.setattr(ceilings_module, "HOLD_SECONDS", -1.0)
    assert ceilings.most("m", "sample", 16) == 8
    assert ceilings.most("m", "sample", 16) == 16
    monkeypatch.undo()
    assert ceilings.most("m", "sample", 64) == 64


# Rows are the unit.


def test_parts_are_cut_to_fill_loads() -> None:
    parts = [Part.whole(decode(name, rows=rows)) for name, rows in (("a", 5), ("b", 1), ("c", 2))]
    loads = [[(part.job.id, part.start, part.stop) for part in load] for load in pack(parts, 3)]
    assert loads == [[("a", 0, 3)], [("a", 3, 5), ("b", 0, 1)], [("c", 0, 2)]]


def test_a_job_larger_than_a_batch_is_done_in_parts(tiny: LoadedModel) -> None:
    desk = Desk(tiny, batch_rows=4, max_cohorts=2)
    jobs = [decode("large", rows=19, solver="jacobi"), decode("small", rows=2, seed=1, solver="jacobi")]
    desk.add(*jobs)
    while desk.long.turn():
        assert all(cohort.rows <= 4 for cohort in desk.long.cohorts)
        assert len(desk.long.cohorts) <= 2
        fractions = {held.job_id: held.fraction for held in desk.long.held()}
        assert all(0 <= fraction <= 1 for fraction in fractions.values())
    assert_images(desk, jobs, tiny)
    assert len(desk.tray.results["large"].arrays["backward_error"]) == 19
    assert desk.counted("tarflow_images_total") == 21


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_keep_within_the_room_there_is(tiny: LoadedModel, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = int((rows + 0.5) * row_bytes(tiny) / room.HOST_SHARE)
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    desk, job = Desk(tiny, batch_rows=16, max_cohorts=4), decode("a", rows=8)
    desk.add(job)
    while desk.long.turn():
        assert sum(cohort.rows for cohort in desk.long.cohorts) <= rows
    assert_images(desk, [job], tiny)


def test_a_row_is_tried_even_where_there_is_no_room(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 0)
    assert Room(torch.device("cpu")).rows(tiny) == 1


def test_the_room_on_this_host_is_told() -> None:
    assert 2**20 < room.free_bytes(torch.device("cpu")) < 2**50


# What an error means.


def test_what_the_host_says_without_memory_is_understood() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    with pytest.raises(MemoryError) as refused_too:
        np.empty(2**60, dtype=np.uint8)
    assert is_out_of_memory(refused_too.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def _broken(*_: object, **__: object) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("make", [decode, score])
def test_a_device_that_fails_for_good_ends_the_process(
    tiny: LoadedModel, make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tiny)
    monkeypatch.setattr(BlockKernel, "run", _broken)
    hook = tiny.flow.blocks[0].register_forward_pre_hook(_broken)
    monkeypatch.setattr(faults.torch, "zeros", _broken)
    work: Callable[[], object] = desk.finish
    if make is decode:
        desk.add(make("a"))
    else:
        work = partial(desk.urgent.run, [(tiny, make("a"))])
    with pytest.raises(DeviceLost) as lost:
        work()
    hook.remove()
    assert lost.value.code == EXIT_DEVICE_LOST
    # Nobody was told anything: others will do it.
    assert not desk.tray.errors


def test_a_device_that_works_goes_on() -> None:
    check_device(torch.device("cpu"))


def test_cohorts_that_have_no_memory_to_become_one_lose_no_job(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are copied when cohorts meet, and that may be what does not fit any more."""
    desk, jobs = Desk(tiny), [decode(name, rows=2, seed=seed) for seed, name in enumerate("ab")]
    failures = iter([torch.OutOfMemoryError("rows")])
    concatenate = Rows.concatenate

    def scarce(parts: Sequence[Rows]) -> Rows:
        for error in failures:
            raise error
        return concatenate(parts)

    monkeypatch.setattr(Rows, "concatenate", staticmethod(scarce))
    for job in jobs:
        desk.add(job)
    desk.finish()
    assert desk.counted("tarflow_oom_total") == 1
    assert_images(desk, jobs, tiny)


def test_a_result_that_no_broker_takes_fails_alone(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would bring it again and again, or be cut off."""
    desk, jobs = Desk(tiny), [decode("a", rows=2), decode("large", rows=4), decode("b", rows=2)]
    size = sum(array.nbytes for array in alone(tiny, jobs[0]).values())
    monkeypatch.setattr(outcomes, "MOST_RESULT_BYTES", int(1.5 * size))
    calls: list[int] = []
    monkeypatch.setattr(
        desk.tray,
        "complete_all",
        lambda results: calls.append(len(results)) or [desk.tray.complete(*r) for r in results],
    )
    desk.add(*jobs)
    desk.finish()
    assert desk.tray.results.keys() == {"a", "b"}
    assert calls == [1, 1]  # together they would be too large as well
    assert desk.tray.errors["large"].code == "result_too_large"


def test_a_batch_from_before_does_not_raise_a_ceiling(tiny: LoadedModel) -> None:
    ceilings = Desk(tiny).ceilings
    assert ceilings.failed("m", "sample", 8) == 4
    assert ceilings.failed("m", "sample", 64) == 4
    assert ceilings.most("m", "sample", 64) == 4
