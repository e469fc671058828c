"""A whole run: what it leaves in its directory, and that watching it changes nothing."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from model.bundle import CALIBRATION, CARD, read_bundle
from model.weights import load_flow, update_bundle
from training.card import calibration_note, evaluation_section, with_calibration, with_evaluation
from training.classes import resolve_classes
from training.config import TrainConfig, load_preset
from training.data import Images, load_images
from training.log import read_log
from training.run import Origin, Run
from training.trainer import StepReport, Trainer

CPU = torch.device("cpu")
ORIGIN = Origin(command="tarflow train tiny --data squares --out run", data_name="squares")


def make_run(config: TrainConfig, images: Images, out: Path, sample_every: int | None = None) -> Run:
    config, images = resolve_classes(config, images)
    console = Console(file=io.StringIO())
    return Run(config, images, out, CPU, origin=ORIGIN, console=console, sample_every=sample_every)


def test_a_run_leaves_log_samples_and_a_servable_bundle(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    run = make_run(config, images, tmp_path)
    assert run.execute()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bundle",
        "checkpoint.pt",
        "config.yaml",
        "log.jsonl",
        "samples",
    ]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step_{n:06d}.png" for n in (5, 10, 15)]
    assert [line["step"] for line in read_log(tmp_path)] == [10, 15]
    bundle = read_bundle(tmp_path / "bundle")
    assert load_preset(str(tmp_path / "config.yaml")) == run.trainer.config
    assert bundle.config.class_names == ("0", "1")
    assert bundle.sampling == config.sampling
    assert ORIGIN.command in bundle.card
    assert str(tmp_path) not in bundle.card
    averaged = run.trainer.averaged_flow().state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in load_flow(bundle).state_dict().items())


def test_watching_does_not_change_the_weights(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    run = make_run(config, images, tmp_path / "watched", sample_every=2)
    run.execute()
    alone = Trainer(run.trainer.config, images, tmp_path / "alone", CPU)
    alone.run(lambda report: None)
    assert all(torch.equal(v, alone.flow.state_dict()[k]) for k, v in run.trainer.flow.state_dict().items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_and_it_continues(
    config: TrainConfig, images: Images, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run = make_run(config, images, tmp_path)
    original = Trainer.run

    def run_and_signal(trainer: Trainer, observe: Callable[[StepReport], None], checkpoint_seconds: float) -> bool:
        def observe_and_signal(report: StepReport) -> None:
            # Step 5 is due for samples: the signal must not have to wait for them.
            if report.step == 5:
                os.kill(os.getpid(), number)
            observe(report)

        return original(trainer, observe_and_signal, checkpoint_seconds)

    monkeypatch.setattr(Trainer, "run", run_and_signal)
    assert not run.execute()
    assert run.trainer.step == 5
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (tmp_path / "samples").exists()
    assert "5 of 15: not finished" in read_bundle(tmp_path / "bundle").card
    monkeypatch.undo()
    assert make_run(config, images, tmp_path).execute()


def test_the_same_weights_keep_their_id_and_their_results(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    make_run(config, images, tmp_path).execute()
    first = read_bundle(tmp_path / "bundle")
    update_bundle(first, card=with_evaluation(first.card, "- figures"))
    changed = config.with_overrides(guidance_scale=2.5)
    assert make_run(changed, images, tmp_path).execute()
    again = read_bundle(tmp_path / "bundle")
    assert again.model_id == first.model_id
    assert again.sampling.guidance_scale == 2.5
    assert evaluation_section(again.card) == "- figures"
    # Other weights: the results are not theirs.
    make_run(config.with_overrides(epochs=4), images, tmp_path).execute()
    longer = read_bundle(tmp_path / "bundle")
    assert longer.model_id != first.model_id
    assert evaluation_section(longer.card) is None


def test_a_calibration_stays_as_long_as_the_weights(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    make_run(config, images, tmp_path).execute()
    first = read_bundle(tmp_path / "bundle")
    update_bundle(first, calibration=b"normal", card=with_calibration(first.card, "some images"))
    make_run(config.with_overrides(guidance_scale=2.5), images, tmp_path).execute()
    again = read_bundle(tmp_path / "bundle")
    assert again.calibration == b"normal"
    assert calibration_note(again.card) == "some images"
    make_run(config.with_overrides(epochs=4), images, tmp_path).execute()
    longer = read_bundle(tmp_path / "bundle")
    assert longer.calibration is None
    assert CALIBRATION not in longer.files
    assert calibration_note(longer.card) is None


def test_a_damaged_earlier_bundle_is_replaced(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    make_run(config, images, tmp_path).execute()
    (tmp_path / "bundle" / CARD).write_text("edited by hand")
    make_run(config, images, tmp_path).execute()
    assert read_bundle(tmp_path / "bundle").name == "tiny"


def test_a_name_that_no_bundle_can_have_is_refused_first(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: got 'a name'"):
        make_run(config.with_overrides(name="a name"), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_class_folders_of_photographs(config: TrainConfig, folder_data: Path, tmp_path: Path) -> None:
    flow = {**config.flow.to_dict(), "channels": 3, "num_classes": 0}
    config = TrainConfig.from_dict(
        {**config.to_dict(), "flow": flow, "data": {"classes_from_data": True, "holdout": 4, "flip": True}}
    ).with_overrides(epochs=1)
    images = load_images(folder_data, "train", 8, 3)
    assert make_run(config, images, tmp_path / "run").execute()
    bundle = read_bundle(tmp_path / "run" / "bundle")
    assert bundle.config.class_names == ("cat", "dog")
    assert np.isfinite([line["loss"] for line in read_log(tmp_path / "run")]).all()


def test_the_bundle_has_the_frequencies_of_the_images_that_were_used(
    config: TrainConfig, images: Images, tmp_path: Path
) -> None:
    # Of the last 4 images, the holdout, two are of class 1.
    images.labels[:30] = 0
    make_run(config.with_overrides(epochs=1), images, tmp_path / "run").execute()
    assert read_bundle(tmp_path / "run" / "bundle").config.class_prior == (35 / 40, 5 / 40)
