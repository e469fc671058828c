"""POST /v1/classify."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from model.bayes import posterior
from model.bundle import read_bundle
from model.flow import NO_CLASS
from model.likelihood import add_noise, combine_draws, log_likelihood
from model.noise import input_noise
from model.weights import load_flow, write_bundle
from tests.service.conftest import Start
from tests.service.pictures import b64, file, pixels
from tests.service.processes import ServerProcess, wait_until

GREY = [file(pixels(28, 1, seed)) for seed in range(3)]
COLOUR = [file(pixels(16, 3, seed)) for seed in range(3)]


def classify(client: httpx.Client, images: list[bytes], **body: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/classify", json={"images": [b64(image) for image in images], **body})
    assert response.status_code == 200, response.text
    return response.json()["images"]


@pytest.mark.parametrize("name", ["fashion-mnist", "tiny-cond", "tiny-uniform"])
@pytest.mark.parametrize("draws", [1, 3])
def test_posteriors_are_those_of_the_model(client: httpx.Client, models: Path, name: str, draws: int) -> None:
    bundle = read_bundle(models / name)
    config, noise, flow = bundle.config, bundle.config.noise, load_flow(bundle)
    raw = [pixels(config.flow.image_size, config.flow.channels, seed) for seed in (1, 2)]
    got = classify(client, [file(p) for p in raw], model=name, draws=draws, seed=9)
    shape = (config.flow.channels, config.flow.image_size, config.flow.image_size)
    images = torch.stack([torch.from_numpy(p.reshape(shape) if p.ndim == 2 else p.transpose(2, 0, 1)) for p in raw])
    labels = (*range(config.flow.num_classes), NO_CLASS)
    with torch.no_grad():
        nats = torch.stack(
            [
                torch.stack([log_likelihood(flow, x_BTD, torch.full((2,), y)).double() for y in labels], dim=1)
                for x_BTD in (
                    flow.patchify(add_noise(images, noise, draw)) for draw in input_noise(noise.kind, 9, draws, shape)
                )
            ]
        )
    expected = posterior(nats[..., :-1], config.prior, noise)
    no_class = combine_draws(nats[..., -1], noise)
    for i, image in enumerate(got):
        found = {entry["index"]: entry for entry in image["probabilities"]}
        assert [entry["class"] for _, entry in sorted(found.items())] == list(config.class_names)
        likelihoods = [found[y]["log_likelihood"] for y in range(len(found))]
        assert likelihoods == pytest.approx(expected.log_likelihood_BY[i].tolist(), rel=1e-5, abs=1e-3)
        # Bayes' rule on what was answered, where one draw or a bound leaves one posterior.
        joint = np.array(likelihoods) + np.log(config.prior)
        if draws == 1 or noise.kind == "uniform":
            by_hand = np.exp(joint - joint.max()) / np.exp(joint - joint.max()).sum()
            assert [found[y]["probability"] for y in range(len(found))] == pytest.approx(by_hand.tolist(), abs=1e-9)
        probabilities = [entry["probability"] for entry in image["probabilities"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert math.fsum(probabilities) == pytest.approx(1)
        assert image["class"] == image["probabilities"][0]["class"]
        assert image["log_marginal"] == pytest.approx(float(expected.log_marginal_B[i]), rel=1e-5, abs=1e-3)
        assert image["log_likelihood_no_class"] == pytest.approx(float(no_class[i]), rel=1e-5, abs=1e-3)
        assert image["warnings"] == []
    protocol = {
        "noise": noise.kind,
        "space": "pixels",
        "sigma": noise.std,
        "draws": draws,
        "seed": 9,
        "meaning": noise.meaning,
    }
    assert [image["protocol"] for image in got] == [protocol] * 2


def test_likelihoods_are_those_of_score(client: httpx.Client) -> None:
    [image] = classify(client, COLOUR[:1], model="tiny-cond", draws=2, seed=4)
    for entry in image["probabilities"]:
        body = {"images": [b64(COLOUR[0])], "model": "tiny-cond", "draws": 2, "seed": 4, "class": entry["index"]}
        [scored] = client.post("/v1/score", json=body).json()["images"]
        assert entry["log_likelihood"] == pytest.approx(scored["log_likelihood"], rel=1e-5)
    del body["class"]
    [scored] = client.post("/v1/score", json=body).json()["images"]
    assert image["log_likelihood_no_class"] == pytest.approx(scored["log_likelihood"], rel=1e-5)


def test_multipart_and_json_say_the_same(client: httpx.Client) -> None:
    plain = classify(client, GREY, seed=3, draws=2)
    files = [("files", (f"{i}.png", data, "image/png")) for i, data in enumerate(GREY)]
    response = client.post("/v1/classify", files=files, data={"seed": "3", "draws": "2"})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["id"].startswith("classify_")
    assert body["model"] == "fashion-mnist"
    assert body["timing"]["total_ms"] > 0
    assert [image["filename"] for image in body["images"]] == ["0.png", "1.png", "2.png"]
    assert [image["index"] for image in body["images"]] == [0, 1, 2]
    marginals = [[image["log_marginal"] for image in images] for images in (body["images"], plain)]
    assert marginals[0] == pytest.approx(marginals[1], abs=1e-3)


def test_what_a_model_draws_it_recognizes(client: httpx.Client) -> None:
    names = ("Trouser", "Bag", "Ankle boot")
    drawn = [
        client.post("/v1/sample", json={"class": name, "seed": 7, "guidance_scale": 1}).json()["images"][0]["b64"]
        for name in names
    ]
    response = client.post("/v1/classify", json={"images": drawn})
    assert tuple(image["class"] for image in response.json()["images"]) == names


def test_changes_are_told(client: httpx.Client) -> None:
    [image] = classify(client, [file(pixels(40))])
    assert [warning["code"] for warning in image["warnings"]] == ["resized"]


@pytest.mark.parametrize("name", ["tiny-uncond", "tiny-vp"])
def test_a_model_without_classes_is_refused(client: httpx.Client, name: str) -> None:
    response = client.post("/v1/classify", json={"images": [b64(GREY[0])], "model": name})
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_has_no_classes")
    assert name in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"draws": 0}, "draws"),
        ({"draws": 65}, "draws"),
        ({"seed": -1}, "seed"),
        ({"class": "Bag"}, "class"),
        ({"extra": 1}, "extra"),
    ],
)
def test_refusals_name_the_parameter(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    responses = [
        client.post("/v1/classify", json={"images": [b64(GREY[0])], **body}),
        client.post(
            "/v1/classify",
            data={name: str(value) for name, value in body.items()},
            files={"files": ("a.png", GREY[0])},
        ),
    ]
    for response in responses:
        assert response.status_code == 422, response.text
        assert response.json()["error"]["param"] == param


def test_it_is_counted(client: httpx.Client, server: ServerProcess) -> None:
    labels = {"model": "tiny-cond", "op": "classify"}
    server.settle()
    images = server.metric("tarflow_images_total", **labels)
    requests = server.metric("tarflow_requests_total", outcome="ok", **labels)
    classify(client, COLOUR, model="tiny-cond")
    assert server.metric("tarflow_requests_total", outcome="ok", **labels) == requests + 1
    wait_until(lambda: server.metric("tarflow_images_total", **labels) == images + 3, "the images are counted")


def test_values_that_are_not_finite_are_null(models: Path, start: Start, tmp_path: Path) -> None:
    """Classes whose embeddings overflow take the posterior of an image with them, and the answer says so."""
    bundle = read_bundle(models / "tiny-cond")
    flow = load_flow(bundle)
    embedding = flow.blocks[0].class_embedding
    assert embedding is not None
    # They cancel in the mean, which the warm-up needs to be finite.
    embedding.data[1], embedding.data[2] = 1e30, -1e30
    write_bundle(tmp_path / "models" / "broken", bundle.config, flow, bundle.sampling, "")
    server = start("--models", tmp_path / "models").wait_ready()
    with server.client() as client:
        [image] = classify(client, COLOUR[:1])
    assert [warning["code"] for warning in image["warnings"]] == ["non_finite"]
    assert image["class"] is None
    assert image["log_marginal"] is None
    assert [entry["index"] for entry in image["probabilities"]] == [0, 1, 2, 3, 4]
    assert {entry["probability"] for entry in image["probabilities"]} == {None}
    assert [entry["log_likelihood"] is None for entry in image["probabilities"]] == [False, True, True, False, False]
