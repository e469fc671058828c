"""How a sample is solved and certified: solver, tolerance, precision and certify of /v1/sample and /v1/decode."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.pictures import Pixels, array
from tests.service.processes import ServerProcess, wait_until

BAG: dict[str, Any] = {"class": "Bag", "seed": 11, "denoise": False, "output_format": "npy"}
"""Of the bundled model, with the guidance it recommends."""
BLOCKS = 4


def sample(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/sample", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def floats(body: dict[str, Any]) -> Pixels:
    return np.stack([array(image["b64"]) for image in body["images"]])


def test_every_solver_gives_the_same_images(client: httpx.Client) -> None:
    body = {**BAG, "num_images": 4, "tolerance": 1e-4, "certify": True}
    answers = {solver: sample(client, **body, solver=solver) for solver in ("sequential", "jacobi", "auto")}
    for solver, answer in answers.items():
        assert answer["parameters"]["solver"] == solver
        assert len(answer["plan"]) == BLOCKS
        assert all(image["certified"] for image in answer["images"])
        np.testing.assert_allclose(floats(answer), floats(answers["sequential"]), atol=1e-3)
    assert answers["sequential"]["plan"] == ["sequential"] * BLOCKS
    assert not np.array_equal(floats(answers["sequential"]), floats(answers["jacobi"]))


def test_a_forced_jacobi_is_certified(client: httpx.Client) -> None:
    answer = sample(client, **BAG, num_images=3, solver="jacobi", tolerance=0.01)
    assert answer["plan"] == ["jacobi/48"] * BLOCKS
    for image in answer["images"]:
        assert 0 < image["backward_error"] <= 0.01
        assert (image["certified"], image["redone"]) == (True, None)


def test_exact_decoding_has_a_certificate_only_when_it_is_asked_for(client: httpx.Client) -> None:
    [image] = sample(client, **BAG, solver="sequential")["images"]
    assert (image["backward_error"], image["certified"], image["redone"]) == (None, None, None)
    [certified] = sample(client, **BAG, solver="sequential", certify=True)["images"]
    assert 0 < certified["backward_error"] < 1e-3
    assert certified["certified"] is True
    assert certified["b64"] == image["b64"]


def test_what_misses_its_tolerance_is_done_again_or_said_to_be_missed(client: httpx.Client) -> None:
    """Float32 itself cannot meet it, which the answer does not hide."""
    body = {**BAG, "solver": "jacobi", "tolerance": 1e-6}
    [redone] = sample(client, **body)["images"]
    assert redone["redone"] == "tolerance"
    assert redone["backward_error"] > 1e-6
    assert redone["certified"] is False
    [exact] = sample(client, **{**body, "solver": "sequential", "certify": True})["images"]
    assert (redone["b64"], redone["backward_error"]) == (exact["b64"], exact["backward_error"])
    assert (exact["redone"], exact["certified"]) == (None, False)
    [left] = sample(client, **body, certify=False)["images"]
    assert (left["redone"], left["certified"]) == (None, False)
    assert left["b64"] != exact["b64"]


def test_low_precision_is_polished_or_said_to_be_wrong(client: httpx.Client) -> None:
    body = {"model": "tiny-cond", "class": "fox", "seed": 2, "denoise": False, "output_format": "npy"}
    exact = sample(client, **body)
    polished, draft = (sample(client, **body, precision="bf16", certify=certify) for certify in (None, False))
    assert polished["parameters"]["precision"] == "bf16"
    [[mine], [rough]] = polished["images"], draft["images"]
    assert mine["certified"] is True
    np.testing.assert_allclose(floats(polished), floats(exact), atol=1e-3)
    assert rough["certified"] is False
    assert rough["backward_error"] > 1e-3
    assert np.abs(floats(draft) - floats(exact)).max() > 1e-3


def test_values_that_are_not_finite_are_done_again_and_told(client: httpx.Client) -> None:
    values = np.full((16, 48), np.finfo("<f4").max, "<f4")
    latents = [{"shape": [16, 48], "b64": base64.b64encode(v.tobytes()).decode()} for v in (values, 0 * values)]
    response = client.post("/v1/decode", json={"model": "tiny-cond", "latents": latents, "solver": "jacobi"})
    large, zeros = response.json()["images"]
    assert (large["redone"], large["certified"], large["backward_error"]) == ("non_finite", False, None)
    assert [notice["code"] for notice in large["warnings"]] == ["non_finite"]
    assert (zeros["redone"], zeros["certified"], zeros["warnings"]) == (None, True, [])


def test_requests_with_different_solvers_do_not_mix(client: httpx.Client) -> None:
    """They run at the same time, and each is what it is alone."""
    wanted = [{"solver": "sequential"}, {"solver": "jacobi"}, {"solver": "jacobi", "certify": False}]
    bodies = [{**BAG, **how, "tolerance": 1e-6, "seed": seed} for seed in (1, 2) for how in wanted]

    def essence(answer: dict[str, Any]) -> tuple[Any, ...]:
        [image] = answer["images"]
        return (answer["plan"], image["redone"], image["certified"])

    alone = [sample(client, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: sample(client, **body), bodies))
    for mine, expected in zip(together, alone, strict=True):
        assert essence(mine) == essence(expected)
        np.testing.assert_allclose(floats(mine), floats(expected), atol=1e-3)
    assert len({str(essence(answer)) for answer in alone}) == len(wanted)


def test_pictures_tell_it_in_headers(client: httpx.Client) -> None:
    def headers(**body: Any) -> httpx.Headers:
        body = {"model": "tiny-cond", "seed": 4, "num_images": 2, **body}
        return client.post("/v1/sample", json=body, headers={"accept": "image/png"}).headers

    jacobi = headers(solver="jacobi")
    assert jacobi["x-tarflow-plan"] == ", ".join(["jacobi/15"] * 3)
    assert jacobi["x-tarflow-certified"] == "true"
    shown = sample(client, model="tiny-cond", seed=4, num_images=2, solver="jacobi")["images"]
    largest = max(image["backward_error"] for image in shown)
    assert float(jacobi["x-tarflow-backward-error"]) == pytest.approx(largest, rel=0.01)
    exact = headers(solver="sequential")
    assert exact["x-tarflow-plan"] == ", ".join(["sequential"] * 3)
    assert not {"x-tarflow-certified", "x-tarflow-backward-error"} & exact.keys()


def test_denoising_is_not_certified(client: httpx.Client) -> None:
    image = base64.b64encode(client.post("/v1/sample", json={"seed": 1}, headers={"accept": "image/png"}).content)
    body = client.post("/v1/denoise", json={"images": [image.decode()]}).json()
    assert body["plan"] is None
    assert [body["images"][0][name] for name in ("backward_error", "certified", "redone", "trajectory")] == [None] * 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"solver": "newton"}, "solver"),
        ({"solver": None}, "solver"),
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": 9e-7}, "tolerance"),
        ({"tolerance": 1.01}, "tolerance"),
        ({"tolerance": "1e-3"}, "tolerance"),
        ({"tolerance": True}, "tolerance"),
        ({"precision": "float16"}, "precision"),
        ({"certify": "yes"}, "certify"),
        ({"certify": 1}, "certify"),
        ({"trajectory": 1}, "trajectory"),
        ({"trajectory": None}, "trajectory"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/sample", "/v1/decode"])
def test_refusals_name_the_parameter(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    latents = {} if path == "/v1/sample" else {"latents": [np.zeros((16, 48)).tolist()]}
    response = client.post(path, json={"model": "tiny-cond", **latents, **body})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert error["message"].startswith(param)
    assert "got" in error["message"]


def test_it_is_counted(client: httpx.Client, server: ServerProcess) -> None:
    def counts() -> dict[str, float]:
        return {
            "certified": server.metric("tarflow_certificates_total", model="tiny-cond", outcome="certified"),
            "errors": server.metric("tarflow_backward_error_count", model="tiny-cond"),
            "jacobi": server.metric("tarflow_sampled_images_total", model="tiny-cond", plan="jacobi"),
            "sequential": server.metric("tarflow_sampled_images_total", model="tiny-cond", plan="sequential"),
            "passes": server.metric("tarflow_solver_passes_sum", model="tiny-cond"),
        }

    server.settle()
    before = counts()
    sample(client, model="tiny-cond", num_images=3, solver="sequential")
    sample(client, model="tiny-cond", num_images=2, solver="jacobi")
    # The worker reports with its next heartbeat.
    wait_until(lambda: counts()["jacobi"] == before["jacobi"] + 2, "both are counted")
    grown = {name: value - before[name] for name, value in counts().items()}
    passes = grown.pop("passes")
    assert grown == {"certified": 2, "errors": 2, "jacobi": 2, "sequential": 3}
    # Three blocks of 16 patches: 15 passes each without iterations, and never more with them.
    assert 3 * 45 < passes <= 5 * 45
