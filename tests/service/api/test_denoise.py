"""POST /v1/denoise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from model.likelihood import log_likelihood, to_model_range
from model.weights import load_flow
from tests.service.pictures import answered, array, b64, file, opened, pixels

IMAGES = [pixels(16, 3, seed) for seed in (1, 2)]


def denoise(client: httpx.Client, **body: Any) -> httpx.Response:
    images = [b64(file(image)) for image in IMAGES]
    return client.post("/v1/denoise", json={"images": images, "model": "tiny-cond", **body})


def test_it_is_tweedies_formula(client: httpx.Client, models: Path) -> None:
    bundle = read_bundle(models / "tiny-cond")
    flow, std = load_flow(bundle), bundle.config.noise.std
    x = flow.patchify(to_model_range(torch.from_numpy(np.stack(IMAGES).transpose(0, 3, 1, 2).copy()))).requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(flow, x, torch.tensor([3, 3])).sum(), x)
    expected = flow.unpatchify((x + std**2 * gradient).detach()).numpy()
    images = denoise(client, **{"class": "fox"}, output_format="npy").json()["images"]
    np.testing.assert_allclose([array(image["b64"]) for image in images], expected, atol=1e-4)


def test_the_answer_is_like_that_of_sample(client: httpx.Client) -> None:
    body = denoise(client, **{"class": "fox"}).json()
    assert body["parameters"] == {
        "class": "fox",
        "add_noise": False,
        "seed": None,
        "sigma": 0.05,
        "output_format": "png",
    }
    assert [image["class"] for image in body["images"]] == ["fox", "fox"]
    assert body["id"].startswith("denoise_")


def test_noise_is_a_matter_of_the_seed(client: httpx.Client) -> None:
    first, again, other = (answered(denoise(client, add_noise=True, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert denoise(client, add_noise=True, seed=2).json()["parameters"]["seed"] == 2


def test_files_and_pictures(client: httpx.Client) -> None:
    files = [("files", (f"{i}.png", file(image), "image/png")) for i, image in enumerate(IMAGES)]
    fields = {"model": "tiny-cond", "output_format": "webp"}
    sent = client.post("/v1/denoise", files=files, data=fields)
    np.testing.assert_array_equal(answered(sent), answered(denoise(client)))
    picture = client.post("/v1/denoise", files=files[:1], data=fields, headers={"accept": "image/png"})
    np.testing.assert_array_equal(opened(picture.content), answered(sent)[0])


def test_changes_are_told(client: httpx.Client) -> None:
    body = {"images": [b64(file(pixels(20, 3)))], "model": "tiny-cond"}
    [image] = client.post("/v1/denoise", json=body).json()["images"]
    assert [warning["code"] for warning in image["warnings"]] == ["resized"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "tiny-uniform"}, "denoise"),
        ({"add_noise": "yes"}, "add_noise"),
        ({"output_format": "tiff"}, "output_format"),
        ({"class": "wolf"}, "class"),
    ],
)
def test_refusals_name_the_parameter(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = denoise(client, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
