"""What TensorBoard's own reader finds in a run's directory."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.conftest import run_command
from training.classes import resolve_classes
from training.config import TrainConfig
from training.data import Images
from training.log import read_log
from training.run import Origin, Run

CPU = torch.device("cpu")
ORIGIN = Origin(command="tarflow train tiny --data squares --out run", data_name="squares")


def make_run(config: TrainConfig, images: Images, out: Path, *, tensorboard: bool = True) -> Run:
    config, images = resolve_classes(config, images)
    console = Console(file=io.StringIO())
    return Run(config, images, out, CPU, origin=ORIGIN, console=console, tensorboard=tensorboard)


def read(out: Path) -> EventAccumulator:
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    return board


def test_curves_are_those_of_the_log_and_pictures_those_of_the_samples(
    config: TrainConfig, images: Images, tmp_path: Path
) -> None:
    run = make_run(config, images, tmp_path)
    assert run.execute()
    board, lines = read(tmp_path), read_log(tmp_path)
    curves = {
        "training/loss": "loss",
        "training/bits_per_dim": "bits_per_dim",
        "optimization/grad_norm": "grad_norm",
        "optimization/learning_rate": "learning_rate",
        "optimization/skipped_steps": "skipped_steps",
        "progress/epoch": "epoch",
        "progress/images_per_second": "images_per_second",
    }
    assert set(board.Tags()["scalars"]) == set(curves)
    for tag, field in curves.items():
        points = board.Scalars(tag)
        assert [point.step for point in points] == [line["step"] for line in lines]
        assert [point.value for point in points] == pytest.approx([line[field] for line in lines])
    pictures = board.Images("samples")
    assert [f"step_{picture.step:06d}.png" for picture in pictures] == sorted(
        path.name for path in (tmp_path / "samples").iterdir()
    )
    for picture in pictures:
        with (
            Image.open(io.BytesIO(picture.encoded_image_string)) as shown,
            Image.open(tmp_path / "samples" / f"step_{picture.step:06d}.png") as drawn,
        ):
            assert shown.convert("RGB").tobytes() == drawn.convert("RGB").tobytes()
    (text,) = board.Tensors("configuration/text_summary")
    assert (tmp_path / "config.yaml").read_text() in text.tensor_proto.string_val[0].decode()


def test_steps_that_a_continued_run_repeats_are_shown_once(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    whole = make_run(config, images, tmp_path / "whole")
    assert whole.execute()
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    first = make_run(config, images, tmp_path / "run")
    first.trainer.stop_requested = True
    assert not first.execute()
    begun = checkpoint.read_bytes()
    assert make_run(config, images, tmp_path / "run").execute()
    # As after a SIGKILL: the checkpoint is older than what was written.
    checkpoint.write_bytes(begun)
    assert make_run(config, images, tmp_path / "run").execute()
    for tag in ("training/loss", "optimization/grad_norm"):
        expected, found = ([(p.step, p.value) for p in read(tmp_path / name).Scalars(tag)] for name in ("whole", "run"))
        assert found == expected


def test_watching_changes_no_weights(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    flows = []
    for watched in (False, True):
        run = make_run(config, images, tmp_path / str(watched), tensorboard=watched)
        assert run.execute()
        assert (tmp_path / str(watched) / "tensorboard").is_dir() == watched
        flows.append(run.trainer.averaged_flow().state_dict())
    assert all(torch.equal(value, flows[1][name]) for name, value in flows[0].items())


def test_without_the_package_it_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, preset_file: Path, idx_data: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    out = tmp_path / "run"
    told = run_command("train", preset_file, "--data", idx_data, "--out", out, "--tensorboard", status=2)
    assert "pip install 'tarflow[tensorboard]'" in told
    assert not (out / "config.yaml").exists()
