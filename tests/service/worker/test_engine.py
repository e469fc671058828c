"""The inference loop over a real broker: a bad job harms only itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from service.errors import InternalError
from service.jobs import Job, JobState
from service.worker.loading import LoadedModel
from service.worker.models import Models
from tests.service.worker.benches import PATIENCE, Bench, bench_of, decode, score, slow_down, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def served(models: Path) -> Models:
    model = LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))
    return Models(model.device, {"tiny-vp": model})


@pytest.fixture
async def bench(served: Models, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_of(served, tmp_path) as bench:
        yield bench


@pytest.mark.parametrize("make", [score, decode])
async def test_a_bad_job_fails_alone(bench: Bench, make: Callable[..., Job]) -> None:
    for job in (make("a"), make("bad", 5), make("b")):
        await bench.broker.submit(job)
    bench.start()
    for job_id in ("a", "b"):
        assert (await bench.broker.wait(job_id, PATIENCE)).arrays
    with pytest.raises(InternalError, match="the model failed"):
        await bench.broker.wait("bad", PATIENCE)
    assert bench.counted("tarflow_failed_batches_total") == 2  # together, and alone


async def test_a_score_that_takes_long_keeps_its_lease(bench: Bench) -> None:
    """Lost leases would end it as WorkerLost, after three attempts."""
    await bench.broker.submit(score("a", rows=64, draws=64))
    bench.start()
    assert (await bench.broker.wait("a", PATIENCE)).arrays["log_likelihood"].shape == (64,)
    stats = await bench.broker.stats()
    assert sum(stats.waiting.values()) + sum(stats.running.values()) == 0


async def test_values_that_are_not_finite_are_counted_and_told(bench: Bench) -> None:
    job = decode("a")
    job.payload["latents"][:] = np.finfo(np.float32).max
    await bench.broker.submit(job)
    bench.start()
    arrays = (await bench.broker.wait("a", PATIENCE)).arrays
    assert arrays["pixels"].dtype == np.uint8
    assert bench.counted("tarflow_nonfinite_total") == 1 - arrays["finite"][0]


async def test_stopping_hands_unfinished_work_back(bench: Bench) -> None:
    bench.engine.stopping = True
    await bench.broker.submit(decode("a"))
    bench.start()
    await asyncio.to_thread(bench.thread.join)
    stats = await bench.broker.stats()
    assert (sum(stats.waiting.values()), sum(stats.running.values())) == (1, 0)


async def test_scores_without_end_do_not_starve_a_sample(bench: Bench) -> None:
    """A sample finishes while new scores never stop coming."""
    await bench.broker.submit(decode("sample"))
    finished = asyncio.create_task(bench.broker.wait("sample", PATIENCE))
    bench.start()
    number = 0
    while not finished.done():
        job = score(f"score-{number}", rows=4, draws=32)
        await bench.broker.submit(job)
        if number:
            await bench.broker.wait(f"score-{number - 1}", PATIENCE)
        number += 1
    assert finished.result().arrays
    assert number > 1


async def test_heartbeats_speak_of_the_cohort_that_works(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.engine.HEARTBEAT_SECONDS", 0.0)
    job = decode("slow")
    denoised = {**job.payload, "options": {"denoise": True}}
    await bench.broker.submit(replace(job, payload=denoised))
    bench.start()
    assert (await bench.broker.wait("slow", PATIENCE)).arrays
    # From the first beat that knows the job to the last, every one does: the blocks' own beats too.
    known = [i for i, beat in enumerate(bench.face.beats) if "slow" in beat]
    assert len(known) > 4
    assert known == list(range(known[0], known[-1] + 1))


async def test_gradients_keep_the_lease_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of every pass beats, forward and on the way back."""
    monkeypatch.setattr("service.worker.engine.HEARTBEAT_SECONDS", 0.0)
    job = score("slow")
    await bench.broker.submit(replace(job, payload={**job.payload, "statistics": {"seed": 0, "gradient": True}}))
    bench.start()
    assert "statistics.gradient" in (await bench.broker.wait("slow", PATIENCE)).arrays
    # Two blocks, in: the likelihood with the statistics, the gradient's way there and back.
    assert sum("slow" in beat for beat in bench.face.beats) >= 2 * 3


async def test_within_its_grace_a_stopped_engine_finishes_what_it_has_begun(served: Models, tmp_path: Path) -> None:
    async with bench_of(served, tmp_path, grace_seconds=PATIENCE) as bench:
        slow_down(bench, 0.02)
        await bench.submit(decode("begun"))
        bench.start()
        await until(lambda: bench.engine._long.jobs)
        bench.engine.stopping = True
        await bench.submit(decode("late"))
        await bench.stop()
        assert (await bench.arrays("begun"))["finite"].tolist() == [1]
        stats = await bench.broker.stats()
        assert (sum(stats.waiting.values()), sum(stats.running.values())) == (1, 0)


async def test_when_the_grace_is_over_the_rest_is_handed_back_as_it_came(served: Models, tmp_path: Path) -> None:
    async with bench_of(served, tmp_path, grace_seconds=0.1) as bench:
        slow_down(bench, 0.05)
        await bench.submit(decode("begun", rows=20))
        bench.start()
        await until(lambda: bench.engine._long.jobs)
        await bench.stop()
        assert (await bench.broker.status("begun")).state == JobState.QUEUED
        # It was handed back, not lost: no attempt is counted.
        assert (await bench.broker.status("begun")).attempt == 1


async def test_a_batch_that_is_not_full_waits_for_more(served: Models, tmp_path: Path) -> None:
    async with bench_of(served, tmp_path, batch_wait_ms=PATIENCE * 1000) as bench:
        bench.start()
        await bench.submit(score("a", rows=3))
        await asyncio.sleep(0.3)
        assert not bench.face.completed
        await bench.submit(score("b", rows=4), score("c"))
        for job_id in "abc":
            assert (await bench.arrays(job_id))["log_likelihood"].size
        assert bench.counted("tarflow_batch_rows_sum", op="score") == 8
        assert bench.counted("tarflow_batch_rows_count", op="score") == 1


async def test_a_batch_does_not_wait_while_there_is_other_work(served: Models, tmp_path: Path) -> None:
    async with bench_of(served, tmp_path, batch_wait_ms=PATIENCE * 1000) as bench:
        slow_down(bench, 0.01)
        await bench.submit(decode("long"))
        bench.start()
        await until(lambda: bench.engine._long.jobs)
        await bench.submit(score("a"))
        await bench.arrays("a")
        await bench.arrays("long")
        assert bench.face.completed == ["a", "long"]


async def test_scores_come_between_the_slices_of_samples(served: Models, tmp_path: Path) -> None:
    """Every score that came while a sample was at work was answered before it."""
    async with bench_of(served, tmp_path) as bench:
        slow_down(bench, 0.01)
        await bench.submit(decode("long", rows=8))
        bench.start()
        await until(lambda: bench.engine._long.jobs)
        for number in range(5):
            await bench.submit(score(f"score-{number}"))
            await bench.arrays(f"score-{number}")
        await bench.arrays("long")
        assert bench.face.completed[-1] == "long"


async def test_a_canceled_sample_leaves_at_the_next_slices(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.engine.HEARTBEAT_SECONDS", 0.0)
    slow_down(bench, 0.01)
    await bench.submit(decode("leaves", rows=3), decode("stays", rows=2))
    bench.start()
    await until(lambda: len(bench.engine._long.jobs) == 2)
    assert await bench.broker.cancel("leaves")
    assert len((await bench.arrays("stays"))["pixels"]) == 2
    assert bench.counted("tarflow_dropped_rows_total") == 3
    assert bench.face.completed == ["stays"]


async def test_whoever_watches_hears_of_turns_slices_and_blocks(served: Models, tmp_path: Path) -> None:
    heard: list[int] = []
    async with bench_of(served, tmp_path, alive=lambda: heard.append(1)) as bench:
        bench.start()
        await until(lambda: len(heard) > 2)  # an idle turn each
        before = len(heard)
        await bench.submit(score("a", rows=8, draws=16))
        await bench.arrays("a")
        # A batch of eight rows for every draw, each through all blocks.
        assert len(heard) - before >= 16 * len(served["tiny-vp"].flow.blocks)


async def test_measurements_are_not_in_every_heartbeat(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.engine.HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr("service.worker.engine.MEASUREMENT_SECONDS", PATIENCE)
    bench.engine._last_measurement = -PATIENCE
    await bench.submit(score("a", rows=8, draws=16))
    bench.start()
    await bench.arrays("a")
    await bench.stop()
    assert len(bench.face.measured) > 16
    assert sum(count > 0 for count in bench.face.measured) == 1
    [worker] = await bench.broker.workers()
    assert worker.measurements
