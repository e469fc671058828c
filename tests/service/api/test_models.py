"""GET /v1/models."""

from __future__ import annotations

from pathlib import Path

import httpx

from model.bundle import read_bundle
from tests.service.conftest import CLASSES, NORMALS

NAMES = ["fashion-mnist", "tiny-cond", "tiny-uncond", "tiny-uniform", "tiny-vp"]


def test_the_list_has_the_shape_that_clients_expect(client: httpx.Client) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == NAMES
    assert [model["default"] for model in body["data"]] == [True, False, False, False, False]
    for model in body["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert model["owned_by"] == "tarflow"


def test_a_description_is_that_of_the_bundle(client: httpx.Client, models: Path) -> None:
    bundle = read_bundle(models / "tiny-cond")
    body = client.get("/v1/models/tiny-cond").json()
    assert body["id"] == "tiny-cond"
    assert body["hash"] == bundle.model_id
    assert body["class_names"] == list(CLASSES)
    assert body["num_classes"] == 5
    assert body["class_prior"] == [0.2] * 5
    assert body["image"] == {"size": 16, "channels": 3}
    assert body["architecture"] == {**bundle.config.flow.to_dict(), "num_patches": 16, "patch_dim": 48}
    assert body["noise"] == {"kind": "gaussian", "std": 0.05, "meaning": bundle.config.noise.meaning}
    assert body["recommended"] == bundle.sampling.to_dict()
    assert body["card"] == bundle.card
    assert body["training"]["layout"] == "apple/ml-tarflow"
    assert body["convergence"] == {"tuned": False}


def test_a_tuned_model_says_how_it_converges(client: httpx.Client, models: Path) -> None:
    profile = read_bundle(models / "tiny-vp").convergence
    assert profile is not None
    expected = {"tuned": True, "gain": profile.gain, "floor": profile.floor, "tolerance": profile.tolerance}
    assert client.get("/v1/models/tiny-vp").json()["convergence"] == expected


def test_a_prior_is_always_numbers(client: httpx.Client, models: Path) -> None:
    skewed = client.get("/v1/models/tiny-uniform").json()
    assert skewed["class_prior"] == list(read_bundle(models / "tiny-uniform").config.class_prior)
    assert client.get("/v1/models/tiny-uncond").json()["class_prior"] == []


def test_a_calibrated_model_says_what_it_can_be_asked(client: httpx.Client) -> None:
    assert client.get("/v1/models/tiny-uncond").json()["anomaly"] == {
        "calibrated": True,
        "scores": ["combined", "nll", "typicality", "complexity", "latent", "gradient", "max_patch"],
        "num_calibration": NORMALS // 2,
        "smallest_alpha": 1 / (NORMALS // 2 + 1),
    }
    none = {"calibrated": False, "scores": [], "num_calibration": None, "smallest_alpha": None}
    assert client.get("/v1/models/tiny-cond").json()["anomaly"] == none


def test_every_model_can_be_described(client: httpx.Client) -> None:
    for name in NAMES:
        assert client.get(f"/v1/models/{name}").json()["id"] == name


def test_an_unknown_model_is_404(client: httpx.Client) -> None:
    response = client.get("/v1/models/nobody")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
