"""``tarflow sample`` and ``score`` with ``--url``: the files and tables that they give without."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from service.access.keys import digest, new_secret
from service.cli import app
from service.client import Client, Forbidden, Unauthorized
from tests.service.client.fronts import Front, Request, answer, forward
from tests.service.conftest import Start
from tests.service.pictures import file, normal, opened, pixels
from tests.service.processes import ServerProcess, environment


def run(*arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    """What a command prints that goes well, without the name of the file that it writes."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return re.sub(r'[^\s"]*/(here|there)', "", result.stdout)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("tiny-cond", ["--class", "fox"]),
        ("tiny-cond", ["--num", "3", "--guidance-scale", "1.5", "--guidance-window", "0", "2", "--solver", "jacobi"]),
        ("tiny-vp", ["--num", "2", "--trajectory", "--certify", "--solver", "sequential"]),
        ("tiny-cond", ["--trajectory", "--denoise", "--seed", "5", "--tolerance", "1e-6", "--solver", "jacobi"]),
    ],
)
def test_sample_writes_the_same(
    server: ServerProcess, models: Path, tmp_path: Path, model: str, flags: list[str]
) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    mine = done("sample", here, "--model", models / model, *flags)
    theirs = done("sample", there, "--model", model, *flags, "--url", server.url)
    # Errors below what is allowed come from rounding, which depends on who computes.
    error = r"backward error [0-9.e-]+"
    assert re.sub(error, "", theirs) == re.sub(error, "", mine)
    difference = opened(here.read_bytes()).astype(int) - opened(there.read_bytes())
    assert np.abs(difference).max() <= 2


def test_sample_asks_for_many_in_parts(front: Front, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    done("sample", out, "--model", "tiny-cond", "--num", "70", "--seed", "100", "--url", front.url)
    asked = [json.loads(request.body) for request in front.requests]
    assert [(body["seed"], body["num_images"]) for body in asked] == [(100, 64), (164, 6)]
    assert opened(out.read_bytes()).shape == (8 * 17 - 1, 9 * 17 - 1, 3)


def test_the_service_s_first_model_is_the_usual_one(front: Front, tmp_path: Path) -> None:
    done("sample", tmp_path / "out.png", "--url", front.url)
    assert json.loads(front.requests[0].body)["model"] is None
    path = tmp_path / "image.png"
    path.write_bytes(file(pixels(28)))
    assert json.loads(done("score", path, "--json", "--url", front.url))["model"] == "fashion-mnist"


def close(mine: Any, theirs: Any) -> bool:
    """Whether two documents say the same but for rounding."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(close(mine[name], theirs[name]) for name in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    return bool(mine == (pytest.approx(theirs, rel=1e-3, abs=1e-3) if isinstance(mine, float) else theirs))


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("tiny-cond", ["--class", "0", "--draws", "3", "--seed", "8"]),
        ("tiny-uncond", []),
        ("tiny-uncond", ["--alpha", "0.05", "--overlay"]),
        ("tiny-uniform", []),
    ],
)
def test_score_says_the_same(
    server: ServerProcess,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    flags: list[str],
) -> None:
    image = normal(1, 12, seed=3)[0]
    image[2:6, 7:11] = 255
    paths = [tmp_path / "a" / "image.png", tmp_path / "b" / "image.png"]
    for path, content in zip(paths, (normal(1, 12, seed=2)[0], pixels(20, 3)), strict=True):
        path.parent.mkdir()
        path.write_bytes(file(content))
    here, there = ([*flags, tmp_path / where] if "--overlay" in flags else flags for where in ("here", "there"))
    mine = json.loads(done("score", *paths, "--model", models / model, *here, "--json"))
    theirs = json.loads(done("score", *paths, "--model", model, *there, "--json", "--url", server.url))
    assert close(mine, theirs), (mine, theirs)
    if "--overlay" in flags:
        for name in ("image.png", "image-2.png"):
            first, second = (opened((tmp_path / where / name).read_bytes()) for where in ("here", "there"))
            assert first.shape == second.shape
    monkeypatch.setenv("COLUMNS", "400")
    tables = [
        done("score", *paths, "--model", models / model, *here),
        done("score", *paths, "--model", model, *there, "--url", server.url),
    ]
    for table in tables:
        assert table.count("image.png") == 2
    assert tables[0].splitlines()[-1] == tables[1].splitlines()[-1]


def without_likelihood(front: Front, request: Request) -> httpx.Response:
    """Pass it on, and the answer back as that of an image whose likelihood is not finite."""
    told = forward(front, request).json()
    told["images"][0] |= {"log_likelihood": None, "bits_per_dim": None}
    return httpx.Response(200, json=told)


def test_a_likelihood_that_is_not_finite_is_nan(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(file(pixels(12)))
    front.script = [forward, without_likelihood] * 2
    command = ["score", path, "--model", "tiny-cond", "--url", front.url]
    assert done(*command).count("nan") == 2
    [image] = json.loads(done(*command, "--json"))["images"]
    assert math.isnan(image["log_likelihood"])
    assert math.isnan(image["bits_per_dim"])


def test_a_service_without_models_is_said(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(file(pixels(12)))
    front.script = [answer(200, '{"object": "list", "data": []}')]
    refused = run("score", path, "--url", front.url)
    assert refused.exit_code == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith("Error: model: ")


def test_score_takes_a_calibration_by_its_name(tarflow: Client, server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(file(normal(1, 12)[0]))
    flags = ["--model", "tiny-uncond", "--url", server.url, "--json", "--calibration", "of-the-command"]
    refused = run("score", path, *flags)
    assert (refused.exit_code, "of-the-command" in refused.stderr) == (2, True)
    tarflow.calibrations.create("of-the-command", list(normal(24, 12, seed=1)), model="tiny-uncond")
    tarflow.calibrations.wait("of-the-command", "tiny-uncond")
    assert json.loads(done("score", path, *flags))["calibration"]["name"] == "of-the-command"
    tarflow.calibrations.delete("of-the-command", "tiny-uncond")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class", "sneakers"], ["class", "'Sneaker'"]),
        (["--model", "none"], ["model", "'none'", "tiny-cond"]),
        (["--device", "cpu"], ["device", "--url"]),
        (["--url", "127.0.0.1"], ["url", "'127.0.0.1'"]),
    ],
)
def test_what_is_refused_is_one_line(server: ServerProcess, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(file(pixels(28)))
    for command in (["sample", tmp_path / "out.png"], ["score", path]):
        refused = run(*command, "--url", server.url, *flags)
        assert refused.exit_code == 2, refused.output
        [line] = refused.stderr.splitlines()
        assert line.startswith("Error: ")
        assert all(word in line for word in words), line
    assert not (tmp_path / "out.png").exists()


def test_score_names_the_file_that_is_wrong(server: ServerProcess, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    for path, word in ((bad, "not a readable image"), (tmp_path / "none.png", "No such file")):
        refused = run("score", path, "--url", server.url)
        assert (refused.exit_code, path.name in refused.stderr, word in refused.stderr) == (2, True, True)


def test_a_key_is_sent(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, other = new_secret(), new_secret()
    keys = "".join(
        f'[{name}]\nsha256 = "{digest(key).hex()}"\nscopes = ["{scope}"]\n'
        for name, key, scope in (("acme", secret, "infer"), ("watcher", other, "metrics"))
    )
    server = start("--device", "cpu", TARFLOW_KEYS_INLINE=keys).wait_ready()
    command = ["sample", tmp_path / "out.png", "--url", server.url]
    monkeypatch.delenv("TARFLOW_KEY", raising=False)
    assert "a key is needed" in run(*command).stderr
    assert run(*command, "--key", secret).exit_code == 0
    monkeypatch.setenv("TARFLOW_KEY", secret)
    assert run(*command).exit_code == 0
    for key, kind in ((None, Unauthorized), ("wrong", Unauthorized), (other, Forbidden)):
        with Client(server.url, api_key=key) as client, pytest.raises(kind):
            client.models.list()
    with Client(server.url, api_key=secret) as client:
        assert secret not in repr(client._caller.options)
        job = client.sample.submit()
        assert job.result().id == job.id
        assert client.jobs.list()[0].id == job.id
        assert {each.op for each in client.jobs.list()} == {"sample"}


def test_commands_with_a_url_need_no_torch(server: ServerProcess, tmp_path: Path) -> None:
    program = "import sys\nfrom service.cli import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    out = tmp_path / "out.png"
    command = [sys.executable, "-c", program, "sample", out, "--url", server.url]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    assert opened(out.read_bytes()).shape == (28, 28)
