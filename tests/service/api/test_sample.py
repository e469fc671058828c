"""POST /v1/sample."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from model.config import MAX_SEED, SolverOptions
from tests.service.pictures import answered, array, opened

COND: dict[str, Any] = {"model": "tiny-cond", "seed": 5}


def sample(client: httpx.Client, accept: Any = None, **body: Any) -> httpx.Response:
    return client.post("/v1/sample", json=body, headers={"accept": accept} if accept else {})


def test_the_answer_says_everything(client: httpx.Client) -> None:
    response = sample(client, **COND, **{"class": "fox"}, num_images=2)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("sample_")
    assert body["model"] == "tiny-cond"
    shown = [{key: image[key] for key in ("index", "seed", "class", "format", "warnings")} for image in body["images"]]
    common = {"class": "fox", "format": "png", "warnings": []}
    assert shown == [{"index": 0, "seed": 5, **common}, {"index": 1, "seed": 6, **common}]
    assert all(picture.shape == (16, 16, 3) for picture in answered(response))
    assert set(body["timing"]) == {"queue_ms", "inference_ms", "total_ms"}
    assert 0 < body["timing"]["inference_ms"] <= body["timing"]["total_ms"]


def test_unset_parameters_are_those_the_bundle_recommends(client: httpx.Client) -> None:
    recommended = client.get("/v1/models/fashion-mnist").json()["recommended"]
    solver = {**SolverOptions().to_dict(), "trajectory": False}
    used = sample(client, seed=1, **{"class": "Bag"}).json()["parameters"]
    assert used == {**recommended, **solver, "class": "Bag", "num_images": 1, "seed": 1, "output_format": "png"}
    changes = {
        "guidance_scale": 0.25,
        "guidance_schedule": "cosine",
        "guidance_target": "shift",
        "guidance_window": [0, 3],
        "attention_temperature": 0.5,
        "denoise": not recommended["denoise"],
        "solver": "jacobi",
        "tolerance": 0.01,
        "certify": False,
    }
    used = sample(client, seed=1, **changes, output_format="webp").json()["parameters"]
    common = {"class": None, "num_images": 1, "seed": 1, "output_format": "webp"}
    # To guide the shift alone is of the linear rule.
    assert used == {**recommended, **solver, "guidance_rule": "linear", **changes, **common}


def test_guidance_that_does_nothing_is_reported_as_none(client: httpx.Client) -> None:
    """Without a class and without a temperature, both passes are the same."""
    used = sample(client, seed=1, guidance_scale=2.0, attention_temperature=1.0).json()["parameters"]
    assert used["guidance_scale"] == 0


@pytest.mark.parametrize(
    ("sent", "meant"),
    [("cat", "cat"), ("1", "dog"), (1, "dog"), ("0", "0"), (0, "cat"), (4, "owl"), ("04", "owl"), (None, None)],
)
def test_a_class_is_a_name_or_else_an_index(client: httpx.Client, sent: str | int | None, meant: str | None) -> None:
    """The third class is called "0": names go before indices."""
    body = sample(client, **COND, **{"class": sent}).json()
    assert body["parameters"]["class"] == body["images"][0]["class"] == meant


def test_the_class_matters_and_its_spelling_does_not(client: httpx.Client) -> None:
    def one(label: str | int | None) -> str:
        return sample(client, **COND, **{"class": label}, output_format="npy").json()["images"][0]["b64"]

    assert one("0") == one(2) == one("2")
    assert len({one(label) for label in (0, 1, 2, 3, 4, None)}) == 6


@pytest.mark.parametrize("model", ["tiny-cond", "tiny-uncond", "tiny-uniform", "tiny-vp"])
def test_a_seed_gives_its_image(client: httpx.Client, model: str) -> None:
    several = answered(sample(client, model=model, seed=40, num_images=3))
    again = answered(sample(client, model=model, seed=40, num_images=3))
    np.testing.assert_array_equal(several, again)
    for i, picture in enumerate(several):
        [alone] = answered(sample(client, model=model, seed=40 + i))
        assert np.abs(alone.astype(int) - picture).max() <= 1
    assert not np.array_equal(several[0], several[1])


def test_a_missing_seed_is_drawn_and_returned(client: httpx.Client) -> None:
    first, second = (sample(client, model="tiny-cond") for _ in range(2))
    seed = first.json()["images"][0]["seed"]
    assert seed == first.json()["parameters"]["seed"] != second.json()["parameters"]["seed"]
    np.testing.assert_array_equal(answered(sample(client, model="tiny-cond", seed=seed)), answered(first))


def test_formats_show_the_same_image(client: httpx.Client) -> None:
    images = {
        name: sample(client, **COND, output_format=name).json()["images"][0]["b64"] for name in ("png", "webp", "npy")
    }
    png = opened(images["png"])
    np.testing.assert_array_equal(opened(images["webp"]), png)
    floats = array(images["npy"])
    assert floats.dtype == np.float32
    assert floats.shape == (3, 16, 16)
    rounded = ((floats + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(rounded.transpose(1, 2, 0), png)
    jpeg = sample(client, **COND, output_format="jpeg").json()["images"][0]
    assert jpeg["format"] == "jpeg"
    assert opened(jpeg["b64"]).shape == (16, 16, 3)


def test_the_uniform_model_rounds_to_its_own_intervals(client: httpx.Client) -> None:
    body = {"model": "tiny-uniform", "seed": 1}
    floats = array(sample(client, **body, output_format="npy").json()["images"][0]["b64"])
    levels = np.floor((floats + 1) * 128).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(levels.transpose(1, 2, 0), answered(sample(client, **body))[0])


def test_samples_of_a_likelihood_model_come_with_a_warning(client: httpx.Client) -> None:
    for model, expected in (("tiny-uniform", {"likelihood_model"}), ("tiny-cond", set())):
        for image in sample(client, model=model, seed=1, num_images=2).json()["images"]:
            assert {notice["code"] for notice in image["warnings"]} == expected


@pytest.mark.parametrize("change", [{"guidance_scale": 1.5}, {"denoise": False}, {"class": "cat"}])
def test_every_parameter_does_something(client: httpx.Client, change: dict[str, Any]) -> None:
    base = {"seed": 3, "class": "Bag", "guidance_scale": 0.5, "denoise": True, "output_format": "npy"}
    if "class" in change:
        change = {"class": "Coat"}
    one, other = (sample(client, **{**base, **c}).json()["images"][0]["b64"] for c in ({}, change))
    assert one != other


def test_schedule_and_temperature_act_on_guidance(client: httpx.Client) -> None:
    base = {"seed": 3, "class": "Bag", "guidance_scale": 1.0, "guidance_schedule": "constant", "output_format": "npy"}
    results = [
        sample(client, **{**base, **change}).json()["images"][0]["b64"]
        for change in ({}, {"guidance_schedule": "linear"}, {"attention_temperature": 0.3})
    ]
    assert len(set(results)) == 3


# Accept.


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("image/png", "image/png"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("IMAGE/WEBP", "image/webp"),
        ("image/jpeg;q=0.2, image/webp;q=0.9", "image/webp"),
        ("image/png;q=0.5, application/json", "application/json"),
        ("image/png, application/json;q=0.5", "image/png"),
        ("image/png, application/json", "application/json"),
        ("text/html, image/png;q=0.8, */*;q=0.1", "image/png"),
        ("text/html, */*;q=0.1", "application/json"),
        ("application/*", "application/json"),
        ("*/*", "application/json"),
        ("application/json;q=0, image/png", "image/png"),
        ("image/png;q=nonsense, application/json;q=0.1", "application/json"),
    ],
)
def test_accept_chooses(client: httpx.Client, accept: str, answer: str) -> None:
    response = sample(client, accept, **COND)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].partition(";")[0] == answer


@pytest.mark.parametrize("accept", ["text/html", "image/gif", "image/png;q=0", "video/*, text/*"])
def test_nothing_acceptable_is_406(client: httpx.Client, accept: str) -> None:
    response = sample(client, accept, **COND)
    assert response.status_code == 406
    assert response.json()["error"]["code"] == "not_acceptable"


def test_one_image_as_itself_and_several_as_a_grid(client: httpx.Client) -> None:
    singles = answered(sample(client, **COND, num_images=3))
    response = sample(client, "image/png", **COND)
    np.testing.assert_array_equal(opened(response.content), singles[0])
    assert response.headers["x-tarflow-seed"] == "5"
    assert response.headers["x-tarflow-model"] == "tiny-cond"
    grid = opened(sample(client, "image/png", **COND, num_images=3).content)
    assert grid.shape == (2 * 16 + 1, 2 * 16 + 1, 3)
    for i, picture in enumerate(singles):
        top, left = 17 * (i // 2), 17 * (i % 2)
        np.testing.assert_array_equal(grid[top : top + 16, left : left + 16], picture)


def test_output_format_decides_between_equally_accepted_images(client: httpx.Client) -> None:
    assert sample(client, "image/*", **COND, output_format="webp").headers["content-type"] == "image/webp"


# Refusals.


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"num_images": 0}, "num_images", "invalid_value"),
        ({"num_images": 65}, "num_images", "invalid_value"),
        ({"num_images": 10**30}, "num_images", "invalid_value"),
        ({"num_images": 1.5}, "num_images", "invalid_value"),
        ({"num_images": True}, "num_images", "invalid_value"),
        ({"num_images": "3"}, "num_images", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": MAX_SEED + 1}, "seed", "invalid_value"),
        ({"seed": MAX_SEED, "num_images": 2}, "seed", "invalid_value"),
        ({"seed": 1.0}, "seed", "invalid_value"),
        ({"guidance_scale": -0.1}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": 100.5}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": 10**400}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": True}, "guidance_scale", "invalid_value"),
        ({"guidance_schedule": "square"}, "guidance_schedule", "invalid_value"),
        ({"attention_temperature": 0}, "attention_temperature", "invalid_value"),
        ({"attention_temperature": 101}, "attention_temperature", "invalid_value"),
        ({"denoise": "yes"}, "denoise", "invalid_value"),
        ({"denoise": 1}, "denoise", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"class": "wolf"}, "class", "class_not_found"),
        ({"class": ""}, "class", "class_not_found"),
        ({"class": "5"}, "class", "class_not_found"),
        ({"class": 5}, "class", "class_not_found"),
        ({"class": -1}, "class", "class_not_found"),
        ({"class": "-1"}, "class", "class_not_found"),
        ({"class": "9" * 5000}, "class", "class_not_found"),
        ({"class": 10**4000}, "class", "class_not_found"),
        ({"class": "²"}, "class", "class_not_found"),
        ({"class": True}, "class", "invalid_value"),
        ({"class": ["cat"]}, "class", "invalid_value"),
        ({"model": "tiny-uncond", "class": 0}, "class", "class_not_found"),
        ({"model": "tiny-uniform", "denoise": True}, "denoise", "cannot_denoise"),
        ({"model": 3}, "model", "invalid_value"),
        ({"sead": 1}, "sead", "unknown_field"),
    ],
)
def test_refusals_name_the_parameter(client: httpx.Client, body: dict[str, Any], param: str, code: str) -> None:
    response = sample(client, **{"model": "tiny-cond", **body})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"].startswith(param)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(client: httpx.Client, literal: str) -> None:
    response = client.post(
        "/v1/sample", content=f'{{"guidance_scale": {literal}}}', headers={"content-type": "application/json"}
    )
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "guidance_scale"


def test_a_near_class_is_suggested(client: httpx.Client) -> None:
    message = sample(client, **{"class": "sneakers"}).json()["error"]["message"]
    assert "did you mean 'Sneaker'" in message


def test_an_unknown_model_lists_the_known(client: httpx.Client) -> None:
    response = sample(client, model="nobody")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'tiny-cond'" in error["message"]


def test_the_largest_seeds_work(client: httpx.Client) -> None:
    images = sample(client, model="tiny-cond", seed=MAX_SEED - 1, num_images=2).json()["images"]
    assert [image["seed"] for image in images] == [MAX_SEED - 1, MAX_SEED]
