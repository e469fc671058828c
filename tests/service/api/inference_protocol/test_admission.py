"""A request of several classes is several jobs, and let in or refused as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.broker.base import Terms
from service.jobs import Job, Op
from tests.service.api.test_access import SECRETS, connect, make

pytestmark = pytest.mark.anyio
PATCHES, MOST = 16, 12
"""Of tiny-cond; so many of its images the key allows at once."""
CHEAP = {"guidance_scale": 0, "denoise": False, "solver": "sequential"}
FUNCTIONS = {
    "": ("images", "UINT8", (3, 16, 16), {}),
    ":encode": ("images", "UINT8", (3, 16, 16), {}),
    ":decode": ("latents", "FP32", (16, 48), CHEAP),
    ":sample": ("seed", "INT64", (), CHEAP),
}


def asked(function: str, rows: int, **parameters: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request whose rows have two classes."""
    name, datatype, shape, cheap = FUNCTIONS[function]
    values = {"name": name, "datatype": datatype, "shape": [rows, *shape]}
    data = np.zeros(values["shape"], int).ravel().tolist()
    classes = {"name": "class", "datatype": "INT64", "shape": [rows], "data": [row % 2 for row in range(rows)]}
    body = {"inputs": [{**values, "data": data}, classes], "parameters": {**cheap, **parameters}}
    return f"/v2/models/tiny-cond{function}/infer", body


@pytest.mark.parametrize("function", FUNCTIONS)
async def test_what_a_key_never_allows_is_not_begun(models: Path, function: str) -> None:
    async with connect(make(models), SECRETS["limited"]) as client:
        path, body = asked(function, MOST + 1)
        refused = await client.post(path, json=body)
        assert refused.status_code == 400, refused.text
        assert f"costs {(MOST + 1) * PATCHES} units" in refused.json()["error"]
        # As many as it allows are let in, to wait for a worker that takes nothing.
        path, body = asked(function, MOST, timeout=200_000)
        waited = await client.post(path, json=body)
        assert waited.status_code == 504, waited.text


@pytest.mark.parametrize("function", FUNCTIONS)
async def test_what_the_queue_has_no_room_for_is_not_begun(models: Path, function: str) -> None:
    app = make(models, max_queue_cost=200)
    waiting = Job(id="a", op=Op.SAMPLE, model="tiny-cond", payload={}, rows=1, cost=PATCHES)
    await app.state.broker.submit(waiting, Terms(detached=True))
    async with connect(app, SECRETS["infer"]) as client:
        path, body = asked(function, MOST)
        refused = await client.post(path, json=body)
        assert refused.status_code == 429, refused.text
        # Both jobs together, though there would be room for one.
        assert "(16 of 200 units wait, this request costs 192)" in refused.json()["error"]


@pytest.mark.parametrize("function", [":sample", ":decode"])
@pytest.mark.parametrize("parameter", [{"previews": 50}, {"trajectory": True}, {"output_format": "png"}])
async def test_what_has_no_effect_is_refused(models: Path, function: str, parameter: dict[str, Any]) -> None:
    async with connect(make(models), SECRETS["infer"]) as client:
        path, body = asked(function, 1, **parameter)
        refused = await client.post(path, json=body)
        assert refused.status_code == 400, refused.text
        [name] = parameter
        assert f"parameters: got '{name}', allowed are" in refused.json()["error"]
