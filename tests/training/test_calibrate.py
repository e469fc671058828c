"""Calibrating a bundle: on images that are new to it, stored beside its weights, and nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from model.anomaly.calibration import FEWEST_NORMALS, Calibration, CalibrationError, CalibrationMismatch
from model.bundle import CALIBRATION, Bundle, read_bundle, sha256
from model.images import encode_image
from model.weights import load_flow, update_bundle
from tests.training.conftest import run_command
from training.calibrate import (
    CalibrateOptions,
    all_statistics,
    calibrate_bundle,
    normal_images,
    open_calibration,
)
from training.card import calibration_note, with_evaluation
from training.cli import app
from training.data import DataError, Images
from training.provenance import training_split

CPU = torch.device("cpu")
HOLDOUT = 40
OPTIONS = CalibrateOptions()


@pytest.fixture
def whole(make_images: Callable[..., Images]) -> Images:
    """100 images, of which the last 40 are kept out of training."""
    return make_images(100)


@pytest.fixture
def data(whole: Images, write_idx: Callable[..., Path], tmp_path: Path) -> Path:
    """Their directory."""
    return write_idx(tmp_path / "squares", whole)


@pytest.fixture
def bundle(whole: Images, make_bundle: Callable[..., Bundle]) -> Bundle:
    """A model of the first 60."""
    return make_bundle(whole.part(None, -HOLDOUT))


def invoke(*arguments: object, status: int = 0) -> str:
    return run_command("calibrate", *arguments, status=status)


def calibrated(bundle: Bundle, data: Path, options: CalibrateOptions = OPTIONS, **more: Any) -> Calibration:
    return calibrate_bundle(bundle, normal_images(bundle, data, options), options, CPU, **more)


def same(first: Calibration, second: Calibration) -> bool:
    return all(np.array_equal(values, second.sorted_scores[name]) for name, values in first.sorted_scores.items())


def test_of_its_own_training_set_only_the_holdout_is_used(
    bundle: Bundle, whole: Images, data: Path, write_idx: Callable[..., Path], tmp_path: Path
) -> None:
    found = normal_images(bundle, data, OPTIONS)
    np.testing.assert_array_equal(found.images.pixels, whole.pixels[-HOLDOUT:])
    assert found.source == "squares, images kept out of training"
    [notice] = found.notices
    assert "checked that squares was not trained on these images: they are the 40 that training kept out" in notice
    alone = write_idx(tmp_path / "alone", whole.part(-HOLDOUT, None))
    ours, theirs = (calibrated(bundle, folder) for folder in (data, alone))
    assert same(ours, theirs)
    assert (ours.record.num_fit, ours.record.num_calibration) == (20, 20)
    assert theirs.record.source == "alone, train split"


def test_without_a_holdout_its_training_set_is_refused(
    whole: Images, data: Path, make_bundle: Callable[..., Bundle]
) -> None:
    bundle = make_bundle(whole)
    assert "was trained on all images" in invoke(bundle.path, "--data", data, status=2)
    assert read_bundle(bundle.path) == bundle


def test_images_from_elsewhere_are_all_used(
    bundle: Bundle,
    make_images: Callable[..., Images],
    write_idx: Callable[..., Path],
    make_bundle: Callable[..., Bundle],
    data: Path,
    tmp_path: Path,
) -> None:
    other = write_idx(tmp_path / "other", make_images(44, seed=1))
    write_idx(other, make_images(30, seed=2), "t10k")
    assert len(normal_images(bundle, other, OPTIONS).images) == 44
    found = normal_images(bundle, other, replace(OPTIONS, split="test", limit=25))
    assert len(found.images) == 25
    assert found.source == "other, test split"
    # A model that does not say what it was trained on has to be believed.
    assert len(normal_images(make_bundle(seed=1), data, OPTIONS).images) == 100


def test_images_that_cannot_be_checked_are_taken_and_it_is_said_why(
    bundle: Bundle,
    whole: Images,
    make_bundle: Callable[..., Bundle],
    write_idx: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The same training data in a part, with other pixels or other classes; another split; a model without a record."""
    darker = Images(whole.pixels - (whole.pixels > 0), whole.labels)
    third = Images(whole.pixels, whole.labels + np.arange(len(whole)) // 99)
    cases = {
        "part": (bundle, whole.part(None, 30), "30 here, and it saw 60"),
        "decoded": (bundle, darker, "not with the same classes, in the same order and decoded to the same pixels"),
        "classes": (bundle, third, "but the data has a label 2"),
        "silent": (make_bundle(seed=1), whole, "the bundle does not say which images it was trained on"),
    }
    for name, (model, images, why) in cases.items():
        text = invoke(model.path, "--data", write_idx(tmp_path / name, images), "--out", tmp_path / f"{name}.out")
        assert text.startswith("squares: not checked whether squares was trained on these images: "), text
        assert why in text
    tested = write_idx(tmp_path / "part", whole, "t10k")
    text = invoke(bundle.path, "--data", tested, "--split", "test")
    assert "a test split cannot be compared with that" in text


def test_exact_copies_count_once_and_their_number_is_told(
    bundle: Bundle, whole: Images, write_idx: Callable[..., Path], tmp_path: Path
) -> None:
    """Of the normal images among themselves, and of the holdout with what was trained on."""
    order = np.r_[60:85, 60:75, 0:40]
    data = write_idx(tmp_path / "copies", Images(whole.pixels[order], whole.labels[order]))
    text = invoke(bundle.path, "--data", data, "--limit", 40)
    assert "left out 15 of 40 images: exact copies of others\n" in text
    assert "12 images fitted, 13 calibrated" in text
    np.testing.assert_array_equal(
        normal_images(bundle, data, replace(OPTIONS, limit=40)).images.pixels, whole.pixels[60:85]
    )
    assert "left out" not in invoke(bundle.path, "--data", data, "--limit", 25, "--force")
    order = np.r_[0:60, 60:84, 3:9]
    data = write_idx(tmp_path / "own", Images(whole.pixels[order], whole.labels[order]))
    found = normal_images(bundle, data, OPTIONS)
    assert "left out 6 of 30 images: exact copies of others or of images that it was trained on" in found.notices
    np.testing.assert_array_equal(found.images.pixels, whole.pixels[60:84])


def test_too_few_different_images_are_refused(
    bundle: Bundle, whole: Images, write_idx: Callable[..., Path], tmp_path: Path
) -> None:
    order = np.r_[60:79, 60:79]
    data = write_idx(tmp_path / "few", Images(whole.pixels[order], whole.labels[order]))
    error = invoke(bundle.path, "--data", data, status=2)
    assert "normal images: got 19, allowed are 20 and more" in error
    assert "left out 19 of 38 images: exact copies of others" in error
    assert read_bundle(bundle.path) == bundle


def test_pictures_in_one_folder_will_do(bundle: Bundle, whole: Images, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(whole.pixels[:30]):
        (folder / f"{number}.png").write_bytes(encode_image(pixels, "png"))
    text = invoke(bundle.path, "--data", folder, "--device", "cpu")
    assert "15 images fitted, 15 calibrated (pictures, train split); smallest alpha 0.0625" in text


def test_the_command_stores_it_and_changes_nothing_else(bundle: Bundle, data: Path) -> None:
    text = invoke(bundle.path, "--data", data, "--device", "cpu", "--seed", 3, "--name", "mine")
    assert "20 images fitted, 20 calibrated" in text
    assert f"tarflow anomaly {bundle.path} --normal" in text
    after = read_bundle(bundle.path)
    assert after.calibration is not None
    assert set(after.files) == {*bundle.files, CALIBRATION}
    assert replace(after, card=bundle.card, calibration=None, files=bundle.files) == bundle
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert manifest["sha256"][CALIBRATION] == sha256(after.calibration)
    assert calibration_note(after.card) is not None
    loaded = open_calibration(after)
    assert same(loaded, calibrated(bundle, data, CalibrateOptions(seed=3)))
    record = loaded.record
    assert (record.name, record.seed, record.model_id) == ("mine", 3, bundle.model_id)
    assert record.noise == bundle.config.noise.to_dict()
    load_flow(after)


def test_it_stays_when_other_things_change(bundle: Bundle, data: Path) -> None:
    invoke(bundle.path, "--data", data)
    before = read_bundle(bundle.path)
    changed = update_bundle(before, card=with_evaluation(before.card, "- good"))
    arguments = ["tune", str(bundle.path), "--data", str(data), "--num-images", "2", "--device", "cpu"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    tuned = read_bundle(bundle.path)
    assert changed.calibration == tuned.calibration == before.calibration is not None
    assert tuned.convergence is not None


def test_one_that_is_there_is_replaced_only_by_force(bundle: Bundle, data: Path) -> None:
    invoke(bundle.path, "--data", data)
    first = read_bundle(bundle.path)
    assert "--force replaces it" in invoke(bundle.path, "--data", data, "--seed", 1, status=2)
    assert read_bundle(bundle.path) == first
    invoke(bundle.path, "--data", data, "--seed", 1, "--limit", 30, "--force")
    second = read_bundle(bundle.path)
    assert second.calibration != first.calibration
    assert second.card.count("Calibration of normal images") == 1
    assert "15 calibrated" in second.card


def test_a_file_leaves_the_bundle_alone(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "normal.safetensors"
    text = invoke(bundle.path, "--data", data, "--out", out)
    assert f"--calibration {out}" in text
    assert read_bundle(bundle.path) == bundle
    assert open_calibration(bundle, out).record.num_calibration == 20
    assert not list(tmp_path.glob(".*.part"))
    assert "--force" in invoke(bundle.path, "--data", data, "--out", out, status=2)
    invoke(bundle.path, "--data", data, "--out", out, "--force")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", FEWEST_NORMALS - 1), "normal images: got 19, allowed are 20 and more"),
        (("--split", "validation"), "split: got 'validation'"),
        (("--split", "test"), "IDX files of the test split are incomplete"),
        (("--name", "../mine"), "name: got '../mine'"),
        (("--out", "nowhere/at/all"), "out: got nowhere/at/all"),
        (("--device", "tpu"), "device"),
    ],
)
def test_mistakes_are_told(bundle: Bundle, data: Path, arguments: tuple[object, ...], message: str) -> None:
    assert message in invoke(bundle.path, "--data", data, *arguments, status=2)
    assert read_bundle(bundle.path) == bundle


def test_progress_counts_every_image(bundle: Bundle, data: Path) -> None:
    heard: list[tuple[int, int]] = []
    calibrated(bundle, data, replace(OPTIONS, batch_size=16), on_progress=lambda *told: heard.append(told))
    assert heard == [(16, 40), (32, 40), (40, 40)]


def test_the_batch_does_not_matter(bundle: Bundle, whole: Images) -> None:
    flow, noise = load_flow(bundle), bundle.config.noise
    one, many = (
        all_statistics(flow, noise, whole.pixels[:9], seed=0, gradient=True, batch_size=size) for size in (4, 9)
    )
    for name, values in one.items():
        np.testing.assert_allclose(values, many[name], rtol=1e-4, atol=1e-4, err_msg=name)
    with pytest.raises(ValueError, match="images: got none"):
        all_statistics(flow, noise, whole.pixels[:0], seed=0, gradient=True)


def test_a_calibration_that_does_not_fit_is_refused(
    bundle: Bundle, data: Path, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"has no calibration; make one .* tarflow calibrate {bundle.path} --data DIR"):
        open_calibration(bundle)
    out = tmp_path / "normal.safetensors"
    invoke(bundle.path, "--data", data, "--out", out)
    with pytest.raises(CalibrationMismatch, match="calibrate this model anew"):
        open_calibration(make_bundle(seed=1), out)
    out.write_bytes(b"damaged")
    with pytest.raises(CalibrationError, match="not a calibration"):
        open_calibration(bundle, out)


def test_what_was_trained_on_and_what_was_not(
    bundle: Bundle, whole: Images, make_bundle: Callable[..., Bundle]
) -> None:
    split = training_split(bundle, whole)
    np.testing.assert_array_equal(split.trained_on.pixels, whole.pixels[:-HOLDOUT])
    np.testing.assert_array_equal(split.kept_out.pixels, whole.pixels[-HOLDOUT:])
    with pytest.raises(DataError, match="not the ones it was trained on"):
        training_split(bundle, whole.part(1, None))
    with pytest.raises(DataError, match="does not say"):
        training_split(make_bundle(seed=1), whole)
