"""The report of a bundle: every figure with its comparison, in words, as data and in pictures; its baseline."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from model.bundle import Bundle, BundleConfig, read_bundle
from model.config import NoiseProtocol, SamplingDefaults
from model.flow import Flow
from model.weights import load_flow, write_bundle
from service.local import import_checkpoint
from tests.training.conftest import run_command
from tests.training.test_latents import AUTOENCODER
from tests.training.test_latents import PRESET as LATENTS
from training.ablations.measure import Drawn, draw_samples
from training.baselines.coupling import CouplingFlow
from training.baselines.equal import (
    LEARNING_RATE,
    baseline_config,
    images_trained_on,
    passes_trained_on,
    train_baseline,
)
from training.card import evaluation_section
from training.classes import resolve_classes
from training.config import TrainConfig
from training.data import Images, load_images
from training.features import EXTRACTORS, Extractor
from training.provenance import training_runs
from training.quality import reconstruction_errors
from training.run import Origin, Run
from training.start import Start

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("pixel_features")


@pytest.fixture
def data(tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]) -> Path:
    write_idx(tmp_path / "squares", make_images(300))
    return write_idx(tmp_path / "squares", make_images(160, seed=1), "t10k")


@pytest.fixture
def bundle(config: TrainConfig, data: Path, tmp_path: Path) -> Bundle:
    """A bundle trained for a moment, with a holdout of 140."""
    config = config.with_overrides(holdout=140, epochs=1)
    config, images = resolve_classes(config, load_images(data, "train", 8, 1))
    origin = Origin(command="tarflow train", data_name=data.name)
    console = Console(file=io.StringIO())
    Run(config, images, tmp_path / "run", CPU, origin=origin, console=console, sample_every=10**6).execute()
    return read_bundle(tmp_path / "run" / "bundle")


def report(bundle: Bundle, data: Path, out: Path, *options: object, samples: int = 150) -> dict[str, Any]:
    arguments = [bundle.path, "--data", data, "--report", out, "--samples", samples, "--train-limit", "0", *options]
    run_command("evaluate", *arguments)
    content = json.loads((out / "report.json").read_text())
    assert isinstance(content, dict)
    return content


def test_the_report_says_everything_with_its_comparison(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    baseline_with = ("--baseline-learning-rate", "0.002")
    found = report(bundle, data, out, *baseline_with, "--write-card")
    assert found["model_id"] == bundle.model_id
    samples, real = (found["distances"][name] for name in ("samples", "real_images"))
    assert samples["num_images"] == 150
    # Real images of a holdout are nearer to the test images than samples of a model that has hardly been trained.
    assert real["from"] == "the training split's holdout"
    for name in ("frechet", "kernel"):
        assert real[name]["value"] < samples[name]["value"]
    assert abs(real["frechet"]["value"]) < 5 * real["frechet"]["standard_error"] + 1
    assert real["precision"]["value"] > samples["precision"]["value"]
    assert found["copying"]["training_images"] == 160
    assert found["copying"]["known_to_be_the_models"] is True
    assert 0 <= found["copying"]["share_nearer_than_1_percent_of_test_images"] <= 1
    assert found["reconstruction"]["largest"] < 0.1
    # As many steps as the bundle: an epoch of 20.
    baseline = found["baseline"]
    assert baseline["images_seen"] == bundle.config.training["steps"] * 8 == 160
    # The narrowest coupling flow takes more operations than so small a model, and the report says so.
    least = CouplingFlow(bundle.config.flow, 8).flops_per_image
    assert baseline["flops_per_image"] == least > baseline["model_flops_per_image"]
    difference = baseline["bits_per_dim"] - found["likelihood"]["bits_per_dim"]["mean"]
    assert baseline["minus_model"]["mean"] == pytest.approx(difference, abs=1e-6)
    assert (baseline["model_images_seen"], baseline["learning_rate"]) == (160, 0.002)
    assert found["likelihood"]["bayes_accuracy"]["num_images"] == 160
    text, card = (out / "report.md").read_text(), evaluation_section(read_bundle(bundle.path).card)
    assert card is not None
    figure = f"{samples['frechet']['value']:.2f} ± "
    for says in (figure, "Baseline of a larger budget", "learning rate 0.002", "precision", "Bayes accuracy"):
        assert says in card
    for figure in (samples["frechet"]["value"], real["frechet"]["value"]):
        assert f"{figure:.2f} ± " in text
    assert f"{baseline['bits_per_dim']:.4f}" in text
    assert "not comparable with published FID" in text
    assert "classes in the reference's shares" in text
    assert "is not known" not in text
    assert "There are 140 of them for 150 samples" in text
    assert found["copying"]["mirrored_too"] is False
    assert "mirror images" not in text
    for name in ("samples.png", "nearest.png"):
        assert f"]({name})" in text
        with Image.open(out / name) as picture:
            assert picture.width > 8 * 7
    # The baseline is there: another report does not train it again.
    before = (out / "baseline" / "checkpoint.pt").stat().st_mtime_ns
    assert report(bundle, data, out, *baseline_with)["baseline"] == baseline
    assert (out / "baseline" / "checkpoint.pt").stat().st_mtime_ns == before


def test_one_sample_that_is_not_finite_does_not_take_the_figures_of_all_others(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but_one(*args: Any) -> Drawn:
        drawn = draw_samples(*args)
        return Drawn(drawn.pixels[1:], drawn.not_finite + 1, drawn.seconds)

    monkeypatch.setattr("training.quality.draw_samples", all_but_one)
    distances = report(bundle, data, tmp_path / "report", samples=60)["distances"]
    assert distances["samples"]["num_images"] == 59
    assert distances["components"] == 29


def test_a_model_without_classes_has_none_in_its_report(config: TrainConfig, data: Path, tmp_path: Path) -> None:
    flow = Flow(replace(config.flow, num_classes=0))
    described = BundleConfig(name="squares", flow=flow.config, noise=config.noise)
    bundle = write_bundle(tmp_path / "bundle", described, flow, SamplingDefaults(), "# squares\n")
    report(bundle, data, tmp_path / "report", samples=40)
    assert "classes in the reference" not in (tmp_path / "report" / "report.md").read_text()


def test_a_model_that_runs_away_has_a_report_that_says_so(config: TrainConfig, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = Flow(config.flow)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=4.0)
    described = BundleConfig(name="squares", flow=flow.config, noise=config.noise, class_names=("0", "1"))
    bundle = write_bundle(tmp_path / "bundle", described, flow, SamplingDefaults(), "# squares\n")
    found = report(bundle, data, tmp_path / "report", "--limit", 1)
    assert found["samples"]["not_finite"] > 0
    # One image has no standard error, and JSON no infinity.
    assert found["likelihood"]["bits_per_dim"]["standard_error"] is None


def test_features_that_are_not_finite_are_refused(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Extractor(name="nan", num_features=4, extract=lambda pixels: torch.full((len(pixels), 4), torch.nan))
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: nothing)
    asked = ("evaluate", bundle.path, "--data", data, "--report", tmp_path / "report", "--samples", 40)
    assert "extractor: nan gives features that are not finite" in run_command(*asked, status=2)


def test_statistics_in_a_file_give_the_distance_of_all_features(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    test, path = load_images(data, "test", 8, 1), tmp_path / "statistics" / "test.npz"
    found = report(bundle, data, tmp_path / "first", "--statistics-out", path)
    assert found["distances"]["from_statistics"] is None
    features = test.pixels.reshape(160, -1) / 64
    with np.load(path) as file:
        np.testing.assert_allclose(file["mu"], features.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(features, rowvar=False), atol=1e-5)
    found = report(bundle, data, tmp_path / "report", "--statistics", path)
    # The statistics are those of the test images, which the other figure compares with too.
    expected = found["distances"]["samples"]["frechet_all_features"]
    assert found["distances"]["from_statistics"] == pytest.approx(expected, rel=1e-4)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    error = run_command(
        "evaluate", bundle.path, "--data", data, "--report", tmp_path / "r", "--statistics", path, status=2
    )
    assert "got 3 features" in error


def test_reconstruction_is_exact_but_for_rounding(bundle: Bundle, data: Path) -> None:
    images = load_images(data, "test", 8, 1).part(0, 20)
    errors = reconstruction_errors(load_flow(bundle), bundle, images, batch_size=7)
    assert errors.shape == (20,)
    assert errors.max() < 0.05


def test_the_baseline_is_trained_as_the_bundle_was(
    bundle: Bundle, data: Path, tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]
) -> None:
    config = baseline_config(bundle)
    record = bundle.config.training
    assert config.optimization.batch_size == record["optimization"]["batch_size"]
    # Its own, whatever suits the bundle.
    assert config.optimization.learning_rate == LEARNING_RATE != record["optimization"]["learning_rate"]
    assert (config.noise, config.data.holdout, config.seed) == (bundle.config.noise, 140, record["seed"])
    assert config.optimization.warmup_epochs == record["optimization"]["warmup_epochs"]
    assert baseline_config(bundle, learning_rate=0.5).optimization.learning_rate == 0.5
    # On half as many images everything is half as long.
    assert baseline_config(bundle, 80).optimization.warmup_epochs == config.optimization.warmup_epochs / 2
    _, trainer = train_baseline(bundle, data, tmp_path / "baseline", CPU, images=80)
    assert trainer.step == trainer.total_steps == 10
    assert trainer.data_sha256 == record["data"]["sha256"]
    write_idx(data, make_images(300, seed=9))
    with pytest.raises(ValueError, match="no baseline of equal budget: the training images here are not"):
        train_baseline(bundle, data, tmp_path / "other", CPU)


def test_the_baseline_of_a_fine_tuned_model_has_the_images_of_all_its_runs(
    bundle: Bundle, config: TrainConfig, data: Path, tmp_path: Path
) -> None:
    first, train = bundle.config.training, load_images(data, "train", 8, 1)
    for number, weight in enumerate((0.0, 2.0)):
        start = Start(bundle)
        config = config.with_overrides(
            holdout=140, epochs=0.5 + number, learning_rate=1e-4, discriminative_weight=weight, wrong_classes=1
        ).with_overrides(flip=number == 0)
        resolved, images = resolve_classes(config, train)
        origin = Origin(command="tarflow train", data_name=data.name)
        console, out = Console(file=io.StringIO()), tmp_path / f"tuned-{number}"
        Run(resolved, images, out, CPU, origin=origin, console=console, sample_every=10**6, start=start).execute()
        bundle = read_bundle(out / "bundle")
    # Twenty steps from new weights, ten fine-tuned, and thirty fine-tuned again, of eight images each.
    assert [run["steps"] for run in training_runs(bundle)] == [20, 10, 30]
    assert "- Fine-tuned from tiny (`sha256:" in bundle.card
    assert "which had 10 steps of 8 images" in bundle.card
    baseline = baseline_config(bundle)
    assert baseline.optimization.learning_rate == LEARNING_RATE
    assert baseline.optimization.discriminative_weight == 0
    assert baseline.optimization.warmup_epochs == pytest.approx(3 * first["optimization"]["warmup_epochs"])
    found = report(bundle, data, tmp_path / "report", "--baseline", samples=40)
    assert (found["baseline"]["images_seen"], found["baseline"]["model_images_seen"]) == (480, 480)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "begun from another" not in text
    # One of the runs saw mirror images, if not the last.
    assert found["copying"]["mirrored_too"] is True
    assert "training images and their mirror images: 40 samples" in text
    assert "of them for" not in text
    # Where the first weights came from nobody knows.
    tuned = bundle.config.training
    unknown = {**tuned, "from": {"name": "other", "model_id": "sha256:0"}}
    assert training_runs(replace(bundle, config=replace(bundle.config, training=unknown))) == (unknown,)


def test_the_baseline_of_another_training_is_not_continued(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "baseline"
    train_baseline(bundle, data, out, CPU, images=16)
    # Its learning rate has ended: it is no shorter part of this one.
    with pytest.raises(ValueError, match=f"report: {out} has the baseline of another training, .* another --report"):
        train_baseline(bundle, data, out, CPU, images=32)
    with pytest.raises(ValueError, match=r"allowed is one of .* with learning rate 0\.5"):
        train_baseline(bundle, data, out, CPU, images=16, learning_rate=0.5)
    _, trainer = train_baseline(bundle, data, out, CPU, images=16)
    assert trainer.step == 2


def test_a_baseline_is_continued_whatever_its_bundle_had_that_it_has_not(
    bundle: Bundle, data: Path, tmp_path: Path
) -> None:
    record = bundle.config.training
    more = {"discriminative_weight": 1.0, "wrong_classes": 1, "optimizer": "muon", "muon_learning_rate": 0.5}
    other = replace(
        bundle,
        config=replace(bundle.config, training={**record, "optimization": {**record["optimization"], **more}}),
    )
    for _ in range(2):
        _, trainer = train_baseline(other, data, tmp_path / "baseline", CPU, images=16)
    assert trainer.step == 2


def test_the_baseline_has_not_an_image_less(bundle: Bundle) -> None:
    record = bundle.config.training
    few = {**record, "data": {**record["data"], "num_images": 5}, "steps": 7}
    tuned = replace(bundle, config=replace(bundle.config, training={**few, "from": {"training": record}}))
    config, images = baseline_config(tuned), (record["steps"] + 7) * record["optimization"]["batch_size"]
    # The last run's data are no whole batch of the first one's.
    assert config.optimization.batch_size == 5
    assert 0 <= round(config.optimization.epochs - 0.25) * 5 - images < 5
    stopped = {**few, "steps": 0}
    with pytest.raises(ValueError, match="has a run without any step in its record"):
        baseline_config(replace(bundle, config=replace(bundle.config, training=stopped)))


def test_passes_with_wrong_classes_are_counted(bundle: Bundle) -> None:
    record, images = bundle.config.training, images_trained_on(bundle)
    assert passes_trained_on(bundle) == images
    options = {**record["optimization"], "discriminative_weight": 1.0, "wrong_classes": 3, "label_drop": 0.5}
    hybrid = replace(bundle, config=replace(bundle.config, training={**record, "optimization": options}))
    assert passes_trained_on(hybrid) == images * (1 + 3 * 0.5)


def test_a_bundle_that_does_not_say_how_it_was_trained_has_no_baseline(make_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(ValueError, match="does not say how it was trained"):
        baseline_config(make_bundle())


def folders(root: Path, names: Sequence[str], side: int, mode: str) -> Path:
    """60 images of these classes in each split."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(60):
            path = root / split / names[i % len(names)] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (side, side) if mode == "L" else (side, side, 3)
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return root


def test_a_model_of_latents_is_judged_by_its_images(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", ("dark", "light"), 16, "L")
    preset = tmp_path / "latents.yaml"
    preset.write_text(yaml.safe_dump(LATENTS))
    run_command("train", preset, "--data", data, "--codec", AUTOENCODER, "--out", tmp_path / "run", "--epochs", "1")
    bundle, out = read_bundle(tmp_path / "run" / "bundle"), tmp_path / "report"
    found = report(bundle, data, out, "--baseline-images", "16", samples=40)
    assert "no likelihood of pixels" in found["likelihood"]["protocol"]
    # All were trained on, and known again by the hash of their latents.
    assert found["distances"]["real_images"]["from"] == "the training split, which the model has seen"
    assert found["reconstruction"]["unit"] == "latents"
    assert found["reconstruction"]["largest"] < 1e-3
    # The autoencoder has random weights.
    assert found["autoencoding"]["median"] > 1
    assert (found["baseline"]["images_seen"], found["baseline"]["model_images_seen"]) == (16, 60)
    text = (out / "report.md").read_text()
    for says in ("no likelihood of pixels", "in the unit of the latents", "of a larger budget"):
        assert says in text
    with Image.open(out / "nearest.png") as picture:
        # Twelve pairs of images of 16 pixels, four times as large.
        assert picture.size == (12 * 64 + 11 * 2, 2 * 64 + 2)


def test_with_a_cache_all_figures_are_the_same_and_nothing_is_decoded_again(
    make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = folders(tmp_path / "data", ("0", "1"), 12, "L"), ("--cache", tmp_path / "cache")
    bundle = make_bundle(load_images(root, "train", 8, 1).part(None, 10))
    plain = report(bundle, root, tmp_path / "plain", samples=40)
    report(bundle, root, tmp_path / "first", *cache, samples=40)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("training.data.load_image", lambda content: pytest.fail("an image was decoded"))
    second = report(bundle, root, tmp_path / "second", *cache, samples=40)
    for name in ("likelihood", "distances", "copying", "reconstruction"):
        assert second[name] == plain[name]
    # The gap too, and the other commands that load whole splits.
    data = ("--data", root, *cache)
    assert "train–test gap: none" not in run_command("evaluate", bundle.path, *data)
    run_command("tune", bundle.path, *data, "--num-images", "2", "--dry-run")
    run_command("calibrate", bundle.path, *data, "--out", tmp_path / "calibration")
    assert "components: got 64" in run_command("sweep", bundle.path, *data, "--out", tmp_path / "sweep", status=2)


def test_an_imported_checkpoint_is_evaluated(tmp_path: Path) -> None:
    names = ("cat", "dog", "fox", "horse", "owl")
    data, noise = folders(tmp_path / "data", names, 16, "RGB"), NoiseProtocol(kind="gaussian", std=0.05)
    checkpoint = Path(__file__).parents[1] / "reference" / "tiny_cond.pth"
    bundle = import_checkpoint(checkpoint, tmp_path / "tiny", noise, name="tiny", class_names=names)
    found = report(bundle, data, tmp_path / "report", "--limit", "10", samples=40)
    assert found["likelihood"]["num_images"] == found["likelihood"]["bayes_accuracy"]["num_images"] == 10
    assert "which images it was trained on" in run_command("evaluate", bundle.path, "--data", data, "--limit", "10")
    assert found["distances"]["real_images"]["from"] == "the training split, which the model may have seen"
    assert found["copying"]["training_images"] == 60
    assert found["copying"]["known_to_be_the_models"] is False
    text = (tmp_path / "report" / "report.md").read_text()
    assert "that the model was trained on these images is not known, and copies of others are not found" in text
    asked = ["evaluate", bundle.path, "--data", data, "--report", tmp_path / "other", "--baseline"]
    assert "does not say how it was trained" in run_command(*asked, status=2)
    assert not (tmp_path / "other").exists()
