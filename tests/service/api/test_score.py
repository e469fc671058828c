"""POST /v1/score."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model.bundle import read_bundle
from model.likelihood import add_noise, bits_per_dim, combine_draws, log_likelihood
from model.noise import input_noise
from model.weights import load_flow
from tests.service.pictures import b64, file, pixels

GREY = [file(pixels(28, 1, seed)) for seed in range(3)]
COLOUR = file(pixels(16, 3))


def score(client: httpx.Client, images: list[bytes], **body: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/score", json={"images": [b64(image) for image in images], **body})
    assert response.status_code == 200, response.text
    return response.json()["images"]


def values(images: list[dict[str, Any]]) -> list[float]:
    return [image["log_likelihood"] for image in images]


def test_multipart_json_and_data_urls_say_the_same(client: httpx.Client) -> None:
    plain = score(client, GREY, seed=3, draws=2, **{"class": "Bag"})
    files = [("files", (f"{i}.png", data, "image/png")) for i, data in enumerate(GREY)]
    response = client.post("/v1/score", files=files, data={"seed": "3", "draws": "2", "class": "Bag"})
    sent = response.json()["images"]
    assert values(sent) == pytest.approx(values(plain), abs=1e-3)
    assert [image["filename"] for image in sent] == ["0.png", "1.png", "2.png"]
    assert [image["index"] for image in sent] == [0, 1, 2]
    urls = [f"data:image/png;base64,{b64(data)}" for data in GREY]
    response = client.post("/v1/score", json={"images": urls, "seed": 3, "draws": 2, "class": "Bag"})
    assert values(response.json()["images"]) == pytest.approx(values(plain), abs=1e-3)
    assert response.json()["class"] == "Bag"
    assert response.json()["id"].startswith("score_")


@pytest.mark.parametrize("name", ["fashion-mnist", "tiny-cond", "tiny-uniform", "tiny-uncond", "tiny-vp"])
@pytest.mark.parametrize("draws", [1, 3])
def test_scores_are_those_of_the_model(client: httpx.Client, models: Path, name: str, draws: int) -> None:
    bundle = read_bundle(models / name)
    config, noise, flow = bundle.config.flow, bundle.config.noise, load_flow(bundle)
    raw = [pixels(config.image_size, config.channels, seed) for seed in (1, 2)]
    label = 1 if config.num_classes else None
    [*got] = score(client, [file(p) for p in raw], model=name, draws=draws, seed=9, **{"class": label})
    shape = (config.channels, config.image_size, config.image_size)
    images = torch.stack([torch.from_numpy(p.reshape(shape) if p.ndim == 2 else p.transpose(2, 0, 1)) for p in raw])
    noises = input_noise(noise.kind, 9, draws, shape)
    labels = None if label is None else torch.tensor([label, label])
    with torch.no_grad():
        by_draw = torch.stack(
            [log_likelihood(flow, flow.patchify(add_noise(images, noise, draw)), labels) for draw in noises]
        ).double()
    expected = combine_draws(by_draw, noise)
    assert values(got) == pytest.approx(expected.tolist(), abs=1e-3 * max(1.0, expected.abs().max().item() / 1e3))
    bits = torch.as_tensor(bits_per_dim(expected, config.num_dims, noise)).tolist()
    assert [image["bits_per_dim"] for image in got] == pytest.approx(bits, abs=1e-4)
    spreads = [image["log_likelihood_std"] for image in got]
    if draws == 1:
        assert spreads == [None, None]
    else:
        assert spreads == pytest.approx(by_draw.std(dim=0).tolist(), rel=1e-3, abs=1e-2)
    protocol = {
        "noise": noise.kind,
        "space": "pixels",
        "sigma": noise.std,
        "draws": draws,
        "seed": 9,
        "meaning": noise.meaning,
    }
    assert [image["protocol"] for image in got] == [protocol] * 2


def test_scores_are_deterministic_and_know_no_order(client: httpx.Client) -> None:
    once, again = score(client, GREY, draws=2), score(client, GREY, draws=2)
    assert values(once) == values(again)
    turned = score(client, GREY[::-1], draws=2)
    assert values(turned)[::-1] == pytest.approx(values(once), abs=1e-2)
    alone = [score(client, [image], draws=2)[0] for image in GREY]
    assert values(alone) == pytest.approx(values(once), abs=1e-2)


def test_seed_and_class_matter(client: httpx.Client) -> None:
    results = [score(client, GREY[:1], **body) for body in ({}, {"seed": 1}, {"class": 0}, {"class": 1})]
    assert len({values(result)[0] for result in results}) == 4


def test_a_native_image_gets_no_warning(client: httpx.Client) -> None:
    assert [image["warnings"] for image in score(client, GREY)] == [[], [], []]
    assert score(client, [COLOUR], model="tiny-cond")[0]["warnings"] == []


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(pixels(28, 1), "PNG", exif=exif)


def _deep() -> bytes:
    return file(Image.fromarray((pixels(28, 1).astype(np.uint16)) * 257))


def _transparent() -> bytes:
    image = Image.fromarray(pixels(28, 3)).convert("RGBA")
    image.putalpha(100)
    return file(image)


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (file(pixels(40)), ["resized"]),
        (file(pixels(28, 3)), ["colour_converted"]),
        (_transparent(), ["alpha_composited", "colour_converted"]),
        (_deep(), ["depth_reduced"]),
        (_rotated(), ["rotated"]),
        (file(Image.fromarray(pixels(28, 3)).convert("CMYK"), "TIFF"), ["colour_converted", "colour_converted"]),
        (file(Image.fromarray(pixels(28)).convert("P")), ["colour_converted"]),
        (file(Image.fromarray(pixels(60)[:30])), ["resized"]),
    ],
    ids=["size", "colour", "alpha", "depth", "rotation", "cmyk", "palette", "crop"],
)
def test_changes_are_told(client: httpx.Client, data: bytes, codes: list[str]) -> None:
    [image] = score(client, [data])
    assert [warning["code"] for warning in image["warnings"]] == codes
    assert all(warning["message"] for warning in image["warnings"])
    assert image["log_likelihood"] is not None


def test_a_16_bit_image_scores_as_its_8_bits(client: httpx.Client) -> None:
    assert values(score(client, [_deep()])) == values(score(client, [file(pixels(28, 1))]))


def test_formats_without_loss_score_the_same(client: httpx.Client) -> None:
    expected = values(score(client, [file(pixels(28))]))
    others = [file(pixels(28), kind) for kind in ("BMP", "TIFF", "GIF")] + [file(pixels(28), "WEBP", lossless=True)]
    for data in others:
        assert values(score(client, [data])) == pytest.approx(expected, abs=1e-3)


def test_a_large_photograph_is_fitted(client: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000), (200, 30, 60)).save(buffer, "JPEG")
    [image] = score(client, [buffer.getvalue()], model="tiny-cond")
    assert image["warnings"][0]["message"] == "resized from 4000x3000 to 16x16, centre cropped to a square"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"draws": 0}, "draws"),
        ({"draws": 65}, "draws"),
        ({"draws": 2.5}, "draws"),
        ({"seed": -1}, "seed"),
        ({"class": "wolf"}, "class"),
        ({"extra": 1}, "extra"),
        ({"images": []}, "images"),
        ({"images": "text"}, "images"),
        ({"images": [3]}, "images.0"),
        ({"images": ["!!!"]}, "images.0"),
        ({"images": ["data:image/png;base64"]}, "images.0"),
        ({"images": [b64(GREY[0])] * 65}, "images"),
    ],
)
def test_refusals_name_the_parameter(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = client.post("/v1/score", json={"images": [b64(GREY[0])], **body})
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param
    if "images" in body:
        return
    fields = {name: str(value) for name, value in body.items()}
    response = client.post("/v1/score", data=fields, files={"files": ("a.png", GREY[0])})
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


def test_an_unknown_model_is_404(client: httpx.Client) -> None:
    response = client.post("/v1/score", data={"model": "nobody"}, files={"files": ("a.png", GREY[0])})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
