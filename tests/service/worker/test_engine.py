"""The inference loop over a real broker: a bad job harms only itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from model.config import SolverOptions
from service.broker.memory import MemoryBroker
from service.broker.socket import BrokerServer, SocketWorkerBroker
from service.errors import InternalError
from service.jobs import Job, Op, WorkerInfo
from service.worker.engine import Engine
from service.worker.loading import LoadedModel
from service.worker.metrics import WorkerMetrics

pytestmark = pytest.mark.anyio
PATIENCE = 120
LEASE = 1.0


class Bench:
    """An engine that is not running yet, behind a broker that knows it."""

    def __init__(self, broker: MemoryBroker, engine: Engine, metrics: WorkerMetrics) -> None:
        self.broker, self.engine, self.metrics = broker, engine, metrics
        self.thread = threading.Thread(target=engine.run)

    def failed(self) -> float:
        """Failed batches of all kinds."""
        families = {family["name"]: family["samples"] for family in self.metrics.snapshot()}
        return sum(v for name, _, v in families["tarflow_failed_batches"] if name.endswith("_total"))


@pytest.fixture
async def bench(models: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    broker = MemoryBroker(max_queue_cost=1000, lease_seconds=LEASE, ready_seconds=60, max_attempts=3)
    server = BrokerServer(broker, tmp_path / "socket", sweep_seconds=0.05)
    await server.start()
    model = LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))
    face = await asyncio.to_thread(SocketWorkerBroker, tmp_path / "socket")
    await asyncio.to_thread(face.register, WorkerInfo(id="w", device="cpu", models=(model.info,)))
    metrics = WorkerMetrics("w")
    bench = Bench(broker, Engine(face, {"tiny-vp": model}, metrics, batch_rows=8, max_cohorts=2), metrics)
    yield bench
    bench.engine.stopping = True
    if bench.thread.ident is not None:
        await asyncio.to_thread(bench.thread.join)
    face.close()
    await server.stop()


def score(job_id: str, size: int = 8, rows: int = 1, draws: int = 1) -> Job:
    payload = {"pixels": np.zeros((rows, 1, size, size), np.uint8), "label": None, "draws": draws, "seed": 0}
    return Job(id=job_id, op=Op.SCORE, model="tiny-vp", payload=payload, rows=rows, cost=1)


def decode(job_id: str, patches: int = 16) -> Job:
    latents = np.zeros((1, patches, 4), np.float32)
    payload = {
        "latents": latents,
        "label": None,
        "options": {"denoise": False},
        "solver": SolverOptions().to_dict(),
        "trajectory": False,
    }
    return Job(id=job_id, op=Op.DECODE, model="tiny-vp", payload=payload, rows=1, cost=1)


@pytest.mark.parametrize("make", [score, decode])
async def test_a_bad_job_fails_alone(bench: Bench, make: Callable[..., Job]) -> None:
    for job in (make("a"), make("bad", 5), make("b")):
        await bench.broker.submit(job)
    bench.thread.start()
    for job_id in ("a", "b"):
        assert (await bench.broker.wait(job_id, PATIENCE)).arrays
    with pytest.raises(InternalError, match="the model failed"):
        await bench.broker.wait("bad", PATIENCE)
    assert bench.failed() == 2  # together, and alone


async def test_a_score_that_takes_long_keeps_its_lease(bench: Bench) -> None:
    """Lost leases would end it as WorkerLost, after three attempts."""
    await bench.broker.submit(score("a", rows=64, draws=64))
    bench.thread.start()
    assert (await bench.broker.wait("a", PATIENCE)).arrays["log_likelihood"].shape == (64,)
    stats = await bench.broker.stats()
    assert sum(stats.waiting.values()) + sum(stats.running.values()) == 0


async def test_values_that_are_not_finite_are_counted_and_told(bench: Bench) -> None:
    job = decode("a")
    job.payload["latents"][:] = np.finfo(np.float32).max
    await bench.broker.submit(job)
    bench.thread.start()
    arrays = (await bench.broker.wait("a", PATIENCE)).arrays
    assert arrays["pixels"].dtype == np.uint8
    families = {family["name"]: family["samples"] for family in bench.metrics.snapshot()}
    counted = sum(v for name, _, v in families["tarflow_nonfinite"] if name.endswith("_total"))
    assert counted == 1 - arrays["finite"][0]


async def test_stopping_hands_unfinished_work_back(bench: Bench) -> None:
    bench.engine.stopping = True
    await bench.broker.submit(decode("a"))
    bench.thread.start()
    await asyncio.to_thread(bench.thread.join)
    stats = await bench.broker.stats()
    assert (sum(stats.waiting.values()), sum(stats.running.values())) == (1, 0)


async def test_scores_without_end_do_not_starve_a_sample(bench: Bench) -> None:
    """A sample finishes while new scores never stop coming."""
    await bench.broker.submit(decode("sample"))
    finished = asyncio.create_task(bench.broker.wait("sample", PATIENCE))
    bench.thread.start()
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
    beats: list[set[str]] = []
    heartbeat = bench.engine._broker.heartbeat
    monkeypatch.setattr(bench.engine._broker, "heartbeat", lambda p, m: beats.append(set(p)) or heartbeat(p, m))
    job = decode("slow")
    denoised = {**job.payload, "options": {"denoise": True}}
    await bench.broker.submit(replace(job, payload=denoised))
    bench.thread.start()
    assert (await bench.broker.wait("slow", PATIENCE)).arrays
    # From the first beat that knows the job to the last, every one does: the blocks' own beats too.
    known = [i for i, beat in enumerate(beats) if "slow" in beat]
    assert len(known) > 4
    assert known == list(range(known[0], known[-1] + 1))


async def test_gradients_keep_the_lease_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of every pass beats, forward and on the way back."""
    monkeypatch.setattr("service.worker.engine.HEARTBEAT_SECONDS", 0.0)
    beats: list[set[str]] = []
    heartbeat = bench.engine._broker.heartbeat
    monkeypatch.setattr(bench.engine._broker, "heartbeat", lambda p, m: beats.append(set(p)) or heartbeat(p, m))
    job = score("slow")
    await bench.broker.submit(replace(job, payload={**job.payload, "statistics": {"seed": 0, "gradient": True}}))
    bench.thread.start()
    assert "statistics.gradient" in (await bench.broker.wait("slow", PATIENCE)).arrays
    # Two blocks, in: the likelihood, the statistics, the gradient's way there and back.
    assert sum("slow" in beat for beat in beats) >= 2 * 4
