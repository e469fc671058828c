"""Fine-tuning: a run begins with a bundle's weights, says so in what it leaves, and refuses weights that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from model.bundle import Bundle, read_bundle
from model.codecs.weights import read_autoencoder
from model.config import NoiseProtocol
from model.flow import Flow
from model.weights import load_flow
from service.cli import app
from tests.training.conftest import Preset, run_command
from training.checkpoint import CheckpointError, data_fingerprint
from training.config import DataOptions, TrainConfig, load_preset
from training.data import DataError, Images
from training.provenance import training_split
from training.start import Start
from training.trainer import Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
MakeBundle = Callable[..., Bundle]


def assert_same_weights(ours: Flow, theirs: Flow) -> None:
    other = theirs.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in ours.state_dict().items())


def test_the_first_step_begins_with_the_bundles_weights(
    config: TrainConfig, images: Images, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle()
    trainer = Trainer(config, images, tmp_path / "run", CPU, start=Start(bundle))
    assert_same_weights(trainer.flow, load_flow(bundle))
    # What is served before the first step is the start too.
    assert_same_weights(trainer.averaged_flow(), load_flow(bundle))
    trainer.run(lambda report: None)
    assert not torch.equal(trainer.flow.blocks[0].proj_in.weight, load_flow(bundle).blocks[0].proj_in.weight)


def test_a_fine_tuned_run_continues_exactly_and_from_nothing_else(
    config: TrainConfig, images: Images, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    start = Start(make_bundle())
    straight = Trainer(config, images, tmp_path / "straight", CPU, start=start)
    straight.run(lambda report: None)
    out = tmp_path / "resumed"
    trainer = Trainer(config, images, out, CPU, start=start)

    def stop(trainer: Trainer) -> None:
        trainer.stop_requested = True

    trainer.run(lambda report: stop(trainer))
    for other in (Start(make_bundle(seed=1)), None):
        with pytest.raises(CheckpointError, match=f"holds a run from {start.bundle.model_id}, and not from"):
            Trainer(config, images, out, CPU, start=other)
    trainer = Trainer(config, images, out, CPU, start=start)
    assert trainer.step == 1
    trainer.run(lambda report: None)
    assert_same_weights(trainer.flow, straight.flow)
    new = tmp_path / "new"
    Trainer(config, images, new, CPU).save()
    with pytest.raises(CheckpointError, match="holds a run from new weights, and not from"):
        Trainer(config, images, new, CPU, start=start)


def test_other_architectures_classes_and_noises_are_refused(
    config: TrainConfig, images: Images, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    start, out = Start(make_bundle()), tmp_path / "run"
    cases = {
        r"from squares: flow.width: got 16, allowed is 32, as in the preset": replace(
            config, flow=replace(config.flow, width=32)
        ),
        r"from squares: flow.num_classes: got 2, allowed is 3, as": replace(
            config, flow=replace(config.flow, num_classes=3)
        ),
        r"from squares: flow.volume_preserving: got False, allowed is True": replace(
            config, flow=replace(config.flow, volume_preserving=True)
        ),
        r"from squares: class_names: got '0, 1', allowed is those of the preset, in their order: 1, 0": replace(
            config, class_names=("1", "0")
        ),
        r"from squares: noise.space: got 'pixels', allowed is 'latents'": replace(
            config, noise=NoiseProtocol(kind="gaussian", std=0.1, space="latents")
        ),
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message):
            Trainer(other, images, out, CPU, start=start)
    assert not out.exists()
    # Less noise is something that one may want to fine-tune to.
    quieter = replace(config, noise=NoiseProtocol(kind="gaussian", std=0.05))
    Trainer(quieter, images, out, CPU, start=start)


def test_what_the_bundle_has_seen_cannot_be_kept_out(
    config: TrainConfig, images: Images, make_images: Callable[..., Images], make_bundle: MakeBundle, tmp_path: Path
) -> None:
    start = Start(make_bundle(images.part(None, 42)))
    allowed = "data.holdout: got 4, allowed is at most 2: squares was trained on the other 42 of these images"
    with pytest.raises(ValueError, match=allowed):
        Trainer(config, images, tmp_path / "run", CPU, start=start)
    Trainer(config.with_overrides(holdout=2), images, tmp_path / "run", CPU, start=start)
    # Of other images nothing is known.
    Trainer(config, make_images(seed=3), tmp_path / "others", CPU, start=start)


@pytest.fixture
def short_preset(preset: Preset, tmp_path: Path) -> Path:
    """What a preset for fine-tuning has to say."""
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump({name: preset[name] for name in ("optimization", "data")}))
    return path


def test_the_command_takes_from_the_bundle_what_the_preset_leaves_out(
    short_preset: Path, idx_data: Path, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle, out = make_bundle(), tmp_path / "run"
    arguments = ("--data", idx_data, "--out", out, "--from", bundle.path, "--epochs", 1, "--device", "cpu")
    run_command("train", short_preset, *arguments)
    tuned = read_bundle(out / "bundle")
    ours, theirs = tuned.config, bundle.config
    assert (ours.name, ours.flow, ours.noise, ours.class_names) == (
        *(theirs.name, theirs.flow, theirs.noise, theirs.class_names),
    )
    assert tuned.sampling == bundle.sampling
    assert ours.training["from"] == {"name": "squares", "model_id": bundle.model_id}
    assert tuned.model_id != bundle.model_id
    assert f"- Fine-tuned from squares (`{bundle.model_id}`)" in tuned.card
    assert "tarflow train short.yaml --data squares --out run --from bundle-0 --epochs 1" in tuned.card
    assert str(tmp_path) not in tuned.card
    # What it resolved to is a preset for the bundle's weights, and never one for new ones.
    resolved = load_preset(str(out / "config.yaml"), Start(bundle).defaults)
    assert (resolved.flow, resolved.noise, resolved.class_names) == (theirs.flow, theirs.noise, theirs.class_names)
    started_from = rf"preset config: started_from: got 'squares \({bundle.model_id}\)', allowed is none without --from"
    with pytest.raises(ValueError, match=started_from):
        load_preset(str(out / "config.yaml"))
    again = ("--data", idx_data, "--out", tmp_path / "again", "--from", bundle.path, "--device", "cpu")
    run_command("train", out / "config.yaml", *again)
    assert read_bundle(tmp_path / "again" / "bundle").model_id == tuned.model_id


def test_a_run_does_not_overwrite_what_it_begins_with(
    short_preset: Path, idx_data: Path, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = tmp_path / "run" / "bundle"
    shutil.copytree(make_bundle().path, bundle)
    before = read_bundle(bundle).model_id
    arguments = ("--data", idx_data, "--out", tmp_path / "run", "--from", bundle, "--device", "cpu")
    error = run_command("train", short_preset, *arguments, status=2)
    assert error.startswith(f"Error: out: got {tmp_path / 'run'}, whose bundle the run begins with, allowed is another")
    assert read_bundle(bundle).model_id == before


@pytest.fixture
def trained(short_preset: Path, idx_data: Path, make_bundle: MakeBundle, tmp_path: Path) -> Path:
    """A bundle that was trained on its data but for the last four images."""
    out = tmp_path / "trained"
    arguments = ("--data", idx_data, "--out", out, "--from", make_bundle().path, "--epochs", 1, "--device", "cpu")
    run_command("train", short_preset, *arguments, "--set", "holdout=4")
    return out / "bundle"


def test_a_holdout_stays_one_of_its_own_images_only(
    trained: Path,
    idx_data: Path,
    make_images: Callable[..., Images],
    write_idx: Callable[..., Path],
    tmp_path: Path,
) -> None:
    flips = tmp_path / "flips.yaml"
    flips.write_text(yaml.safe_dump({"optimization": {"batch_size": 8, "epochs": 1}, "data": {"flip": True}}))
    other = write_idx(tmp_path / "other", make_images(seed=3))

    def holdout(data: Path, *settings: str) -> int:
        out = tmp_path / f"run-{data.name}-{len(settings)}"
        run_command("train", flips, "--data", data, "--out", out, "--from", trained, "--device", "cpu", *settings)
        record = read_bundle(out / "bundle").config.training["data"]
        assert record["flip"]
        return int(record["holdout"])

    assert holdout(idx_data) == 4
    assert holdout(other) == 0
    assert holdout(other, "--set", "holdout=3") == 3


def test_classes_that_come_from_the_data_must_be_the_bundles(
    preset: Preset, trained: Path, idx_data: Path, tmp_path: Path
) -> None:
    content = {**preset, "data": {"classes_from_data": True}}
    content["flow"] = {key: value for key, value in content["flow"].items() if key != "num_classes"}
    content.pop("class_names", None)
    path = tmp_path / "from-data.yaml"
    path.write_text(yaml.safe_dump(content))
    arguments = ("--data", idx_data, "--from", trained, "--device", "cpu", "--epochs", 1)
    run_command("train", path, *arguments, "--out", tmp_path / "run")
    assert read_bundle(tmp_path / "run" / "bundle").config.class_names == ("0", "1")


def test_no_run_has_seen_what_is_called_kept_out(
    config: TrainConfig, images: Images, make_images: Callable[..., Images], make_bundle: MakeBundle
) -> None:
    first = make_bundle(images.part(None, 42))
    earlier = first.config.training
    other = make_images(seed=3)
    record = {
        **earlier,
        "data": {**earlier["data"], "num_images": 40, "sha256": data_fingerprint(other.part(None, 40))},
    }
    tuned = replace(first, config=replace(first.config, training={**record, "from": {"training": earlier}}))
    # What a run before the last one was trained on is not new, and still its own data.
    assert len(training_split(tuned, images).kept_out) == len(images) - 42
    assert len(training_split(tuned, other).kept_out) == len(other) - 40
    # A third run on fewer of the first one's images makes none of them new.
    fewer = {**earlier["data"], "num_images": 30, "sha256": data_fingerprint(images.part(None, 30))}
    again = {**earlier, "data": fewer, "from": {"training": dict(tuned.config.training)}}
    thrice = replace(first, config=replace(first.config, training=again))
    assert len(training_split(thrice, images).trained_on) == 42
    with pytest.raises(ValueError, match="was trained on the other 42 of these images"):
        Start(thrice).check_holdout(config.with_overrides(holdout=4), images)
    with pytest.raises(DataError, match="not the ones it was trained on"):
        training_split(thrice, images.part(1, None))


def test_what_was_kept_out_stays_so(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    training = {"data": {"name": "squares", "num_images": 40, "holdout": 4, "flip": True}}
    known = Start(replace(bundle, config=replace(bundle.config, training=training)))
    assert load_preset("fine-tune", known.defaults).data == DataOptions(holdout=4, flip=True)
    assert load_preset("fine-tune", Start(bundle).defaults).data == DataOptions()


def test_a_preset_without_a_model_needs_a_bundle(short_preset: Path, idx_data: Path, tmp_path: Path) -> None:
    error = run_command("train", short_preset, "--data", idx_data, "--out", tmp_path / "run", status=2)
    leaves = "leaves the model to the bundle that it fine-tunes"
    assert error == f"Error: from: got None, allowed is --from BUNDLE: the preset short {leaves}\n"
    error = run_command("train", "fine-tune", "--data", idx_data, "--out", tmp_path / "run", status=2)
    assert error == f"Error: from: got None, allowed is --from BUNDLE: the preset fine-tune {leaves}\n"
    assert not (tmp_path / "run").exists()


def test_a_preset_with_half_a_model_is_told_what_it_lacks(
    preset_file: Path, preset: Preset, idx_data: Path, tmp_path: Path
) -> None:
    preset_file.write_text(yaml.safe_dump({name: value for name, value in preset.items() if name != "noise"}))
    error = run_command("train", preset_file, "--data", idx_data, "--out", tmp_path / "run", status=2)
    assert error == "Error: preset tiny: noise: got None, allowed is one in its file, or that of --from BUNDLE\n"


def test_a_bundle_that_is_none_is_refused(preset_file: Path, idx_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    error = run_command("train", preset_file, "--data", idx_data, "--out", out, "--from", tmp_path / "no", status=2)
    assert str(tmp_path / "no") in error
    assert not out.exists()


@pytest.mark.parametrize("name", ["fine-tune", "hybrid"])
def test_the_presets_fit_any_bundle_with_classes(
    images: Images, make_bundle: MakeBundle, tmp_path: Path, name: str
) -> None:
    start = Start(make_bundle())
    config = load_preset(name, start.defaults).with_overrides(batch_size=8, epochs=0.5)
    trainer = Trainer(config, images, tmp_path, CPU, start=start)
    assert trainer.run(lambda report: None)
    assert trainer.skipped_steps == 0


def tarflow(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.long
def test_an_official_checkpoint_is_imported_fine_tuned_and_evaluated(tmp_path: Path) -> None:
    data, tiny, run = (tmp_path / name for name in ("data", "tiny", "run"))
    names, random = ("cat", "dog", "fox", "horse", "owl"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in names:
            folder = data / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(60, 200, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "names.txt").write_text("\n".join(names))
    checkpoint = ROOT / "tests" / "reference" / "tiny_cond.pth"
    assert tarflow("import", checkpoint, tiny, "--noise-std", "0.05", "--class-names", tmp_path / "names.txt")
    options = ("--epochs", 4, "--batch-size", 8, "--learning-rate", 0.001, "--device", "cpu")
    assert tarflow("train", "fine-tune", "--from", tiny, "--data", data, "--out", run, *options)
    imported, tuned = read_bundle(tiny), read_bundle(run / "bundle")
    assert tuned.config.training["from"]["model_id"] == imported.model_id
    assert (tuned.config.flow, tuned.config.noise) == (imported.config.flow, imported.config.noise)
    document = json.loads(tarflow("evaluate", tiny, run / "bundle", "--data", data, "--accuracy", "--json"))
    before, after = (evaluation["bits_per_dim"]["mean"] for evaluation in document["evaluations"])
    assert after < before


def test_models_of_latents_are_not_fine_tuned(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    codec = read_autoencoder(ROOT / "tests" / "reference" / "autoencoder-kl" / "grey").config
    flow = replace(bundle.config.flow, channels=codec.latent_channels)
    noise = NoiseProtocol(kind="gaussian", std=0.1, space="latents")
    latents = replace(bundle, config=replace(bundle.config, flow=flow, noise=noise, codec=codec))
    with pytest.raises(ValueError, match="from: got 'squares', allowed is a model of pixels"):
        Start(latents)
