"""Calibrations in the making: kept over restarts, given up, replaced, waited for and failed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from model.bundle import find_bundles
from service.api import normals as normals_module
from service.app import create_app
from service.broker.memory import MemoryBroker
from service.calibrator import Calibrator
from service.errors import InternalError
from service.jobs import Job, JobResult, Lane, ModelInfo, WorkerInfo
from service.pending import Pending
from service.settings import Settings
from service.stores.directory import CalibrationDirectory, PendingDirectory, state_in
from tests.service.api.test_calibrations import COUNT, PATH, files, normals, zipped
from tests.service.broker.conftest import AMPLE
from tests.service.conftest import Start
from tests.service.processes import PATIENCE, wait_until
from tests.service.test_calibrations import statistics_shapes

pytestmark = pytest.mark.anyio
NAME = "tiny-uncond"
MODEL = {"model": NAME}
BATCH = 8


@dataclass
class Service:
    """An app within its lifespan, and the test in the place of its worker."""

    app: Any
    broker: MemoryBroker
    client: httpx.AsyncClient

    @property
    def calibrator(self) -> Calibrator:
        calibrator: Calibrator = self.app.state.calibrator
        return calibrator

    async def post(self, name: str, **fields: str) -> httpx.Response:
        return await self.client.post(PATH, files=files(), data={"name": name, **MODEL, **fields})

    async def get(self, name: str) -> dict[str, Any]:
        response = await self.client.get(f"{PATH}/{name}", params=MODEL)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def listed(self) -> list[tuple[str, str]]:
        response = await self.client.get(PATH, params=MODEL)
        return [(item["name"], item["status"]) for item in response.json()["data"]]

    async def claim(self) -> Job:
        [job] = await self.broker.claim("w", {Lane.URGENT}, 64, PATIENCE)
        return job

    async def answer(self, value: float | None = None) -> Job:
        """Do the next job as a worker would; with a value, all statistics are that one."""
        job = await self.claim()
        self.broker.complete("w", job.id, job.attempt, JobResult(arrays=statistics(job, value), inference_seconds=0))
        return job

    async def until(self, condition: Callable[[dict[str, Any]], bool], name: str) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE):
            while True:
                if condition(found := await self.get(name)):
                    return found
                assert found["status"] == "running", found
                await anyio.sleep(0.01)


def statistics(job: Job, value: float | None) -> dict[str, Any]:
    """Statistics of a job's images such as a worker sends: a function of the pixels."""
    pixels = job.payload["pixels"]
    assert job.payload["statistics"] == {"seed": job.payload["seed"], "gradient": True}
    arrays: dict[str, Any] = {"log_likelihood": np.zeros(len(pixels))}
    for name, shape in statistics_shapes(pixels.shape[1:]).items():
        rows = [np.random.default_rng(int(image.sum())).normal(size=shape) for image in pixels]
        arrays[f"statistics.{name}"] = np.stack(rows).astype(np.float32)
        if value is not None:
            arrays[f"statistics.{name}"][:] = value
    return arrays


@asynccontextmanager
async def service(models: Path, state: Path, *, worker: bool = True, **changes: Any) -> AsyncIterator[Service]:
    settings = Settings(batch_rows=BATCH, **changes)
    broker = MemoryBroker(replace(AMPLE, max_queue_cost=settings.max_queue_cost, ready_seconds=600))
    # Nothing is listed but what a test makes.
    infos = tuple(replace(ModelInfo.of(bundle), calibration=None) for bundle in find_bundles(models))
    broker.announce(infos)
    if worker:
        broker.register(WorkerInfo(id="w", device="cpu", models=infos))
    app = create_app(settings, broker, state_in(state))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service", timeout=PATIENCE) as client,
    ):
        yield Service(app, broker, client)


def pending(state: Path) -> PendingDirectory:
    """What the next service would find."""
    return PendingDirectory(state, CalibrationDirectory(state))


def keep(state: Path, job: Pending, pixels: Any) -> None:
    """Have a job waiting."""
    store = pending(state)
    store.write(job, pixels)
    store.place(job, replace=True, most=100)


def left(directory: Path, pattern: str) -> list[Path]:
    """Files that are left, in any folder but of calibrations in the making."""
    return list(directory.rglob(pattern) if pattern != "*" else directory.iterdir())


def is_ready(found: dict[str, Any]) -> bool:
    return bool(found["status"] == "ready")


def has_failed(found: dict[str, Any]) -> bool:
    return bool(found["status"] == "failed")


async def finish(served: Service, name: str) -> dict[str, Any]:
    for _ in range(COUNT // BATCH):
        await served.answer()
    return await served.until(is_ready, name)


async def test_work_comes_in_batches_one_at_a_time(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        assert (await served.post("a", seed="3")).status_code == 202
        assert (await served.post("b")).status_code == 202
        for step in range(COUNT // BATCH):
            job = await served.claim()
            stats = await served.broker.stats()
            assert (sum(stats.waiting.values()), sum(stats.running.values())) == (0, 1)
            assert (job.rows, job.payload["seed"], job.payload["label"]) == (BATCH, 3, None)
            assert (await served.get("a"))["progress"] == pytest.approx(step * BATCH / COUNT)
            result = JobResult(arrays=statistics(job, None), inference_seconds=0)
            served.broker.complete("w", job.id, job.attempt, result)
        assert (await served.until(is_ready, "a"))["record"]["seed"] == 3
        await finish(served, "b")
        assert await served.listed() == [("a", "ready"), ("b", "ready")]
    assert pending(tmp_path).runs(NAME) == []


async def test_a_restart_goes_on(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        response = await served.client.post(
            PATH, files=zipped(normals() | {"in.zip": b""}), data={"name": "a", **MODEL}
        )
        assert response.status_code == 202
        created = response.json()["created"]
        await served.answer()
        await served.claim()
    async with service(models, tmp_path) as served:
        found = await served.get("a")
        assert (found["status"], found["created"]) == ("running", created)
        assert [notice["code"] for notice in found["warnings"]] == ["nested_archive"]
        assert (await finish(served, "a"))["created"] == created
    async with service(models, tmp_path) as served:
        assert await served.listed() == [("a", "ready")]


async def test_a_real_worker_goes_on_with_what_was_accepted(models: Path, tmp_path: Path, start: Start) -> None:
    async with service(models, tmp_path / "state") as served:
        await served.post("a")
    server = await anyio.to_thread.run_sync(lambda: start("--models", models, "--state", tmp_path / "state"))

    def finished() -> None:
        server.wait_ready()
        wait_until(lambda: server.get(f"{PATH}/a?model={NAME}").json()["status"] == "ready", "it is calibrated")

    await anyio.to_thread.run_sync(finished)
    assert server.get(f"{PATH}/a?model={NAME}").json()["num_images"] == COUNT


async def test_deleting_gives_up(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a")
        await served.post("b")
        job = await served.claim()
        for name in ("b", "a"):
            response = await served.client.delete(f"{PATH}/{name}", params=MODEL)
            assert response.status_code == 204, response.text
            assert (await served.client.get(f"{PATH}/{name}", params=MODEL)).status_code == 404
        assert not served.broker.complete(
            "w", job.id, job.attempt, JobResult(arrays=statistics(job, None), inference_seconds=0)
        )
        assert served.broker.idle
        assert await served.listed() == []
        # The next one has its turn.
        await served.post("c")
        await finish(served, "c")
    assert pending(tmp_path).runs(NAME) == []


async def test_replacing(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a")
        response = await served.post("a")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "calibration_exists")
        assert "in the making" in response.json()["error"]["message"]
        assert (await served.post("a", replace="true", seed="1")).status_code == 202
        assert (await finish(served, "a"))["record"]["seed"] == 1
        served.app.state.drift.observe(NAME, "a", "nll", [0.5], [False], num_calibration=12)
        assert 'calibration="a"' in (await served.client.get("/metrics")).text
        # The old one is used until the new one is there.
        assert (await served.post("a", replace="true", seed="2")).status_code == 202
        found = await served.get("a")
        assert (found["status"], found["usable"], found["record"]["seed"]) == ("running", True, 1)
        assert await served.listed() == [("a", "running")]
        assert (await finish(served, "a"))["record"]["seed"] == 2
        assert 'calibration="a"' not in (await served.client.get("/metrics")).text
        await served.post("a", replace="true", seed="3")
        assert (await served.client.delete(f"{PATH}/a", params=MODEL)).status_code == 204
        assert await served.listed() == []


async def test_a_fault_of_the_service_loses_no_images(models: Path, tmp_path: Path) -> None:
    """It is shown until the service starts again, which goes on; or until it is deleted or sent again."""
    async with service(models, tmp_path) as served:
        await served.post("a")
        job = await served.claim()
        served.broker.fail("w", job.id, job.attempt, InternalError("the model failed"))
        found = await served.until(has_failed, "a")
        assert (found["usable"], found["record"], found["error"]["code"]) == (False, None, "internal_error")
        assert found["error"]["message"].startswith("the model failed; its images are kept")
    assert left(tmp_path, "*.npy") != []
    async with service(models, tmp_path) as served:
        assert (await finish(served, "a"))["error"] is None
        assert left(tmp_path, "*.npy") == []
        await served.post("b")
        job = await served.claim()
        served.broker.fail("w", job.id, job.attempt, InternalError("the model failed"))
        await served.until(has_failed, "b")
        assert await served.listed() == [("a", "ready"), ("b", "failed")]
        assert (await served.client.delete(f"{PATH}/b", params=MODEL)).status_code == 204
        assert await served.listed() == [("a", "ready")]
        assert left(tmp_path, "*.npy") == []


async def test_images_that_make_no_calibration(models: Path, tmp_path: Path) -> None:
    """Why is kept until they are deleted or sent again, over a restart too; the next calibration has its turn."""
    async with service(models, tmp_path) as served:
        await served.post("nan")
        await served.post("next")
        for _ in range(COUNT // BATCH):
            await served.answer(float("nan"))
        found = await served.until(has_failed, "nan")
        assert found["error"]["code"] == "calibration_failed"
        assert "image 0 no finite" in found["error"]["message"]
        await finish(served, "next")
    async with service(models, tmp_path) as served:
        assert (await served.get("nan"))["error"] == found["error"]
        assert left(tmp_path, "*.npy") == []
        assert served.broker.idle
        assert (await served.post("nan")).status_code == 202
        assert (await finish(served, "nan"))["error"] is None


async def test_a_full_queue_and_a_missing_worker_are_waited_for(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path, worker=False) as served:
        await served.post("a")
        await anyio.sleep(0.3)
        assert (await served.get("a"))["status"] == "running"
        infos = tuple(await served.broker.models())
        served.broker.register(WorkerInfo(id="w", device="cpu", models=infos))
        await finish(served, "a")


async def test_limits(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path, max_body_bytes=2048, max_calibration_images=COUNT - 1) as served:
        response = await served.post("a")
        assert (response.status_code, response.json()["error"]["param"]) == (422, "files")
        response = await served.client.post(PATH, files=zipped(normals()), data={"name": "a", **MODEL})
        assert response.json()["error"]["code"] == "archive_too_large"
    # A body may be as large as the route's own limit, an image in it as large as one sent alone.
    async with service(models, tmp_path, max_body_bytes=2048) as served:
        assert (await served.post("a")).status_code == 202
        large = [("files", ("large.png", bytes(3000))), *files()]
        response = await served.client.post(PATH, files=large, data={"name": "b", **MODEL})
        assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("image_too_large", "files.0")
    async with service(models, tmp_path, max_calibration_bytes=4096) as served:
        response = await served.post("b")
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert "4096" in response.json()["error"]["message"]
    assert {path.name for path in left(tmp_path, "*")} == {"calibrations"}


async def test_a_chunked_body_that_grows_too_large_is_413(models: Path, tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(20):
            yield b" " * 1024

    async with service(models, tmp_path, max_calibration_bytes=4096) as served:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = await served.client.post(PATH, content=chunks(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert "4096" in response.json()["error"]["message"]


async def test_other_weights_and_damage_are_listed_and_deletable(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibrations" / NAME
    async with service(models, tmp_path) as served:
        await served.post("other")
        await finish(served, "other")
    data = (folder / "other.safetensors").read_bytes()
    model_id = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["calibration"])
    old = str(model_id["model_id"]).encode()
    assert data.count(old) == 1
    (folder / "other.safetensors").write_bytes(data.replace(old, old[:-4] + b"0000"))
    (folder / "damaged.safetensors").write_bytes(b"no calibration")
    (folder / ".pending" / "broken").mkdir(parents=True)
    (folder / ".pending" / ".half").mkdir()
    async with service(models, tmp_path) as served:
        assert await served.listed() == [("damaged", "ready"), ("other", "ready"), ("broken", "failed")]
        assert not (folder / ".pending" / ".half").exists()
        for name in ("damaged", "other", "broken"):
            found = await served.get(name)
            assert not found["usable"]
            assert found["reason"]
            assert (found["record"] is not None) == (name == "other")
            response = await served.client.delete(f"{PATH}/{name}", params=MODEL)
            assert response.status_code == 204, response.text
        assert await served.listed() == []


async def test_images_of_a_model_that_became_another_fail(models: Path, tmp_path: Path) -> None:
    changed = Pending(model=NAME, name="a", seed=0, num_images=COUNT, created=1)
    keep(tmp_path, changed, np.zeros((COUNT, 3, 5, 5), np.uint8))
    unknown = Pending(model="not-served", name="a", seed=0, num_images=COUNT, created=1)
    keep(tmp_path, unknown, np.zeros((COUNT, 1, 8, 8), np.uint8))
    async with service(models, tmp_path) as served:
        found = await served.until(has_failed, "a")
        assert "(3, 5, 5)" in found["error"]["message"]
        assert found["error"]["code"] == "calibration_failed"
    # What is not served now is kept for when it is.
    assert [run.pending for run in pending(tmp_path).runs("not-served")] == [unknown]


async def test_a_state_that_cannot_be_written_is_said(models: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the directory should be")
    async with service(models, tmp_path / "state") as served:
        response = await served.post("a")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "state_unwritable")
        assert "'state'" in response.json()["error"]["message"]


async def test_the_bundles_own_comes_first(models: Path, tmp_path: Path) -> None:
    async with service(models, tmp_path) as served:
        await served.post("a")
        await finish(served, "a")
        model = next(info for info in await served.broker.models() if info.name == NAME)
        own = CalibrationDirectory(tmp_path).read(NAME, "a")
        assert own is not None
        served.broker.announce([ModelInfo.from_wire({**model.to_wire(), "calibration": own[1]})])
        assert await served.listed() == [("default", "ready"), ("a", "ready")]
        found = await served.get("default")
        assert (found["name"], found["usable"]) == ("default", True)
        response = await served.client.delete(f"{PATH}/default", params=MODEL)
        assert (response.status_code, response.json()["error"]["param"]) == (422, "calibration")


async def test_large_images_are_counted_by_their_values(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(models, tmp_path) as served:
        [info] = [info for info in await served.broker.models() if info.name == NAME]
        monkeypatch.setattr(normals_module, "MOST_VALUES", (COUNT - 1) * info.flow.num_dims)
        error = (await served.post("a")).json()["error"]
        assert (error["param"], error["code"]) == ("files", "invalid_count")
        assert f"allowed are {COUNT - 1} of model" in error["message"]
