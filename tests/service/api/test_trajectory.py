"""``trajectory`` of /v1/sample and /v1/decode: the states after each block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from model.weights import load_flow
from tests.service.pictures import Pixels, answered, array, opened

COND: dict[str, Any] = {"model": "tiny-cond", "class": "fox", "seed": 3, "trajectory": True}
BLOCKS = 3


def sample(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/sample", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def states(answer: dict[str, Any]) -> Pixels:
    """Floats of an answer in npy, (n, blocks, C, H, W)."""
    return np.stack([[array(state) for state in image["trajectory"]] for image in answer["images"]])


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_each_block_maps_a_state_to_the_one_before(client: httpx.Client, models: Path, solver: str) -> None:
    body = {**COND, "num_images": 2, "denoise": False, "guidance_scale": 0, "solver": solver, "tolerance": 1e-5}
    answer = sample(client, **body, output_format="npy")
    flow = load_flow(read_bundle(models / "tiny-cond"))
    found = [flow.patchify(torch.from_numpy(x)) for x in states(answer).swapaxes(0, 1)]
    assert len(found) == BLOCKS
    with torch.no_grad():
        for block, x, z in zip(flow.blocks, found[::-1], found[-2::-1], strict=False):
            torch.testing.assert_close(block(x, torch.tensor([3, 3]))[0], z, atol=1e-3, rtol=0)


def test_the_last_state_is_the_sample_before_denoising(client: httpx.Client) -> None:
    denoised = sample(client, **COND, denoise=True, output_format="npy")
    plain = sample(client, **COND, denoise=False, output_format="npy")
    assert plain["parameters"]["trajectory"] is True
    for answer in (plain, denoised):
        assert answer["images"][0]["trajectory"][-1] == plain["images"][0]["b64"]
    assert denoised["images"][0]["b64"] != plain["images"][0]["b64"]


def test_pictures_clip_the_states_as_they_clip_the_image(client: httpx.Client) -> None:
    body = {**COND, "num_images": 2}
    values = states(sample(client, **body, output_format="npy"))
    assert np.abs(values[:, :-1]).max() > 1
    expected = ((values + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    for name in ("png", "webp"):
        for image, pixels in zip(sample(client, **body, output_format=name)["images"], expected, strict=True):
            for state, channels in zip(image["trajectory"], pixels, strict=True):
                np.testing.assert_array_equal(opened(state), channels.transpose(1, 2, 0))


@pytest.mark.parametrize(("denoise", "columns"), [(False, BLOCKS), (True, BLOCKS + 1)])
def test_a_picture_has_a_row_for_each_image(client: httpx.Client, denoise: bool, columns: int) -> None:
    body = {**COND, "num_images": 2, "denoise": denoise}
    answer = sample(client, **body)
    grid = opened(client.post("/v1/sample", json=body, headers={"accept": "image/png"}).content)
    assert grid.shape == (2 * 17 - 1, columns * 17 - 1, 3)
    for row, image in enumerate(answer["images"]):
        shown = [*image["trajectory"], *([image["b64"]] if denoise else [])]
        for column, data in enumerate(shown):
            cell = grid[17 * row :, 17 * column :][:16, :16]
            np.testing.assert_array_equal(cell, opened(data))


def test_decode_has_it_too(client: httpx.Client) -> None:
    latents = [np.random.default_rng(seed).standard_normal((16, 48)).tolist() for seed in (0, 1)]
    body = {"model": "tiny-cond", "latents": latents, "output_format": "npy"}
    plain = client.post("/v1/decode", json=body).json()
    assert [image["trajectory"] for image in plain["images"]] == [None, None]
    answer = client.post("/v1/decode", json={**body, "trajectory": True}).json()
    assert states(answer).shape == (2, BLOCKS, 3, 16, 16)
    assert [image["b64"] for image in answer["images"]] == [image["b64"] for image in plain["images"]]


def test_without_it_there_is_none(client: httpx.Client) -> None:
    body = {name: value for name, value in COND.items() if name != "trajectory"}
    answer = sample(client, **body)
    assert answer["images"][0]["trajectory"] is None
    assert answer["parameters"]["trajectory"] is False
    response = client.post("/v1/sample", json=body, headers={"accept": "image/png"})
    np.testing.assert_array_equal(opened(response.content), answered(client.post("/v1/sample", json=body))[0])
