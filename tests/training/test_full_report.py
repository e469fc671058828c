"""The report of a bundle: every figure with its comparison, in words, as data and in pictures; its baseline."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from model.bundle import Bundle, read_bundle
from model.weights import load_flow
from tests.training.conftest import run_command
from training.baselines.coupling import CouplingFlow
from training.baselines.equal import baseline_config, train_baseline
from training.classes import resolve_classes
from training.config import TrainConfig
from training.data import Images, load_images
from training.features import EXTRACTORS, Extractor
from training.quality import find_copies, reconstruction_errors
from training.run import Origin, Run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _means_as_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real extractor has tests of its own; here the features of 8x8 images are 64 pixels."""
    pixels = Extractor(name="pixels", num_features=64, extract=lambda pixels: pixels.float().flatten(1) / 64)
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: pixels)


@pytest.fixture
def data(tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]) -> Path:
    write_idx(tmp_path / "squares", make_images(300))
    return write_idx(tmp_path / "squares", make_images(160, seed=1), "t10k")


@pytest.fixture
def bundle(config: TrainConfig, data: Path, tmp_path: Path) -> Bundle:
    """A bundle trained for a moment, with a holdout of 140."""
    config = config.with_overrides(holdout=140)
    config, images = resolve_classes(config, load_images(data, "train", 8, 1))
    origin = Origin(command="tarflow train", data_name=data.name)
    console = Console(file=io.StringIO())
    Run(config, images, tmp_path / "run", CPU, origin=origin, console=console, sample_every=10**6).execute()
    return read_bundle(tmp_path / "run" / "bundle")


def report(bundle: Bundle, data: Path, out: Path, *options: object) -> dict[str, Any]:
    arguments = [bundle.path, "--data", data, "--report", out, "--samples", "150", "--train-limit", "0", *options]
    run_command("evaluate", *arguments)
    content = json.loads((out / "report.json").read_text())
    assert isinstance(content, dict)
    return content


def test_the_report_says_everything_with_its_comparison(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    found = report(bundle, data, out, "--baseline")
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
    assert 0 <= found["copying"]["share_nearer_than_1_percent_of_test_images"] <= 1
    assert found["reconstruction"]["largest"] < 0.1
    # As many steps as the bundle: 3 epochs of 20.
    baseline = found["baseline"]
    assert baseline["images_seen"] == bundle.config.training["steps"] * 8 == 480
    least = CouplingFlow(bundle.config.flow, 8).flops_per_image
    assert baseline["flops_per_image"] <= max(least, baseline["model_flops_per_image"])
    difference = baseline["bits_per_dim"] - found["likelihood"]["bits_per_dim"]["mean"]
    assert baseline["minus_model"]["mean"] == pytest.approx(difference, abs=1e-6)
    text = (out / "report.md").read_text()
    for figure in (samples["frechet"]["value"], real["frechet"]["value"]):
        assert f"{figure:.2f} ± " in text
    assert f"{baseline['bits_per_dim']:.4f}" in text
    assert "not comparable with published FID" in text
    for name in ("samples.png", "nearest.png"):
        assert f"]({name})" in text
        assert Image.open(out / name).width > 8
    # The baseline is there: another report does not train it again.
    before = (out / "baseline" / "checkpoint.pt").stat().st_mtime_ns
    assert report(bundle, data, out, "--baseline")["baseline"] == baseline
    assert (out / "baseline" / "checkpoint.pt").stat().st_mtime_ns == before


def test_copies_of_training_images_are_found_out(make_images: Callable[..., Images]) -> None:
    train, held_out, fresh = (make_images(200, seed=seed).pixels for seed in (1, 2, 3))
    honest = find_copies(fresh, held_out, train, CPU)
    assert honest.share_nearer < 0.1
    # A model that has learned its training images by heart, but for one step of one pixel.
    copied = train.copy()
    copied[:, 0, 0, 0] += 1
    found = find_copies(copied[50:], held_out, train, CPU)
    assert found.share_nearer == 1
    assert found.samples.index.tolist() == list(range(50, 200))
    np.testing.assert_allclose(found.samples.distance, 1 / 8)
    differences = found.pairs[0].astype(int) - found.pairs[1]
    assert (np.abs(differences).sum(axis=(1, 2, 3)) == 1).all()


def test_statistics_in_a_file_give_the_distance_of_all_features(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    test = load_images(data, "test", 8, 1)
    features = torch.from_numpy(test.pixels.reshape(160, -1)).double() / 64
    path = tmp_path / "reference.npz"
    np.savez(path, mu=features.mean(dim=0).numpy(), sigma=np.cov(features.numpy(), rowvar=False))
    found = report(bundle, data, tmp_path / "report", "--reference", path)
    # The statistics are those of the test images, which the other figure compares with too.
    expected = found["distances"]["samples"]["frechet_all_features"]
    assert found["distances"]["from_statistics"] == pytest.approx(expected, rel=1e-4)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    error = run_command(
        "evaluate", bundle.path, "--data", data, "--report", tmp_path / "r", "--reference", path, status=2
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
    assert config.optimization.learning_rate == record["optimization"]["learning_rate"]
    assert (config.noise, config.data.holdout, config.seed) == (bundle.config.noise, 140, record["seed"])
    _, trainer = train_baseline(bundle, data, tmp_path / "baseline", CPU, images=80)
    assert trainer.step == trainer.total_steps == 10
    assert trainer.data_sha256 == record["data"]["sha256"]
    write_idx(data, make_images(300, seed=9))
    with pytest.raises(ValueError, match="no baseline of equal budget: the training images here are not"):
        train_baseline(bundle, data, tmp_path / "other", CPU)


def test_a_bundle_that_does_not_say_how_it_was_trained_has_no_baseline(make_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(ValueError, match="does not say how it was trained"):
        baseline_config(make_bundle())
