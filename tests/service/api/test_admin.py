"""Models come and go while the service runs; nobody may do that unless the settings allow it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx

from tests.service.conftest import Start
from tests.service.processes import wait_until

SAMPLE = {"num_images": 1, "guidance_scale": 0, "denoise": False, "seed": 0}


def workers(client: httpx.Client) -> list[dict[str, Any]]:
    answer = client.get("/v1/admin/workers")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def sampled(client: httpx.Client, model: str) -> int:
    return client.post("/v1/sample", json={**SAMPLE, "model": model}).status_code


def test_models_are_loaded_and_unloaded_while_it_serves(start: Start, models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "served"
    shutil.copytree(models / "tiny-vp", directory / "tiny-vp")
    server = start("--models", str(directory), "--admin", "true").wait_ready()
    with server.client() as client:
        [worker] = workers(client)
        assert (worker["ready"], worker["states"]) == (True, {"tiny-vp": "ready"})
        assert [model["id"] for model in worker["models"]] == ["tiny-vp"]
        assert sampled(client, "tiny-uncond") == 404
        shutil.copytree(models / "tiny-uncond", directory / "tiny-uncond")
        told = client.post("/v1/admin/models/tiny-uncond/load")
        assert (told.status_code, told.json()) == (202, {"model": "tiny-uncond", "action": "load", "workers": 1})
        wait_until(lambda: workers(client)[0]["states"].get("tiny-uncond") == "ready", "it is loaded")
        assert sampled(client, "tiny-uncond") == 200
        assert client.post("/v1/admin/models/tiny-uncond/unload").status_code == 202
        wait_until(lambda: "tiny-uncond" not in workers(client)[0]["states"], "it is unloaded")
        assert sampled(client, "tiny-uncond") == 404
        assert sampled(client, "tiny-vp") == 200


def test_a_bundle_that_cannot_be_loaded_leaves_the_old_one(start: Start, models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "served"
    shutil.copytree(models / "tiny-vp", directory / "tiny-vp")
    server = start("--models", str(directory), "--admin", "true").wait_ready()
    config = directory / "tiny-vp" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 999}))
    with server.client() as client:
        for name in ("tiny-vp", "nowhere"):
            assert client.post(f"/v1/admin/models/{name}/load").status_code == 202
            wait_until(lambda name=name: "failed" in workers(client)[0]["states"].get(name, ""), "it failed")
        assert sampled(client, "tiny-vp") == 200
        wrong = client.post("/v1/admin/models/tiny-vp/explode")
        assert wrong.status_code == 422


def test_without_the_setting_there_is_no_such_path(server: Any) -> None:
    assert server.get("/v1/admin/workers").status_code == 404
    assert httpx.post(f"{server.url}/v1/admin/models/fashion-mnist/unload").status_code == 404
