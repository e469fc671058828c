"""Calibrations in the making when something goes wrong: crashes, another model, a full disk, too many of them."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from service.calibrations import CalibrationStore
from service.calibrator import MOST_ATTEMPTS
from service.jobs import Job, JobResult, ModelInfo, WorkerInfo
from service.pending import Pending
from service.stores.directory import CalibrationDirectory, PendingDirectory
from tests.service.api.test_calibrations import COUNT, PATH, normal
from tests.service.pictures import pixels
from tests.service.test_calibrator import (
    BATCH,
    MODEL,
    NAME,
    Service,
    finish,
    has_failed,
    is_ready,
    left,
    pending,
    service,
    statistics,
)

pytestmark = pytest.mark.anyio
OTHER = "sha256:" + 64 * "0"


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def attempts(state: Path) -> int:
    """Attempts that are noted of the only calibration in the making."""
    [path] = state.rglob("attempts")
    return int(path.read_text())


async def served_model(served: Service) -> ModelInfo:
    [info] = [info for info in await served.broker.models() if info.name == NAME]
    return info


async def register(served: Service, model_id: str, worker: str = "w") -> None:
    """Have the worker serve other weights, as after a restart on another bundle of this name."""
    infos = [replace(m, model_id=model_id) if m.name == NAME else m for m in await served.broker.models()]
    served.broker.register(WorkerInfo(id=worker, device="cpu", models=tuple(infos)))


async def test_a_calibration_that_the_service_dies_of_is_given_up(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        await served.post("deadly")
        await served.claim()
    for crashes in range(MOST_ATTEMPTS):
        # A process that is killed ends nothing; one that leaves in order does, and counts for nothing.
        claim = pending(tmp_path).claim([NAME])
        assert claim is not None
        assert claim.crashes == crashes
        if crashes + 1 < MOST_ATTEMPTS:
            async with service(models, tmp_path) as served:
                await served.answer()
                assert (await served.get("deadly"))["status"] == "running"
                assert attempts(tmp_path) == crashes + 2
            assert attempts(tmp_path) == crashes + 1
    async with service(models, tmp_path) as served:
        found = await served.until(has_failed, "deadly")
        assert found["error"]["code"] == "calibration_crashed"
        assert f"ended {MOST_ATTEMPTS} times" in found["error"]["message"]
        assert served.broker.idle
        assert left(tmp_path, "*.npy") == []
    async with service(models, tmp_path) as served:
        assert (await served.get("deadly"))["error"] == found["error"]
        assert (await served.post("deadly")).status_code == 202
        assert (await finish(served, "deadly"))["error"] is None


async def test_the_model_is_the_one_that_is_served_when_its_turn_comes(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        await served.post("first")
        await served.post("second")
        for _ in range(COUNT // BATCH):
            job = await served.answer()
        await served.until(is_ready, "first")
        # Its first batch is in the queue; nothing of it was computed yet.
        await register(served, OTHER)
        await finish_anew(served, "second")
        assert job.model == NAME
        model = await served_model(served)
        assert CalibrationStore(CalibrationDirectory(tmp_path)).get(model, "second").record.model_id == OTHER


async def finish_anew(served: Service, name: str) -> None:
    """Answer whatever is asked until a calibration is ready."""

    async def work() -> None:
        while True:
            await served.answer()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await served.until(is_ready, name)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("answered", [1, COUNT // BATCH - 1])
async def test_a_model_that_is_replaced_begins_it_anew(models: Path, tmp_path: Path, answered: int) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a")
        for _ in range(answered):
            await served.answer(7.0)
        job = await served.claim()
        await register(served, OTHER)
        result = JobResult(arrays=statistics(job, 7.0), inference_seconds=0)
        # The job was given to the worker that came: nothing tells whose weights computed it.
        served.broker.complete("w", job.id, job.attempt, result)
        for _ in range(COUNT // BATCH):
            job = await served.answer()
        assert (await served.until(is_ready, "a"))["usable"]
        made = CalibrationStore(CalibrationDirectory(tmp_path)).get(await served_model(served), "a")
        assert made.record.model_id == OTHER
        # Nothing of the first statistics, which were all alike, is in it.
        assert not (made.sorted_scores["nll"] == 7.0).any()


async def test_workers_of_different_weights_are_told(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        await register(served, OTHER, worker="other")
        await served.post("a")
        found = await served.until(has_failed, "a")
        assert found["error"]["code"] == "model_replaced"
        assert "different weights" in found["error"]["message"]
    assert left(tmp_path, "*.npy") != []


@pytest.mark.parametrize("step", ["write", "_swap"])
async def test_a_run_goes_on_when_its_successor_cannot_be_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a", seed="1")
        await served.answer()
        monkeypatch.setattr(PendingDirectory, step, full_disk)
        response = await served.post("a", seed="2", replace="true")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "state_unwritable")
        monkeypatch.undo()
        assert (await served.get("a"))["status"] == "running"
        await finish_anew(served, "a")
        assert (await served.get("a"))["record"]["seed"] == 1


async def test_a_run_goes_on_when_it_cannot_be_deleted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a")
        await served.answer()
        monkeypatch.setattr(PendingDirectory, "remove", full_disk)
        response = await served.client.delete(f"{PATH}/a", params=MODEL)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "state_unwritable")
        monkeypatch.undo()
        await finish_anew(served, "a")
        monkeypatch.setattr(CalibrationDirectory, "delete", full_disk)
        response = await served.client.delete(f"{PATH}/a", params=MODEL)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "state_unwritable")
        monkeypatch.undo()
        assert await served.listed() == [("a", "ready")]


async def test_a_place_that_cannot_be_taken_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, old = pending(tmp_path), Pending(model=NAME, name="a", seed=1, num_images=2, created=1)
    new = replace(old, seed=2, id="new")
    images = pixels(8, 1, 0)[None, None].repeat(2, axis=0)
    for job in (old, new):
        store.write(job, images)
    store.place(old, replace=False, most=100)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".new":
            full_disk()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"):
        store.place(new, replace=True, most=100)
    assert [run.pending for run in store.runs(NAME)] == [old]
    claim = store.claim([NAME])
    assert claim is not None
    assert store.images(claim).shape[0] == 2
    assert len(left(tmp_path / "calibrations" / NAME / ".pending", "*")) == 1


async def test_a_calibration_that_cannot_be_kept_has_failed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a")
        monkeypatch.setattr(CalibrationDirectory, "write", full_disk)
        for _ in range(COUNT // BATCH):
            await served.answer()
        await served.until(has_failed, "a")
    monkeypatch.undo()
    async with service(models, tmp_path) as served:
        await finish(served, "a")


async def test_verdicts_that_come_after_a_deletion_leave_no_drift(models: Path, tmp_path: Path) -> None:
    """Neither of a name that is gone, nor of another calibration that has it now."""
    async with service(models, tmp_path) as served:
        for successor in (False, True):
            await served.post("a")
            await finish(served, "a")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(score, served)
                job = await served.claim()
                assert (await served.client.delete(f"{PATH}/a", params=MODEL)).status_code == 204
                if successor:
                    await served.post("a", seed="1")
                    await finish(served, "a")
                await answer_score(served, job)
            assert 'calibration="a"' not in (await served.client.get("/metrics")).text
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(score, served)
            await answer_score(served, await served.claim())
        assert 'calibration="a"' in (await served.client.get("/metrics")).text
        assert (await served.client.delete(f"{PATH}/a", params=MODEL)).status_code == 204
        assert 'calibration="a"' not in (await served.client.get("/metrics")).text


async def score(served: Service) -> None:
    image = {"files": ("a.png", normal(0))}
    response = await served.client.post("/v1/score", files=image, data={**MODEL, "calibration": "a"})
    assert response.status_code == 200, response.text


async def answer_score(served: Service, job: Job) -> None:
    assert job.payload["statistics"]["gradient"] is False
    arrays = statistics(
        replace(job, payload={**job.payload, "statistics": {"seed": job.payload["seed"], "gradient": True}}), None
    )
    arrays |= {name: np.zeros(job.rows) for name in ("log_likelihood_std", "bits_per_dim")}
    served.broker.complete("w", job.id, job.attempt, JobResult(arrays=arrays, inference_seconds=0))


async def test_there_is_a_most_of_calibrations(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path, max_calibrations=2) as served:
        await served.post("a")
        await finish(served, "a")
        assert (await served.post("b")).status_code == 202
        response = await served.post("c")
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"], error["param"]) == (
            409,
            "invalid_request_error",
            "too_many_calibrations",
            "name",
        )
        assert "allowed are 2" in error["message"]
        assert "delete one" in error["message"]
        # Those that are there may be replaced, and other models have their own.
        assert (await served.post("a", replace="true")).status_code == 202
        response = await served.post("b")
        assert response.json()["error"]["code"] == "calibration_exists"
        assert (await served.client.delete(f"{PATH}/b", params=MODEL)).status_code == 204
        assert (await served.post("c")).status_code == 202
