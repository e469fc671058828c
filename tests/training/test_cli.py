"""The command line: real processes for what signals and imports do, in-process runs for the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from model.bundle import BUNDLED, read_bundle
from model.weights import load_flow
from training.card import evaluation_section
from training.checkpoint import FILE_NAME, load_checkpoint
from training.cli import app
from training.data import Images
from training.features import EXTRACTORS, Extractor
from training.log import read_log

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
DEADLINE = 120.0


def invoke(*arguments: object, status: int = 0) -> tuple[str, str]:
    """Run a command in this process; returns its stdout and stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


def test_a_real_run_is_stopped_continued_and_evaluated(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "training", "train", str(preset_file), "--data", str(idx_data), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--epochs", "100000"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    give_up = time.monotonic() + DEADLINE
    while len(read_log(out)) < 3:
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=DEADLINE)
    # What follows in a script must not take it for a finished run.
    assert process.returncode == 1
    assert "checkpoint written; the same command continues the run" in text
    state = load_checkpoint(out)
    assert state is not None
    assert state.step >= 30
    assert "not finished" in read_bundle(out / "bundle").card

    epochs = state.step // 5 + 2
    finished = subprocess.run(
        [*command, "--epochs", str(epochs)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert f"continuing at step {state.step} of {5 * epochs}" in finished.stdout
    assert f"finished {5 * epochs} steps" in finished.stdout
    bundle = read_bundle(out / "bundle")
    load_flow(bundle)
    assert f"tarflow train tiny.yaml --data squares --out run --epochs {epochs}" in bundle.card
    logged = [line["step"] for line in read_log(out)]
    assert logged == sorted(set(logged))
    assert logged[-1] == 5 * epochs

    document = json.loads(invoke("evaluate", out / "bundle", "--data", idx_data, "--json")[0])
    assert document["evaluations"][0]["num_images"] == 20


def test_the_commands_are_cheap_to_import_and_list() -> None:
    code = (
        "import sys, training.cli; training.cli.app(['train', '--list'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    *presets, has_torch = result.stdout.splitlines()
    assert [line.split(":")[0] for line in presets if not line.startswith(" ")] == [
        "afhq256",
        "deep-shallow-28",
        "emoji-64",
        "fashion-mnist",
        "fashion-mnist-likelihood",
        "fine-tune",
        "hybrid",
        "imagenet128",
        "imagenet64-conditional",
        "imagenet64-conditional-p4",
        "imagenet64-likelihood",
        "imagenet64-unconditional",
        "latents-256",
        "parts-64",
        "photos-64",
        "toy-28",
    ]
    assert has_torch == "False"


def test_options_override_the_preset(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    options = ("--epochs", 1, "--batch-size", 4, "--learning-rate", 0.001, "--precision", "bf16", "--seed", 7)
    invoke(
        *("train", preset_file, "--data", idx_data, "--out", tmp_path / "run"),
        *(*options, "--name", "mine", "--sample-every", 4, "--device", "cpu"),
    )
    bundle = read_bundle(tmp_path / "run" / "bundle")
    training = bundle.config.training
    assert bundle.name == "mine"
    assert (training["seed"], training["steps"], training["precision"]) == (7, 10, "bf16")
    assert training["optimization"]["batch_size"] == 4
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == [
        f"step_{n:06d}.png" for n in (4, 8, 10)
    ]
    assert "--batch-size 4 --learning-rate 0.001 --precision bf16 --seed 7 --name mine" in bundle.card


def test_any_field_is_set_and_the_resolved_configuration_is_a_preset(
    preset_file: Path, idx_data: Path, tmp_path: Path
) -> None:
    settings = ("--set", "flow.width=024", "--set", "ema_decay=0.5", "--set", "optimization.learning_rate=2e-3")
    out = tmp_path / "run"
    invoke("train", preset_file, "--data", idx_data, "--out", out, "--epochs", 1, *settings)
    bundle = read_bundle(out / "bundle")
    assert bundle.config.flow.width == 24
    assert bundle.config.training["optimization"]["ema_decay"] == 0.5
    assert bundle.config.training["optimization"]["learning_rate"] == 2e-3
    assert "--set flow.width=024 --set ema_decay=0.5" in bundle.card
    # The same run from its own file: nothing is left to do, and it is no other run.
    again, _ = invoke("train", out / "config.yaml", "--data", idx_data, "--out", out)
    assert "continuing at step 5 of 5" in again


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("flow.widht=24", "flow.widht', which is no field of a configuration; allowed is flow.width"),
        ("width=wide", "flow.width: got 'wide'"),
        ("noise.std=9", "noise.std: got 9, allowed is a number in (0, 2)"),
        ("flip", "set: got 'flip', allowed is FIELD=VALUE"),
        ("batch_size=[", "batch_size: got '['"),
        ("class_names=ab", "class_names: got 'ab', allowed is a list"),
        # YAML 1.1 would read the number of seconds in it.
        ("epochs=1:30", "optimization.epochs: got '1:30'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    preset_file: Path, idx_data: Path, tmp_path: Path, setting: str, message: str
) -> None:
    _, error = invoke(
        *("train", preset_file, "--data", idx_data, "--out", tmp_path / "run", "--set", setting), status=2
    )
    assert message in error
    assert not (tmp_path / "run").exists()


def test_classes_that_are_set_against_the_datas_are_refused(
    preset: dict[str, object], idx_data: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "from-data.yaml", tmp_path / "run"
    flow = {key: value for key, value in preset["flow"].items() if key != "num_classes"}
    path.write_text(yaml.safe_dump({**preset, "flow": flow, "data": {"classes_from_data": True}}))
    train = ("train", path, "--data", idx_data, "--out", out, "--epochs", 1)
    for settings, message in (
        (("--set", "num_classes=7"), "tiny is a model of 7 classes, but the data has 2 (0, 1)"),
        (("--set", "num_classes=0"), "flow.num_classes: got 0, allowed is the number in the data"),
    ):
        assert message in invoke(*train, *settings, status=2)[1]
        assert not out.exists()
    invoke(*train)
    assert read_bundle(out / "bundle").config.class_names == ("0", "1")
    # Continued by the same command, and from its own file, which has the classes that were found.
    for again in (train, ("train", out / "config.yaml", *train[2:])):
        assert "continuing at step 5 of 5" in invoke(*again)[0]
    settings = ("--set", "num_classes=2", "--set", "class_names=[left, right]")
    invoke(*train[:4], "--out", tmp_path / "named", "--epochs", 1, *settings)
    assert read_bundle(tmp_path / "named" / "bundle").config.class_names == ("left", "right")
    settings = ("--set", "num_classes=0", "--set", "classes_from_data=false")
    invoke(*train[:4], "--out", tmp_path / "without", "--epochs", 1, *settings)
    assert read_bundle(tmp_path / "without" / "bundle").config.flow.num_classes == 0


def test_evaluate_writes_the_card_and_replaces_what_it_wrote(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke("train", preset_file, "--data", idx_data, "--out", out, "--epochs", 1)
    before = read_bundle(out / "bundle")
    text, _ = invoke("evaluate", out / "bundle", "--data", idx_data, "--write-card", "--draws", 2)
    card = read_bundle(out / "bundle")
    first = evaluation_section(card.card)
    assert card.model_id == before.model_id
    assert first is not None
    # The card says what was printed.
    printed = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert [line[3:] for line in first.splitlines()] == [line[1:] for line in printed]
    invoke("evaluate", out / "bundle", "--data", idx_data, "--write-card", "--seed", 100)
    second = evaluation_section(read_bundle(out / "bundle").card)
    assert second is not None
    assert second != first
    assert "2 noise draws" not in second


def test_two_bundles_are_compared(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    bundles = []
    for seed in (0, 1):
        invoke("train", preset_file, "--data", idx_data, "--out", tmp_path / str(seed), "--epochs", 1, "--seed", seed)
        bundles.append(tmp_path / str(seed) / "bundle")
    text, _ = invoke("evaluate", *bundles, "--data", idx_data)
    assert "paired difference, tiny" in text
    assert "95% interval" in text
    document = json.loads(invoke("evaluate", *bundles, "--data", idx_data, "--json")[0])
    assert len(document["evaluations"]) == 2
    low, high = document["paired_differences"][0]["difference"]["interval_95"]
    assert low < high


def test_accuracy_of_one_bundle_and_of_two(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    bundles = []
    for seed in (0, 1):
        invoke("train", preset_file, "--data", idx_data, "--out", tmp_path / str(seed), "--epochs", 1, "--seed", seed)
        bundles.append(tmp_path / str(seed) / "bundle")
    command = ("--data", idx_data, "--accuracy", "--batch-size", 7)
    text, _ = invoke("evaluate", bundles[0], *command, "--write-card")
    (line,) = [line.strip() for line in text.splitlines() if "Bayes accuracy" in line]
    assert "95% Wilson interval" in line
    assert f"- {line}" in read_bundle(bundles[0]).card
    document = json.loads(invoke("evaluate", *bundles, *command, "--json")[0])
    shares = [evaluation["bayes_accuracy"]["accuracy"] for evaluation in document["evaluations"]]
    assert document["paired_differences"][0]["accuracy_difference"]["mean"] == pytest.approx(shares[1] - shares[0])
    text, _ = invoke("evaluate", *bundles, *command)
    assert text.count("Bayes accuracy: ") == 2
    assert "paired difference of accuracy, tiny" in text


@pytest.fixture
def many_images(tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]) -> Path:
    """Data with a test split for a covariance of 64 features."""
    write_idx(tmp_path / "many", make_images())
    return write_idx(tmp_path / "many", make_images(160, seed=1), "t10k")


def test_a_sweep_writes_table_document_and_sheet_and_saves_the_best(
    preset_file: Path, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = Extractor(name="pixels", num_features=64, extract=lambda pixels: pixels.float().flatten(1))
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: pixels)
    bundle, out = tmp_path / "run" / "bundle", tmp_path / "sweep"
    invoke("train", preset_file, "--data", many_images, "--out", bundle.parent, "--epochs", 1)
    before = read_bundle(bundle)
    axes = ("--scales", "2,4", "--schedules", "linear", "--rules", "linear", "--num-samples", 128)
    command = ("sweep", bundle, "--data", many_images, "--out", out, *axes, "--confirm-samples", 128)
    text, _ = invoke(*command)
    # No guidance, 2 scales at 2 temperatures, and given a class what the bundle recommends.
    assert [text.count(f"| {mode} ") for mode in ("conditional", "unconditional")] == [6, 5]
    assert "written to" in text
    assert (out / "sweep.md").read_text() in text
    assert read_bundle(bundle).sampling == before.sampling
    with Image.open(out / "sweep.png") as sheet:
        assert sheet.height > 6 * 48
    options = ("--conditional", "--confirm-samples", 0, "--save", "conditional", "--json")
    stdout, stderr = invoke(*command, *options)
    document = json.loads(stdout)
    assert document == json.loads((out / "sweep.json").read_text())
    assert list(document["modes"]) == ["conditional"]
    after = read_bundle(bundle)
    assert after.sampling.to_dict() == document["modes"]["conditional"]["best"]
    assert after.model_id == before.model_id
    assert "now recommends" in stderr

    for arguments, expected in [
        (("--save", "unconditional", "--conditional"), "save: got 'unconditional', allowed is"),
        (("--scales", "strong"), "scales: got 'strong'"),
        (("--num-samples", 100), "num_samples: got 100, allowed is an integer >= 128"),
        (("--split", "train"), "components: got 64, allowed is 1 to 43 for 44 real images"),
    ]:
        _, stderr = invoke(*command, *arguments, status=2)
        assert expected in stderr
        assert len(stderr.splitlines()) == 1


def test_a_user_s_mistake_is_one_line_and_status_2(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / FILE_NAME).write_bytes(b"damaged")
    (tmp_path / "file").write_text("")
    train, evaluate = ("train", preset_file, "--data", idx_data, "--out"), ("evaluate", "--data", idx_data)
    ablate = ("ablate", "--data", idx_data, "--out", tmp_path / "file", "--image-size", 8, "--batch-size", 8)
    ablate += ("--components", 8, "--num-samples", 40)
    mistakes = [
        (("train", "no-such-preset", "--data", idx_data, "--out", out), "no-such-preset"),
        (("train", preset_file, "--data", empty, "--out", out), "no images"),
        (("train", preset_file, "--data", tmp_path / "nowhere", "--out", out), "no such directory"),
        (("train", "fashion-mnist", "--data", idx_data, "--out", out), "8x8"),
        ((*train, damaged), "cannot be continued"),
        ((*train, tmp_path / "file"), f"out: got '{tmp_path / 'file'}', allowed is a directory"),
        ((*train, tmp_path / "file" / "run"), f"; {tmp_path / 'file'} is a file"),
        (ablate, f"{tmp_path / 'file'}: is a file, allowed is a directory"),
        ((*train, out, "--device", "tpu"), "device"),
        ((*train, out, "--device", "cuda:99"), "device"),
        ((*train, out, "--precision", "float16"), "precision"),
        ((*train, out, "--batch-size", "0"), "batch_size"),
        ((*train, out, "--batch-size", "1000"), "batch_size"),
        ((*evaluate, out), "no such directory"),
        ((*evaluate, idx_data), "is this a bundle?"),
    ]
    for arguments, expected in mistakes:
        stdout, stderr = invoke(*arguments, status=2)
        assert stdout == ""
        assert len(stderr.splitlines()) == 1, stderr
        assert stderr.startswith("Error: ")
        assert expected in stderr


def test_another_configuration_is_not_continued(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    train = ("train", preset_file, "--data", idx_data, "--out", tmp_path / "run", "--epochs", 1)
    invoke(*train)
    _, stderr = invoke(*train, "--seed", 5, status=2)
    assert "seed (0 there, 5 here)" in stderr


def test_a_diverged_run_ends_with_status_1(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    train = ("train", preset_file, "--data", idx_data, "--out", tmp_path / "run", "--sample-every", 10000)
    _, stderr = invoke(*train, "--learning-rate", 1e30, "--epochs", 100, status=1)
    assert stderr.startswith("Error: 50 steps in a row")


def test_a_run_that_learned_nothing_leaves_no_model(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ("train", preset_file, "--data", idx_data, "--out", out, "--epochs", 2, "--sample-every", 2)
    _, stderr = invoke(*train, "--set", "embedding_std=1e30", "--checkpoint-seconds", 0, status=1)
    assert stderr.startswith("Error: none of the 10 steps had a finite loss and gradient")
    assert not (out / "bundle").exists()
    assert not (out / "samples").exists()
    assert "starting of 10" in invoke(*train)[0]


def test_a_warm_up_that_never_ends_is_told(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    train = ("train", preset_file, "--data", idx_data, "--epochs", 1, "--out")
    text, _ = invoke(*train, tmp_path / "long", "--set", "warmup_epochs=1e9")
    says = "warm-up takes the whole run (5 of 5,000,000,000 steps): the learning rate never reaches 0.01"
    assert text.splitlines()[1] == says
    assert "warm-up" not in invoke(*train, tmp_path / "short", "--set", "warmup_epochs=1.0")[0]


def test_too_little_memory_is_one_line(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    train = ("train", preset_file, "--data", idx_data, "--out", tmp_path / "run", "--set", "width=1000000000000")
    _, stderr = invoke(*train, status=1)
    assert len(stderr.splitlines()) == 1
    assert "allocate memory" in stderr
    assert "accumulation" in stderr


def test_a_bundled_model_is_found_by_name(monkeypatch: pytest.MonkeyPatch, idx_data: Path, tmp_path: Path) -> None:
    assert BUNDLED.name == "bundled"
    inside = tmp_path / "bundled" / "some-model"
    inside.mkdir(parents=True)
    monkeypatch.setattr("model.bundle.BUNDLED", tmp_path / "bundled")
    _, stderr = invoke("evaluate", "some-model", "--data", idx_data, status=2)
    assert "is this a bundle?" in stderr
