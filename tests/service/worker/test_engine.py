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
from service.jobs import Job
from service.worker.loading import LoadedModel
from service.worker.models import Models
from tests.service.worker.benches import PATIENCE, Bench, bench_of, decode, score

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bench(models: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    model = LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))
    async with bench_of(Models(model.device, {"tiny-vp": model}), tmp_path) as bench:
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
    # Two blocks, in: the likelihood, the statistics, the gradient's way there and back.
    assert sum("slow" in beat for beat in bench.face.beats) >= 2 * 4
