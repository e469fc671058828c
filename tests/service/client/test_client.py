"""The client against the running service: with waiting and without it is the same, and so it is over plain HTTP."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow
from pydantic import BaseModel

from service.api.calibration_schemas import CalibrationRequest
from service.api.classify_schemas import ClassifyRequest
from service.api.schemas import DecodeRequest, DenoiseRequest, EncodeRequest, ErrorBody, SampleRequest
from service.api.score_schemas import ScoreRequest
from service.client import AsyncClient, Client, Conflict, InternalError, Unfinished, calls
from service.client.resources import AsyncCalibrations
from tests.service.client.fronts import Front, answer
from tests.service.pictures import array, file, normal, opened, pixels

GREY = pixels(12)
WAVES = list(normal(2, 12, seed=3))
BROKEN = ErrorBody(message="no luck", type="server_error", param=None, code="internal_error")
OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sample": ("sample", {"model": "tiny-cond", "class_": "fox", "seed": 3, "num_images": 2, "trajectory": True}),
    "npy": ("sample", {"model": "tiny-vp", "seed": 1, "output_format": "npy", "guidance_window": (0, 2)}),
    "decode": ("decode", {"model": "tiny-cond", "latents": np.ones((2, 9, 16), np.float32), "class_": 1}),
    "denoise": ("denoise", {"model": "tiny-cond", "images": [GREY], "add_noise": True, "seed": 4}),
    "score": ("score", {"model": "tiny-cond", "class_": "dog", "images": [GREY, pixels(20)], "draws": 2}),
    "verdict": ("score", {"model": "tiny-uncond", "images": WAVES, "alpha": 0.05, "maps": "array"}),
    "overlay": ("score", {"model": "tiny-uncond", "images": WAVES, "calibration": None, "maps": "overlay"}),
    "encode": ("encode", {"model": "tiny-cond", "images": GREY}),
    "classify": ("classify", {"model": "tiny-cond", "images": file(GREY), "draws": 2}),
}


def without_chance(answer: BaseModel) -> dict[str, Any]:
    """An answer less what no two answers have in common."""
    return answer.model_dump(exclude={"id", "timing"})


def fields(name: str, client: httpx.Client) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an operation; latents have the model's shape."""
    operation, given = OPERATIONS[name]
    if operation == "decode":
        flow = client.get(f"/v1/models/{given['model']}").json()["architecture"]
        given = {**given, "latents": np.ones((2, flow["num_patches"], flow["patch_dim"]), np.float32)}
    return operation, given


@pytest.mark.anyio
@pytest.mark.parametrize("name", OPERATIONS)
async def test_all_ways_give_the_same_answer(
    tarflow: Client, waiting: AsyncClient, client: httpx.Client, name: str
) -> None:
    operation, given = fields(name, client)
    mine, theirs = getattr(tarflow, operation), getattr(waiting, operation)
    expected = without_chance(mine(**given))
    assert without_chance(await theirs(**given)) == expected
    assert without_chance(mine.submit(**given).result()) == expected
    assert without_chance(await (await theirs.submit(**given)).result()) == expected
    assert without_chance(list(mine.stream(**given))[-1].result()) == expected
    assert without_chance([event async for event in theirs.stream(**given)][-1].result()) == expected


def test_an_answer_is_the_service_s_own(tarflow: Client, client: httpx.Client) -> None:
    files = [("files", (f"{i}.png", file(image))) for i, image in enumerate(WAVES)]
    data = {"model": "tiny-uncond", "alpha": "0.05", "maps": "png"}
    served = client.post("/v1/score", files=files, data=data).json()
    scores = tarflow.score(WAVES, model="tiny-uncond", alpha=0.05, maps="png")
    told = scores.model_dump(mode="json", by_alias=True)
    for answered in (told, served):
        del answered["id"], answered["timing"]
    assert told == served


def test_images_are_decoded_where_they_are_wanted(tarflow: Client, client: httpx.Client, tmp_path: Path) -> None:
    [image] = tarflow.sample(model="tiny-cond", class_="fox", seed=3, trajectory=True).images
    assert image.class_ == "fox"
    assert image.array().shape == (3, 16, 16)
    assert (image.array().transpose(1, 2, 0) == opened(image.b64)).all()
    assert (np.asarray(image.picture()) == opened(image.b64)).all()
    assert [state.shape for state in image.states()] == [(3, 16, 16)] * 3
    image.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == image.data
    [floats] = tarflow.sample(model="tiny-cond", class_="fox", seed=3, output_format="npy").images
    assert (floats.array() == array(floats.b64)).all()
    assert floats.array().dtype == np.float32
    with pytest.raises(ValueError, match="npy"):
        floats.picture()
    assert floats.states() == []
    [grey] = tarflow.sample(model="tiny-uncond", seed=1).images
    assert (grey.array() == opened(grey.b64)[None]).all()


def test_maps_are_decoded_too(tarflow: Client) -> None:
    for maps, shape in (("array", (12, 12)), ("png", (3, 228, 228))):
        for image in tarflow.score(WAVES, model="tiny-uncond", maps=maps).images:
            assert image.map is not None
            assert image.map.array().shape == shape


def test_encode_and_decode_are_inverses(tarflow: Client) -> None:
    encoded = tarflow.encode(GREY, model="tiny-uncond")
    latent = encoded.images[0].latent
    for given in (latent, latent.array(), latent.array().tolist()):
        [image] = tarflow.decode([given], model="tiny-uncond").images
        assert (image.array()[0] == GREY).all()


def test_an_image_may_be_given_in_every_way(tarflow: Client, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    path.write_bytes(file(GREY))
    given = [path, str(path), path.read_bytes(), Pillow.fromarray(GREY), GREY, GREY[None]]
    images = tarflow.score(given, model="tiny-cond").images
    assert len({image.log_likelihood for image in images}) == 1
    assert [image.filename for image in images] == ["mine.png", "mine.png", "2", "3.png", "4.png", "5.png"]
    colour = np.repeat(GREY[None], 3, 0)
    assert tarflow.score(colour, model="tiny-cond").images[0].log_likelihood == images[0].log_likelihood


@pytest.mark.parametrize(
    "given",
    [GREY.astype(float), GREY[..., None], np.zeros((2, 1, 12, 12), np.uint8), np.zeros((0, 3), np.uint8), 3, None],
)
def test_what_is_no_image_is_refused_before_it_is_sent(tarflow: Client, given: Any) -> None:
    with pytest.raises(ValueError, match=r"images\.1: got"):
        tarflow.score([GREY, given], model="tiny-cond")


def test_other_pictures_are_refused_too(tarflow: Client, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images\.0: .*CMYK"):
        tarflow.score(Pillow.new("CMYK", (12, 12)))
    with pytest.raises(FileNotFoundError):
        tarflow.score(tmp_path / "none.png")


def test_a_number_is_an_index_and_a_text_a_name(tarflow: Client) -> None:
    """tiny-cond's third class is called "0"."""
    for classes in ((0, "cat"), ("0", 2)):
        first, second = (tarflow.score(GREY, model="tiny-cond", class_=each) for each in classes)
        assert first.class_ == second.class_
        assert first.images[0].log_likelihood == second.images[0].log_likelihood
        assert len({tarflow.sample(model="tiny-cond", class_=each, seed=1).images[0].b64 for each in classes}) == 1


# What there is to say is said once, by the service.


@pytest.mark.parametrize(
    ("build", "request_model", "beside"),
    [
        (calls.sample, SampleRequest, set()),
        (calls.decode, DecodeRequest, {"latents"}),
        (calls.denoise, DenoiseRequest, {"images"}),
        (calls.score, ScoreRequest, {"images"}),
        (calls.encode, EncodeRequest, {"images"}),
        (calls.classify, ClassifyRequest, {"images"}),
        (AsyncCalibrations.create, CalibrationRequest, {"name"}),
    ],
)
def test_every_field_of_the_service_can_be_given(
    build: Callable[..., object], request_model: type[BaseModel], beside: set[str]
) -> None:
    hints = inspect.get_annotations(build, eval_str=True)["fields"].__args__[0]
    assert set(hints.__annotations__) | beside == set(request_model.model_fields)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_operations_say_what_they_take(kind: type) -> None:
    client = kind("http://127.0.0.1:1")
    assert inspect.signature(client.score) == inspect.signature(calls.score)
    assert "How likely" in (client.score.__doc__ or "")


def test_the_client_needs_neither_torch_nor_a_web_framework() -> None:
    program = "import sys, service.client; print([m for m in ('torch', 'fastapi', 'starlette') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "ftp://host", "http://", "http://host?a=1", "http://host#a"),
        *("http://[::1", "http://host:port", "http://ho\0st"),
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="url: got"):
            kind(url)


@pytest.mark.parametrize("key", ["", "open sesame\n", "sésame"])
def test_a_key_that_cannot_be_one_is_not_shown(key: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="api_key: allowed") as caught:
            kind("http://127.0.0.1:1", api_key=key)
        assert "same" not in str(caught.value)


# Jobs, models, calibrations.


@pytest.mark.anyio
async def test_jobs_are_found_again(tarflow: Client, waiting: AsyncClient) -> None:
    job = tarflow.sample.submit(model="tiny-cond", class_="owl", seed=9)
    assert (job.document.op, job.document.model) == ("sample", "tiny-cond")
    assert job.id in [each.id for each in tarflow.jobs.list(100)]
    assert job.id in [each.id for each in await waiting.jobs.list(100)]
    assert tarflow.jobs.wait(job.id).state == "completed"
    expected = job.result()
    assert tarflow.jobs.get(job.id).result() == tarflow.jobs.result(job.id) == expected
    assert await waiting.jobs.result(job.id) == await (await waiting.jobs.get(job.id)).result() == expected
    events = [event.kind for event in tarflow.jobs.events(job.id)]
    assert (events[0], events[-1]) == ("queued", "completed")
    assert [event.kind async for event in waiting.jobs.events(job.id)] == events
    assert job.refresh().progress == 1
    assert (job.cancel().state, tarflow.jobs.cancel(job.id).state) == ("completed", "completed")


def test_a_job_is_not_waited_for_forever(tarflow: Client) -> None:
    job = tarflow.sample.submit(num_images=64, seed=0)
    with pytest.raises(Unfinished, match=job.id):
        job.result(timeout=0)
    assert job.wait(timeout=0.01).state in ("queued", "running")
    assert job.cancel().state == "canceled"


def test_who_has_little_time_asks_more_often(front: Front) -> None:
    with Client(front.url, timeout=9) as client:
        client.sample.submit(num_images=4).wait()
    assert "wait=4.5" in front.requests[1].path


def test_models_are_described_in_full(tarflow: Client, client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    for mine, theirs in zip(tarflow.models.list(), listed, strict=True):
        assert {"object": "model", **mine.model_dump()} == theirs
        details = tarflow.models.get(mine.id)
        assert {"object": "model", **details.model_dump()} == client.get(f"/v1/models/{mine.id}").json()


@pytest.mark.anyio
async def test_calibrations_come_and_go(tarflow: Client, waiting: AsyncClient) -> None:
    images, model = list(normal(24, 12, seed=1)), "tiny-uncond"
    name = "of-the-client"
    created = tarflow.calibrations.create(name, images, model=model)
    assert (created.name, created.num_images, created.model) == (name, 24, model)
    ready = tarflow.calibrations.wait(name, model)
    assert ready.status == "ready"
    assert ready.record is not None
    assert await waiting.calibrations.wait(name, model) == tarflow.calibrations.get(name, model) == ready
    assert name in [each.name for each in await waiting.calibrations.list(model)]
    verdict = tarflow.score(images[0], model=model, calibration=name)
    assert verdict.calibration is not None
    assert verdict.calibration.name == name
    with pytest.raises(Conflict, match=name):
        tarflow.calibrations.create(name, images, model=model)
    assert tarflow.calibrations.create(name, images, model=model, replace=True).name == name
    await waiting.calibrations.delete(name, model)
    assert name not in [each.name for each in tarflow.calibrations.list(model)]


def test_a_calibration_is_not_waited_for_forever(tarflow: Client, front: Front) -> None:
    own = tarflow.calibrations.get("default", "tiny-uncond")
    running = own.model_copy(update={"status": "running", "progress": 0.25}).model_dump_json()
    failed = own.model_copy(update={"status": "failed", "error": BROKEN}).model_dump_json()
    with Client(front.url) as client:
        front.script = [answer(200, running), answer(200, running), answer(200, failed)]
        with pytest.raises(Unfinished, match="25%"):
            client.calibrations.wait("any", timeout=0)
        with pytest.raises(InternalError, match="no luck"):
            client.calibrations.wait("any")
        assert len(front.requests) == 3
