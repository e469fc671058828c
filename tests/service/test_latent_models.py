"""A model of latents is served as one of pixels is, and every likelihood says that it is none of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from model.bundle import Bundle, BundleConfig
from model.codecs.base import Latents
from model.codecs.weights import load_codec, read_autoencoder
from model.config import NoiseProtocol, SamplingDefaults, SolverOptions
from model.likelihood import add_noise, bits_per_dim, log_likelihood, to_pixels
from model.noise import input_noise, latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from model.weights import load_flow, write_bundle
from service.jobs import ModelInfo
from service.local import sample, score
from tests.model.conftest import tiny_flow
from tests.service.pictures import b64, file, opened
from tests.service.processes import ServerProcess

AUTOENCODER = Path(__file__).parents[1] / "reference" / "autoencoder-kl" / "colour"
NOISE = NoiseProtocol(kind="gaussian", std=0.3, space="latents")
SIDE = 16
LABEL = "no likelihood of pixels"
served = pytest.mark.long
"""What needs a server of its own; the same model without one is in `make test`."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny flow of the 4x4x4 latents of 16x16 colour images."""
    codec = read_autoencoder(AUTOENCODER)
    flow = tiny_flow(
        dtype=torch.float32,
        image_size=4,
        channels=4,
        patch_size=1,
        layers_per_block=(1, 1, 2),
        conditioned_blocks=(2,),
        scale_function="softplus",
        soft_clip=4.0,
    )
    config = BundleConfig(
        name="tiny-latents", flow=flow.config, noise=NOISE, class_names=("a", "b", "c"), codec=codec.config
    )
    directory = tmp_path_factory.mktemp("latent") / "tiny-latents"
    return write_bundle(directory, config, flow, SamplingDefaults(denoise=True), "# tiny-latents\n", codec=codec)


@pytest.fixture(scope="module")
def client(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    process = ServerProcess(tmp_path_factory.mktemp("server") / "log", "--models", bundle.path.parent)
    try:
        with httpx.Client(base_url=process.wait_ready().url, timeout=120) as client:
            yield client
    finally:
        process.kill()


@pytest.fixture(scope="module")
def picture() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)


def expected_nats(bundle: Bundle, picture: np.ndarray[Any, Any], seed: int) -> float:
    flow, codec = load_flow(bundle), load_codec(bundle)
    values = codec.modelled(torch.from_numpy(picture)[None])
    noisy = add_noise(values, NOISE, input_noise("gaussian", seed, 1, tuple(values.shape[1:]))[0])
    return float(log_likelihood(flow, flow.patchify(noisy)))


def png(picture: np.ndarray[Any, Any]) -> str:
    return b64(file(picture.transpose(1, 2, 0)))


@served
def test_a_description_tells_pixels_from_latents(client: httpx.Client, bundle: Bundle) -> None:
    body = client.get("/v1/models/tiny-latents").json()
    assert body["image"] == {"size": SIDE, "channels": 3}
    assert (body["architecture"]["image_size"], body["architecture"]["channels"]) == (4, 4)
    assert body["codec"]["kind"] == "autoencoder-kl"
    assert bundle.config.codec is not None
    assert body["codec"]["sha256"] == bundle.config.codec.sha256
    assert body["noise"]["space"] == "latents"
    assert LABEL in body["noise"]["meaning"]
    info = ModelInfo.of(bundle)
    assert ModelInfo.from_wire(info.to_wire()) == info


@served
def test_samples_are_decoded_images(client: httpx.Client, bundle: Bundle) -> None:
    answer = client.post("/v1/sample", json={"seed": 3, "num_images": 2, "class": "b", "denoise": False})
    assert answer.status_code == 200, answer.text
    found = [opened(image["b64"]) for image in answer.json()["images"]]
    flow, codec = load_flow(bundle), load_codec(bundle)
    rows = make_rows(latents([3, 4], flow.config.num_patches, flow.config.patch_dim), [1, 1], [SamplingDefaults()] * 2)
    images = codec.images(flow.unpatchify(finish(Sampler(flow).decode(rows)).x_BTD))
    expected = to_pixels(images).numpy().transpose(0, 2, 3, 1)
    for pixels, wanted in zip(found, expected, strict=True):
        assert pixels.shape == (SIDE, SIDE, 3)
        assert np.abs(pixels.astype(int) - wanted).max() <= 1


@served
def test_likelihoods_are_those_of_the_latents_and_say_so(
    client: httpx.Client, bundle: Bundle, picture: np.ndarray[Any, Any]
) -> None:
    body = client.post("/v1/score", json={"images": [png(picture)], "seed": 5}).json()
    [image] = body["images"]
    nats = expected_nats(bundle, picture, 5)
    assert image["log_likelihood"] == pytest.approx(nats, abs=1e-2)
    assert image["bits_per_dim"] == pytest.approx(bits_per_dim(nats, bundle.config.flow.num_dims, NOISE), abs=1e-4)
    assert image["protocol"]["space"] == "latents"
    assert LABEL in image["protocol"]["meaning"]
    [classified] = client.post("/v1/classify", json={"images": [png(picture)], "seed": 5}).json()["images"]
    assert sum(each["probability"] for each in classified["probabilities"]) == pytest.approx(1)
    assert LABEL in classified["protocol"]["meaning"]


@pytest.mark.parametrize("add_noise", [True, False])
@served
def test_encode_and_decode_go_through_the_latents(
    client: httpx.Client, bundle: Bundle, picture: np.ndarray[Any, Any], add_noise: bool
) -> None:
    [encoded] = client.post("/v1/encode", json={"images": [png(picture)], "add_noise": add_noise}).json()["images"]
    assert encoded["protocol"]["space"] == "latents"
    assert LABEL in encoded["protocol"]["meaning"]
    body = {"latents": [encoded["latent"]], "denoise": False}
    [decoded] = client.post("/v1/decode", json=body).json()["images"]
    if not add_noise:
        # Not the image, but what the autoencoder makes of it.
        codec = load_codec(bundle)
        assert isinstance(codec, Latents)
        back = to_pixels(codec.images(codec.modelled(torch.from_numpy(picture)[None])))[0].numpy()
        assert np.abs(opened(decoded["b64"]).astype(int) - back.transpose(1, 2, 0)).max() <= 1


@served
def test_denoising_and_previews_give_images(client: httpx.Client, picture: np.ndarray[Any, Any]) -> None:
    answer = client.post("/v1/denoise", json={"images": [png(picture)]})
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["images"][0]["b64"]).shape == (SIDE, SIDE, 3)
    generated = {"prompt": "a", "n": 1, "size": f"{SIDE}x{SIDE}"}
    assert client.post("/v1/images/generations", json=generated).status_code == 200


@served
def test_calibrations_are_refused(client: httpx.Client, picture: np.ndarray[Any, Any]) -> None:
    files = [("files", (f"{i}.png", file(picture.transpose(1, 2, 0)))) for i in range(3)]
    answer = client.post("/v1/calibrations", data={"name": "x"}, files=files)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "unsupported_model"


@served
def test_the_open_inference_protocol_says_so_too(client: httpx.Client, picture: np.ndarray[Any, Any]) -> None:
    about = client.get("/v2/models/tiny-latents").json()
    assert about["inputs"][0]["shape"] == [-1, 3, SIDE, SIDE]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 3, SIDE, SIDE], "data": picture.flatten().tolist()}
    answer = client.post("/v2/models/tiny-latents/infer", json={"inputs": [tensor]})
    assert answer.status_code == 200, answer.text
    assert "no likelihoods of pixels" in answer.json()["parameters"]["warnings"]


def test_the_same_without_a_server(bundle: Bundle, picture: np.ndarray[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(file(picture.transpose(1, 2, 0)))
    result = score(str(bundle.path), "cpu", [path], label=None, draws=1, seed=5)
    assert LABEL in result["protocol"]["meaning"]
    assert result["images"][0]["log_likelihood"] == pytest.approx(expected_nats(bundle, picture, 5), abs=1e-2)
    drawn = sample(str(bundle.path), "cpu", label="a", seeds=[0], overrides={}, solver=SolverOptions())
    assert opened(drawn.png).shape == (SIDE, SIDE, 3)
