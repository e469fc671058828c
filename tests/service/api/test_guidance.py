"""Guidance parameters of /v1/sample and /v1/decode: rule, schedule, target, window."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

GUIDED: dict[str, Any] = {"model": "tiny-cond", "class": "fox", "seed": 3, "guidance_scale": 2.0, "denoise": False}


def image(client: httpx.Client, **change: Any) -> str:
    body = {**GUIDED, "output_format": "npy", **change}
    response = client.post("/v1/sample", json=body)
    assert response.status_code == 200, response.text
    used = response.json()["parameters"]
    assert {name: used[name] for name in change} == change
    return response.json()["images"][0]["b64"]


def test_each_does_something_of_its_own(client: httpx.Client) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"guidance_rule": "closed_form"},
        {"guidance_schedule": "linear"},
        {"guidance_schedule": "cosine"},
        {"guidance_target": "scale"},
        {"guidance_target": "shift"},
        {"guidance_window": [0, 1]},
        {"guidance_window": [1, 3]},
        {"guidance_scale": 0},
    ]
    assert len({image(client, **change) for change in changes}) == len(changes)


def test_a_window_of_all_blocks_is_no_window(client: httpx.Client) -> None:
    assert image(client, guidance_window=[0, 3]) == image(client, guidance_window=None) == image(client)


def test_the_closed_form_guides_both(client: httpx.Client) -> None:
    body = {**GUIDED, "guidance_rule": "closed_form"}
    assert client.post("/v1/sample", json=body).json()["parameters"]["guidance_target"] == "both"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guidance_rule": "square"}, "guidance_rule", ["square", "closed_form"]),
        ({"guidance_target": "all"}, "guidance_target", ["all", "shift"]),
        ({"guidance_schedule": "square"}, "guidance_schedule", ["square", "cosine"]),
        ({"guidance_rule": "closed_form", "guidance_target": "scale"}, "guidance_target", ["scale", "closed_form"]),
        ({"guidance_window": [0, 4]}, "guidance_window", ["(0, 4)", "3 blocks"]),
        ({"guidance_window": [2, 2]}, "guidance_window", ["(2, 2)", "start < stop"]),
        ({"guidance_window": [2, 1]}, "guidance_window", ["(2, 1)", "start < stop"]),
        ({"guidance_window": [1]}, "guidance_window", ["[1]", "at least 2"]),
        ({"guidance_window": [0, 1, 2]}, "guidance_window", ["[0, 1, 2]", "at most 2"]),
        ({"guidance_window": "all"}, "guidance_window", ["all", "list"]),
        ({"guidance_window": [-1, 2]}, "guidance_window.0", ["-1"]),
        ({"guidance_window": [0, 1.5]}, "guidance_window.1", ["1.5"]),
        ({"guidance_window": [0, 10**4000]}, "guidance_window.1", ["less than or equal"]),
        ({"guidance_window": [False, True]}, "guidance_window.0", ["integer"]),
    ],
)
def test_refusals_name_the_parameter(client: httpx.Client, body: dict[str, Any], param: str, words: list[str]) -> None:
    response = client.post("/v1/sample", json={**GUIDED, **body})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert error["message"].startswith(param)
    for word in words:
        assert word in error["message"]
    assert len(error["message"]) < 500
