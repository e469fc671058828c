"""POST /v1/encode and /v1/decode: exact inverses."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.pictures import Pixels, answered, array, b64, file, opened, pixels

SIZES = {
    "fashion-mnist": (28, 1),
    "tiny-cond": (16, 3),
    "tiny-uniform": (16, 3),
    "tiny-uncond": (12, 1),
    "tiny-vp": (8, 1),
}
SHAPE = (16, 48)
"""Latents of tiny-cond."""


def encode(client: httpx.Client, images: list[Pixels], **body: Any) -> dict[str, Any]:
    response = client.post("/v1/encode", json={"images": [b64(file(image)) for image in images], **body})
    assert response.status_code == 200, response.text
    return response.json()


def decode(client: httpx.Client, latents: list[Any], **body: Any) -> httpx.Response:
    return client.post("/v1/decode", json={"latents": latents, **body})


def compact(values: Pixels) -> dict[str, Any]:
    return {"shape": list(values.shape), "b64": base64.b64encode(values.astype("<f4").tobytes()).decode()}


def nested(latent: dict[str, Any]) -> list[list[float]]:
    values = np.frombuffer(base64.b64decode(latent["b64"]), "<f4").reshape(latent["shape"])
    return values.astype(float).tolist()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("with_class", [False, True])
def test_decoding_returns_the_image(client: httpx.Client, name: str, with_class: bool) -> None:
    size, channels = SIZES[name]
    label = 1 if with_class and name in ("fashion-mnist", "tiny-cond", "tiny-uniform") else None
    body = {"model": name, "class": label}
    images = [pixels(size, channels, seed) for seed in (1, 2, 3)]
    answer = encode(client, images, **body)
    latents = [image["latent"] for image in answer["images"]]
    for form in (latents, [nested(latent) for latent in latents]):
        response = decode(client, form, **body)
        np.testing.assert_array_equal(answered(response), images)
    parameters = response.json()["parameters"]
    assert (parameters["guidance_scale"], parameters["denoise"]) == (0, False)
    assert response.json()["id"].startswith("decode_")
    assert all(image["seed"] is None for image in response.json()["images"])


def test_encoding_says_how_likely_the_image_is(client: httpx.Client) -> None:
    image = pixels(16, 3)
    noisy = encode(client, [image], model="tiny-cond", add_noise=True, seed=4)["images"][0]
    scored = client.post("/v1/score", json={"images": [b64(file(image))], "model": "tiny-cond", "seed": 4}).json()
    assert noisy["log_likelihood"] == pytest.approx(scored["images"][0]["log_likelihood"], rel=1e-5)
    clean = encode(client, [image], model="tiny-cond")["images"][0]
    assert clean["latent"] != noisy["latent"]


def test_noise_is_a_matter_of_the_seed(client: httpx.Client) -> None:
    first, second, other = (
        encode(client, [pixels(16, 3)], model="tiny-cond", add_noise=True, seed=s)["images"][0]["latent"]
        for s in (1, 1, 2)
    )
    assert first == second != other


def test_decode_takes_what_sample_takes(client: httpx.Client) -> None:
    body = {"model": "tiny-cond", "class": "fox"}
    latent = compact(np.random.default_rng(0).standard_normal(SHAPE))
    plain = answered(decode(client, [latent], **body))[0]
    guided = decode(client, [latent], **body, guidance_scale=2.0, guidance_schedule="linear", denoise=True)
    assert guided.json()["parameters"]["guidance_scale"] == 2
    assert not np.array_equal(answered(guided)[0], plain)
    floats = decode(client, [latent], **body, output_format="npy").json()["images"][0]
    assert array(floats["b64"]).shape == (3, 16, 16)
    response = client.post("/v1/decode", json={"latents": [latent], **body}, headers={"accept": "image/png"})
    np.testing.assert_array_equal(opened(response.content), plain)


ZEROS = np.zeros(SHAPE)
BAD = {
    "too few rows": ([ZEROS[:-1].tolist()], "latents.0", "invalid_shape"),
    "ragged": ([[*ZEROS[:-1].tolist(), [0.0]]], "latents.0", "invalid_shape"),
    "no rows": ([[]], "latents.0", "invalid_shape"),
    "empty rows": ([[[]]], "latents.0", "invalid_shape"),
    "other shape": ([compact(ZEROS[:, :-1])], "latents.0", "invalid_shape"),
    "other bytes": ([{**compact(ZEROS), "shape": [16, 47]}], "latents.0", "invalid_shape"),
    "flat": ([{**compact(ZEROS), "shape": [16 * 48]}], "latents.0", "invalid_shape"),
    "huge shape": ([{**compact(ZEROS), "shape": [10**30, 10**30]}], "latents.0", "invalid_shape"),
    "negative shape": ([{**compact(ZEROS), "shape": [-16, -48]}], "latents.0.shape.0", "invalid_value"),
    "not base64": ([{"shape": [16, 48], "b64": "%%%"}], "latents.0.b64", "invalid_base64"),
    "the second": ([compact(ZEROS), compact(ZEROS[:-1])], "latents.1", "invalid_shape"),
    "infinite": ([compact(ZEROS + np.inf)], "latents.0", "non_finite_latent"),
    "nan": ([compact(ZEROS * np.nan)], "latents.0", "non_finite_latent"),
    "beyond float32": ([(ZEROS + 1e300).tolist()], "latents.0", "non_finite_latent"),
    "none": ([], "latents", "invalid_value"),
    "too many": ([compact(ZEROS)] * 65, "latents", "invalid_value"),
    "text": (["text"], "latents.0", "invalid_value"),
    "flat list": ([[0.0, 1.0]], "latents.0.0", "invalid_value"),
    "booleans": ([(ZEROS.astype(bool)).tolist()], "latents.0.0.0", "invalid_value"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_latents_are_refused(client: httpx.Client, what: str) -> None:
    latents, param, code = BAD[what]
    response = decode(client, latents, model="tiny-cond")
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert len(error["message"]) < 500


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_literals_that_are_not_finite_are_refused(client: httpx.Client, literal: str) -> None:
    rows = ",".join(["[" + ",".join(["0.0"] * 48) + "]"] * 15 + ["[" + ",".join(["0.0"] * 47 + [literal]) + "]"])
    content = f'{{"model": "tiny-cond", "latents": [[{rows}]]}}'
    response = client.post("/v1/decode", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["param"] == "latents.0.15.47"
    assert "finite" in error["message"]


def test_large_latents_give_a_notice_not_a_fault(client: httpx.Client) -> None:
    """Values that overflow inside of the model are the model's matter: grey pixels, and said so."""
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    image = decode(client, [compact(ZEROS + largest)], model="tiny-cond").json()["images"][0]
    assert [notice["code"] for notice in image["warnings"]] == ["non_finite"]


def test_the_uniform_model_cannot_denoise(client: httpx.Client) -> None:
    response = decode(client, [compact(ZEROS)], model="tiny-uniform", denoise=True)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "denoise")
