"""Loading and unloading with tritonclient: its calls return when it is done, as its users expect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from service.api.inference_protocol.functions import FUNCTIONS
from tests.service.conftest import Start
from tests.service.processes import PATIENCE


def states(service: triton.InferenceServerClient) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in service.get_model_repository_index()}


def scores(service: triton.InferenceServerClient, model: str) -> Any:
    [images] = [spec for spec in service.get_model_metadata(model)["inputs"] if spec["name"] == "images"]
    values = np.zeros([1, *images["shape"][1:]], np.uint8)
    tensor = triton.InferInput("images", list(values.shape), "UINT8").set_data_from_numpy(values)
    return service.infer(model, [tensor]).as_numpy("log_likelihood")


def refused(call: Any, *arguments: Any, **more: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **more)
    return caught.value.status(), caught.value.message()


def test_models_are_loaded_and_unloaded(start: Start, models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "served"
    shutil.copytree(models / "tiny-vp", directory / "tiny-vp")
    server = start("--models", str(directory), "--admin", "true").wait_ready()
    with triton.InferenceServerClient(
        server.url.removeprefix("http://"), network_timeout=PATIENCE, connection_timeout=PATIENCE
    ) as service:
        assert set(states(service).values()) == {"READY"}
        assert len(states(service)) == len(FUNCTIONS)
        # A new one can be used at once.
        assert refused(service.infer, "tiny-uncond", [])[0] == "404"
        shutil.copytree(models / "tiny-uncond", directory / "tiny-uncond")
        service.load_model("tiny-uncond")
        first = scores(service, "tiny-uncond")
        assert states(service)["tiny-uncond:sample"] == "READY"
        # One that is loaded again is what the directory holds by then.
        shutil.rmtree(directory / "tiny-uncond")
        shutil.copytree(models / "tiny-vp", directory / "tiny-uncond")
        config = directory / "tiny-uncond" / "config.json"
        config.write_text(config.read_text().replace('"tiny-vp"', '"tiny-uncond"'))
        status, said = refused(service.load_model, "tiny-uncond")
        assert (status, "the one before it still serves" in said) == ("400", True)
        assert scores(service, "tiny-uncond") == first
        shutil.rmtree(directory / "tiny-uncond")
        shutil.copytree(models / "tiny-uncond", directory / "tiny-uncond")
        service.load_model("tiny-uncond")
        assert scores(service, "tiny-uncond") == first
        # And one that is unloaded is gone at once, with its functions.
        service.unload_model("tiny-uncond", unload_dependents=True)
        assert not service.is_model_ready("tiny-uncond:encode")
        status, said = refused(scores, service, "tiny-uncond")
        assert (status, said) == ("404", "model: got 'tiny-uncond', served are 'tiny-vp'")
        assert states(service).get("tiny-uncond") in (None, "UNLOADING")
        assert np.isfinite(scores(service, "tiny-vp"))
        service.load_model("tiny-uncond")
        assert scores(service, "tiny-uncond") == first
        # What cannot be is said, and the index keeps why.
        status, said = refused(service.load_model, "nowhere")
        assert (status, "no bundle named 'nowhere'" in said) == ("400", True)
        [failed] = [entry for entry in service.get_model_repository_index() if entry["name"] == "nowhere"]
        assert failed["state"] == "UNAVAILABLE"
        assert "no bundle named 'nowhere'" in failed["reason"]
        [again] = {refused(service.load_model, "nowhere") for _ in range(2)}
        assert again == (status, said)
        for call, arguments, more, expected in (
            (service.unload_model, ("nowhere",), {}, ("404", "served are")),
            (service.load_model, ("tiny-vp:sample",), {}, ("400", "functions come and go with 'tiny-vp'")),
            (service.unload_model, ("tiny-vp:sample",), {}, ("400", "functions come and go with 'tiny-vp'")),
            (service.load_model, ("tiny-vp",), {"config": json.dumps({})}, ("400", "got a configuration or files")),
        ):
            got = refused(call, *arguments, **more)
            assert (got[0], expected[1] in got[1]) == (expected[0], True), got
    with server.client() as client:
        only = client.post("/v2/repository/index", json={"ready": True}).json()
        assert "nowhere" not in {entry["name"] for entry in only}
        for body in (b"[", b"[]", b'{"reedy": true}'):
            answer = client.post("/v2/repository/index", content=body)
            assert (answer.status_code, list(answer.json())) == (400, ["error"])
