"""The console script: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from model.bundle import BUNDLED, CONFIG, read_bundle
from service.cli import app
from service.settings import ApiSettings
from tests.service.conftest import calibrated
from tests.service.pictures import answered, b64, file, normal, opened, pixels
from tests.service.processes import tarflow

OVERLAYS = ["image.png", "image-2.png"]


def run(*arguments: str | Path) -> Result:
    """A command in this process, which has torch already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    """One clear line and status 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]


def test_the_console_script_knows_its_commands() -> None:
    done = tarflow("--help")
    assert done.returncode == 0
    for command in ("serve", "api", "worker", "train", "evaluate", "calibrate", "anomaly", "import", "sample", "score"):
        assert command in done.stdout
    flags = tarflow("serve", "--help", COLUMNS="200").stdout
    for flag in ("--host", "--port", "--models", "--device", "--max-body-bytes", "--lease-seconds"):
        assert flag in flags


@pytest.mark.parametrize(
    ("form", "own", "others"),
    [
        ("serve", ["--port", "--device", "--state"], ["--redis", "--grace-seconds", "--metrics-port"]),
        (
            "api",
            ["--port", "--redis", "--metrics-port", "--caller-share"],
            ["--device", "--models", "--threads", "--state"],
        ),
        ("worker", ["--devices", "--redis", "--models", "--grace-seconds"], ["--port", "--host", "--max-images"]),
    ],
)
def test_each_form_shows_the_settings_that_concern_it(form: str, own: list[str], others: list[str]) -> None:
    shown = set(re.findall(r"--[a-z-]+", tarflow(form, "--help", COLUMNS="200").stdout))
    assert {*own, "--lease-seconds", "--log-level"} <= shown
    assert not shown & set(others)


@pytest.mark.parametrize("form", ["api", "worker"])
def test_a_form_that_needs_redis_asks_for_it_and_shows_no_password(form: str) -> None:
    assert_refused(run(form), "--redis", "TARFLOW_REDIS")
    refused = run(form, "--redis", "http://:open-sesame@queue")
    assert_refused(refused, "redis", "rediss")
    assert "sesame" not in refused.output
    for cut in ("redis://:open/sesame@queue:6379/0", "redis://:open#sesame@queue", "redis://:12/sesame@queue"):
        refused = run(form, "--redis", cut)
        assert_refused(refused, "redis", "%2F")
        assert "open" not in refused.output
        assert "sesame" not in refused.output
    assert "sesame" not in repr(ApiSettings(redis="redis://:open-sesame@queue"))


# serve


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (["--port", "70000"], {}, ["port", "70000"]),
        ([], {"TARFLOW_PORT": "many"}, ["port", "many"]),
        ([], {"TARFLOW_MAX_IMAGES": "0"}, ["max_images"]),
        (["--models", "/nowhere"], {}, ["/nowhere"]),
        (["--default-model", "nobody"], {}, ["default_model", "nobody", "fashion-mnist"]),
    ],
)
def test_serve_refuses_a_wrong_setting(flags: list[str], environment: dict[str, str], words: list[str]) -> None:
    done = tarflow("serve", *flags, **environment)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


def test_serve_refuses_other_settings_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_refused(run("serve", "--log-level", "loud"), "log")
    assert_refused(run("serve", "--lease-seconds", "0"), "lease_seconds")
    assert_refused(run("serve", "--models", tmp_path), "no bundle")
    monkeypatch.setenv("TARFLOW_MODELS", "/nowhere")
    assert_refused(run("serve"), "/nowhere")
    assert_refused(run("serve", "--models", tmp_path), str(tmp_path))


def test_serve_refuses_a_damaged_bundle(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "m"
    shutil.copytree(BUNDLED / "fashion-mnist", directory)
    with (directory / CONFIG).open("ab") as config:
        config.write(b" ")
    assert_refused(run("serve", "--models", directory.parent), CONFIG, "sha256")


# import


@pytest.mark.parametrize(
    ("name", "noise", "classes", "size"),
    [("tiny_cond", "0.05", 5, 16), ("tiny_uncond", "0.1", 0, 12), ("tiny_uncond_vp", "0.1", 0, 8)],
)
def test_import_makes_a_bundle(reference: Path, tmp_path: Path, name: str, noise: str, classes: int, size: int) -> None:
    out = tmp_path / name
    result = run("import", reference / f"{name}.pth", out, "--noise-std", noise)
    assert result.exit_code == 0, result.output
    assert f"model '{name}'" in result.stdout
    config = read_bundle(out).config
    assert (config.name, config.flow.num_classes, config.flow.image_size) == (name, classes, size)
    assert (config.noise.kind, config.noise.std) == ("gaussian", float(noise))
    assert config.flow.volume_preserving == name.endswith("vp")


def test_import_as_a_process_with_names(reference: Path, tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("a\nb\n\nc\nd\ne\n")
    out = tmp_path / "out"
    done = tarflow("import", reference / "tiny_cond.pth", out, "--uniform", "--class-names", names, "--name", "other")
    assert done.returncode == 0, done.stderr
    config = read_bundle(out).config
    assert (config.name, config.noise.kind, config.class_names) == ("other", "uniform", tuple("abcde"))
    names.write_text("a\nb\n")
    refused = run("import", reference / "tiny_cond.pth", out, "--uniform", "--class-names", names, "--force")
    assert_refused(refused, "class_names", "5 names")
    assert read_bundle(out).config == config


def test_import_refuses_what_is_no_checkpoint(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = reference / "tiny_cond.pth"
    assert_refused(run("import", good, out), "--noise-std", "--uniform")
    assert_refused(run("import", good, out, "--noise-std", "0.1", "--uniform"), "--noise-std")
    assert_refused(run("import", good, out, "--noise-std", "-1"), "noise.std")
    assert_refused(run("import", tmp_path / "none.pth", out, "--uniform"), "no such file")
    assert_refused(run("import", reference / "tiny_cond.safetensors", out, "--uniform"), "expected", "found")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert_refused(run("import", tmp_path / "other.pth", out, "--uniform"), "blocks.0.proj_in.weight")
    assert_refused(run("import", good, out, "--uniform", "--class-names", tmp_path / "none"), "none")
    assert not out.exists()


# sample and score


def test_sample_writes_what_the_server_gives(client: httpx.Client, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    flags = ["--guidance-scale", "1.5", "--guidance-schedule", "linear", "--attention-temperature", "0.8"]
    for num, seed in ((1, 3), (3, 40)):
        command = ["sample", out, "--model", models / "tiny-cond", "--class", "fox", "--num", num, "--seed", seed]
        result = run(*map(str, command), *flags)
        assert result.exit_code == 0, result.output
        body = {"model": "tiny-cond", "class": "fox", "num_images": num, "seed": seed}
        guidance = {"guidance_scale": 1.5, "guidance_schedule": "linear", "attention_temperature": 0.8}
        response = client.post("/v1/sample", json={**body, **guidance}, headers={"accept": "image/png"})
        difference = opened(out.read_bytes()).astype(int) - opened(response.content)
        assert np.abs(difference).max() <= 1


def test_sample_takes_the_bundled_model_by_name(client: httpx.Client, tmp_path: Path) -> None:
    result = run("sample", tmp_path / "out.png", "--class", "Bag", "--seed", "5")
    assert result.exit_code == 0, result.output
    [served] = answered(client.post("/v1/sample", json={"class": "Bag", "seed": 5}))
    assert np.abs(opened((tmp_path / "out.png").read_bytes()).astype(int) - served).max() <= 1
    recommended = client.get("/v1/models/fashion-mnist").json()["recommended"]
    assert json.dumps(recommended) in result.stdout


def test_sample_solves_as_it_is_told(client: httpx.Client, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    body = {"model": "tiny-cond", "class": "fox", "num_images": 2, "guidance_scale": 1.5, "guidance_window": [0, 2]}
    body |= {"guidance_rule": "closed_form", "solver": "jacobi", "tolerance": 0.01, "trajectory": True, "seed": 0}
    command = ["sample", out, "--model", models / "tiny-cond", "--class", "fox", "--num", "2", "--trajectory"]
    flags = ["--guidance-scale", "1.5", "--guidance-window", "0", "2", "--guidance-rule", "closed_form"]
    result = run(*command, *flags, "--solver", "jacobi", "--tolerance", "0.01")
    assert result.exit_code == 0, result.output
    assert "blocks solved jacobi/15, jacobi/15, jacobi/15; largest backward error" in result.stdout
    assert "certified within 0.01" in result.stdout
    response = client.post("/v1/sample", json=body, headers={"accept": "image/png"})
    assert np.abs(opened(out.read_bytes()).astype(int) - opened(response.content)).max() <= 2


def test_sample_says_whether_there_is_a_certificate(models: Path, tmp_path: Path) -> None:
    command = ["sample", tmp_path / "out.png", "--model", models / "tiny-vp", "--solver", "sequential"]
    assert "exact but for rounding" in run(*command).stdout
    assert "certified within 0.001" in run(*command, "--certify").stdout
    # A tuned model's passes are measured, and its plan is chosen.
    assert "blocks solved" in run(*command[:-1], "auto").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tolerance", "2"], ["tolerance", "2"]),
        (["--guidance-window", "0", "9"], ["guidance_window", "(0, 9)"]),
        (["--guidance-rule", "closed_form", "--guidance-target", "scale"], ["guidance_target", "scale"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--class", "sneakers"], ["class", "'Sneaker'"]),
        (["--guidance-scale", "-1"], ["guidance_scale", "-1"]),
        (["--attention-temperature", "0"], ["attention_temperature"]),
        (["--device", "cuda:99"], ["device", "cuda:99"]),
        (["--device", "abacus"], ["device", "abacus"]),
        (["--seed", str(2**53)], ["seed"]),
    ],
)
def test_sample_refuses_wrong_values(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    assert_refused(run("sample", tmp_path / "out.png", *flags), *words)
    assert not (tmp_path / "out.png").exists()


def test_sample_cannot_denoise_with_a_uniform_model(models: Path, tmp_path: Path) -> None:
    assert_refused(run("sample", tmp_path / "out.png", "--model", models / "tiny-uniform", "--denoise"), "denoise")


def test_score_prints_what_the_server_says(client: httpx.Client, models: Path, tmp_path: Path) -> None:
    data = [file(pixels(16, 3)), file(pixels(20, 3))]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, content in zip(paths, data, strict=True):
        path.write_bytes(content)
    flags: list[str | Path] = ["--model", models / "tiny-cond", "--class", "2", "--draws", "3", "--seed", "8"]
    result = run("score", *paths, *flags, "--json")
    assert result.exit_code == 0, result.output
    body = {"model": "tiny-cond", "class": "2", "draws": 3, "seed": 8, "images": [b64(content) for content in data]}
    served = client.post("/v1/score", json=body).json()["images"]
    printed = json.loads(result.stdout)
    assert [image["file"] for image in printed["images"]] == [str(path) for path in paths]
    for mine, theirs in zip(printed["images"], served, strict=True):
        assert mine["log_likelihood"] == pytest.approx(theirs["log_likelihood"], rel=1e-5)
        assert mine["bits_per_dim"] == pytest.approx(theirs["bits_per_dim"], rel=1e-5)
        assert mine["warnings"] == [warning["message"] for warning in theirs["warnings"]]
    assert (printed["protocol"]["draws"], printed["protocol"]["seed"]) == (3, 8)
    table = run("score", *paths, *flags)
    assert "resized" in table.stdout
    assert "density of the image" in table.stdout


def test_score_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(file(pixels()))
    bad.write_bytes(b"no image")
    assert_refused(run("score", good, bad), "bad.png", "not a readable image")
    assert_refused(run("score", good, tmp_path / "none.png"), "none.png")
    assert_refused(run("score", good, "--class", "wolf"), "class", "wolf")


def test_import_never_replaces_what_is_not_a_bundle(reference: Path, tmp_path: Path) -> None:
    keep = tmp_path / "photos" / "keep.txt"
    keep.parent.mkdir()
    keep.write_text("mine")
    checkpoint = reference / "tiny_cond.pth"
    for extra in ((), ("--force",)):
        done = tarflow("import", checkpoint, keep.parent, "--noise-std", "0.05", *extra)
        assert done.returncode == 2
        assert "photos: exists" in done.stderr
        assert keep.read_text() == "mine"
    bundle = tmp_path / "bundle"
    assert tarflow("import", checkpoint, bundle, "--noise-std", "0.05").returncode == 0
    assert tarflow("import", checkpoint, bundle, "--noise-std", "0.05").returncode == 2
    assert tarflow("import", checkpoint, bundle, "--noise-std", "0.05", "--force").returncode == 0


def test_score_gives_the_server_s_verdicts(client: httpx.Client, models: Path, tmp_path: Path) -> None:
    image = normal(1, 12, seed=3)[0]
    image[2:6, 7:11] = 255
    paths = [tmp_path / "a" / "image.png", tmp_path / "b" / "image.png"]
    for path, content in zip(paths, (normal(1, 12, seed=2)[0], image), strict=True):
        path.parent.mkdir()
        path.write_bytes(file(content))
    flags: list[str | Path] = ["--model", models / "tiny-uncond", "--alpha", "0.05", "--overlay", tmp_path / "out"]
    result = run("score", *paths, *flags, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    body = {"model": "tiny-uncond", "alpha": 0.05, "maps": "overlay", "images": [b64(p.read_bytes()) for p in paths]}
    served = client.post("/v1/score", json=body).json()
    assert printed["calibration"] == served["calibration"]
    for mine, theirs in zip(printed["images"], served["images"], strict=True):
        for name in ("is_anomaly", "alpha", "threshold", "expected_false_positive_rate", "direction"):
            assert mine[name] == theirs[name]
        assert mine["score"] == pytest.approx(theirs["score"], rel=1e-3, abs=1e-3)
        assert [region["bbox"] for region in mine["regions"]] == [region["bbox"] for region in theirs["regions"]]
    assert [image["overlay"] for image in printed["images"]] == [str(tmp_path / "out" / n) for n in OVERLAYS]
    assert all(opened((tmp_path / "out" / name).read_bytes()).shape == (228, 228, 3) for name in OVERLAYS)
    table = run("score", *paths, *flags).stdout
    assert "anomaly" in table
    assert "verdicts at level 0.05" in table
    # Doing it again replaces the pictures.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OVERLAYS)


def test_score_takes_a_calibration_from_a_file(models: Path, tmp_path: Path) -> None:
    path, mine = tmp_path / "image.png", tmp_path / "mine.safetensors"
    path.write_bytes(file(normal(1, 12)[0]))
    mine.write_bytes(calibrated(models / "tiny-uncond", "mine", seed=5))
    flags: list[str | Path] = ["--model", models / "tiny-uncond", "--calibration", mine, "--json"]
    printed = json.loads(run("score", path, *flags).stdout)
    assert printed["calibration"] == {"name": "mine", "num_calibration": 100, "score": "combined"}
    assert printed["images"][0]["regions"] is None
    assert_refused(run("score", path, *flags, "--alpha", "0.001"), "alpha", "1/101")
    assert_refused(run("score", path, "--model", models / "tiny-vp", "--calibration", mine), "'mine'", "'tiny-uncond'")
    assert_refused(run("score", path, *flags[:2], "--calibration", path), "image.png", "not a calibration")
    assert_refused(run("score", path, *flags[:2], "--calibration", tmp_path / "none"), "none", "No such file")


def test_score_without_a_calibration_is_plain(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(file(pixels(8)))
    printed = json.loads(run("score", path, "--model", models / "tiny-vp", "--json").stdout)
    assert printed.keys() == {"model", "protocol", "images"}
    assert printed["images"][0].keys() == {"file", "log_likelihood", "bits_per_dim", "warnings"}
    for flags in (["--alpha", "0.1"], ["--overlay", tmp_path / "out"]):
        assert_refused(run("score", path, "--model", models / "tiny-vp", *flags), "calibration", "--calibration")
