"""Figures of a calibrated model: what is obvious is found, what is stated holds, on arrays and from folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model.anomaly.calibration import Calibration
from model.anomaly.conformal import beta_binomial_interval, p_values
from model.anomaly.detector import CODE_FREE, SCORES
from model.bundle import Bundle, read_bundle
from model.images import encode_image
from model.weights import load_flow, update_bundle
from tests.training.conftest import run_command
from training.anomaly import (
    ALPHAS,
    Comparison,
    ScoredSet,
    choose_scores,
    compare,
    false_positives,
    pixel_figures,
    pooled,
    score_set,
)
from training.anomaly_report import tables, to_json
from training.calibrate import CalibrateOptions, calibrate_bundle, normal_images, open_calibration
from training.data import Images
from training.detection import aupro, bootstrap_intervals, detection_figures, pixel_auroc
from training.image_sets import ImageSet

CPU = torch.device("cpu")
BLOCK = slice(2, 6)
"""Rows and columns that defects are in."""


def noise_images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(9).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


@pytest.fixture
def calibrated(
    make_bundle: Callable[..., Bundle],
    make_images: Callable[..., Images],
    write_idx: Callable[..., Path],
    tmp_path: Path,
) -> Bundle:
    """A bundle calibrated with 120 squares."""
    bundle = make_bundle()
    data = write_idx(tmp_path / "normal", make_images(120, seed=5))
    options = CalibrateOptions()
    content = calibrate_bundle(bundle, normal_images(bundle, data, options), options, CPU).to_bytes()
    return update_bundle(bundle, calibration=content)


@pytest.fixture
def calibration(calibrated: Bundle) -> Calibration:
    """Its calibration."""
    return open_calibration(calibrated)


@pytest.fixture
def look(calibrated: Bundle, calibration: Calibration) -> Callable[..., ScoredSet]:
    """Score images: ``look(name, pixels, masks)``, with maps."""
    flow = load_flow(calibrated)

    def score(name: str, pixels: NDArray[np.uint8], masks: NDArray[np.bool_] | None = None) -> ScoredSet:
        of = ImageSet(name, pixels, masks)
        return score_set(flow, calibrated.config.noise, calibration, of, SCORES, with_maps=True, batch_size=16)

    return score


@pytest.fixture
def normal(look: Callable[..., ScoredSet], make_images: Callable[..., Images]) -> ScoredSet:
    """60 further squares."""
    return look("squares", make_images(60, seed=6).pixels)


@pytest.fixture
def comparison(calibration: Calibration, normal: ScoredSet, look: Callable[..., ScoredSet]) -> Comparison:
    """Squares against noise."""
    return compare(calibration, normal, [look("noise", noise_images(20))], resamples=50, seed=1)


def test_the_figures_are_those_of_the_scores(
    comparison: Comparison, normal: ScoredSet, calibration: Calibration, look: Callable[..., ScoredSet]
) -> None:
    noise = look("noise", noise_images(20))
    (found,) = comparison.sets
    assert (found.name, found.num_images, found.pixels) == ("noise", 20, None)
    assert tuple(found.scores) == SCORES
    for name, of in found.scores.items():
        pair = normal.scores[name], noise.scores[name]
        assert of.figures == detection_figures(*pair)
        assert of.intervals == bootstrap_intervals(*pair, resamples=50, seed=1)
        # Flagged is what has a p-value of at most the level.
        p_A = p_values(calibration.sorted_scores[name], noise.scores[name])
        assert of.flagged == (p_A <= comparison.alpha).mean()


def test_noise_is_found_and_copies_of_normal_images_are_not(
    comparison: Comparison, calibration: Calibration, normal: ScoredSet
) -> None:
    assert comparison.sets[0].scores["combined"].figures.auroc == 1
    assert comparison.sets[0].scores["combined"].flagged == 1
    (same,) = compare(calibration, normal, [normal], resamples=0).sets
    assert all(of.figures.auroc == 0.5 and not of.intervals for of in same.scores.values())


def test_false_positives_are_counted_and_stated(
    comparison: Comparison, calibration: Calibration, normal: ScoredSet
) -> None:
    num_scores = calibration.record.num_calibration
    assert comparison.alpha == pytest.approx(1 / (num_scores + 1))
    for name, found in comparison.false_positives.items():
        # 60 calibration images are too few for 1%.
        assert [rate.alpha for rate in found] == list(ALPHAS[1:])
        for rate in found:
            p_N = p_values(calibration.sorted_scores[name], normal.scores[name])
            assert rate.flagged == (p_N <= rate.alpha).sum()
            assert rate.expected == beta_binomial_interval(rate.alpha, num_scores, 60)
            assert rate.interval[0] <= rate.rate <= rate.interval[1]
            assert rate.holds
    (far,) = false_positives(calibration, "nll", np.full(60, np.inf), [0.1])
    assert (far.rate, far.holds) == (1.0, False)
    (near,) = false_positives(calibration, "nll", np.full(60, -np.inf), [0.1])
    assert (near.rate, near.holds) == (0.0, True)


def test_pixel_figures_count_normal_images(
    normal: ScoredSet, look: Callable[..., ScoredSet], make_images: Callable[..., Images]
) -> None:
    pixels = make_images(10, seed=7).pixels.copy()
    pixels[:, :, BLOCK, BLOCK] = 255 - pixels[:, :, BLOCK, BLOCK]
    masks = np.zeros((10, 8, 8), np.bool_)
    masks[:, BLOCK, BLOCK] = True
    defects = look("defects", pixels, masks)
    found = pixel_figures(normal, defects)
    assert found is not None
    assert normal.maps is not None
    assert defects.maps is not None
    maps = np.concatenate([normal.maps, defects.maps])
    truth = np.concatenate([np.zeros((60, 8, 8), np.bool_), masks])
    assert (found.auroc, found.aupro) == (pixel_auroc(maps, truth), aupro(maps, truth))
    alone = pixel_figures(replace(normal, maps=None), defects)
    assert alone is not None
    assert alone.auroc == pixel_auroc(defects.maps, masks)
    assert pixel_figures(normal, replace(defects, masks=None)) is None
    assert pixel_figures(normal, replace(defects, masks=np.zeros_like(masks))) is None
    both = pooled([normal, defects], "both")
    assert len(both) == 70
    assert both.maps is not None
    # Without masks nothing can be said about pixels.
    np.testing.assert_array_equal(both.maps, defects.maps)


def test_scores_are_chosen_in_their_order(calibration: Calibration) -> None:
    assert choose_scores(calibration) == SCORES
    assert choose_scores(calibration, " gradient,combined") == ("combined", "gradient")
    with pytest.raises(ValueError, match=r"scores: got 'luck', 'fate', allowed is some of combined, nll"):
        choose_scores(calibration, "nll,luck,fate")


def test_other_codecs_have_a_score_without_them(calibrated: Bundle, calibration: Calibration) -> None:
    other = replace(calibration, record=replace(calibration.record, codec_fingerprint=((1, 2, 3),) * 3))
    assert choose_scores(other) == (CODE_FREE, "nll", "typicality", "latent", "gradient", "max_patch")
    assert choose_scores(other, "combined") == (CODE_FREE,)
    with pytest.raises(ValueError, match="scores: got 'complexity'"):
        choose_scores(other, "complexity")
    flow, noise = load_flow(calibrated), calibrated.config.noise
    scored = score_set(flow, noise, other, ImageSet("noise", noise_images(3)), (CODE_FREE,))
    assert compare(other, scored, [scored], resamples=0).sets[0].scores[CODE_FREE].flagged == 1


def test_the_document_says_what_the_tables_say(comparison: Comparison) -> None:
    document = json.loads(json.dumps(to_json(comparison)))
    assert document["calibration"]["num_calibration"] == 60
    assert document["normal"] == {"name": "squares", "num_images": 60}
    assert document["sets"][0]["scores"]["combined"]["intervals_95"]["auroc"] == [1, 1]
    assert [rate["alpha"] for rate in document["false_positives"]["nll"]] == list(ALPHAS[1:])
    detection, rates = tables(comparison)
    assert detection.row_count == len(SCORES)
    assert rates.caption == "too few calibration images for a level of 0.01"


# The command.


def invoke(*arguments: object, status: int = 0) -> str:
    return run_command("anomaly", *arguments, "--device", "cpu", status=status)


def write(folder: Path, pixels: NDArray[np.uint8], suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        (folder / f"{number:03}{suffix}.png").write_bytes(encode_image(image, "png"))
    return folder


@pytest.fixture
def folders(make_images: Callable[..., Images], tmp_path: Path) -> tuple[Path, Path, Path]:
    """Normal images, and two sets of anomalous ones with the same name."""
    squares = make_images(30, seed=6).pixels
    return (
        write(tmp_path / "fine", squares),
        write(tmp_path / "a" / "bad", noise_images(10)),
        write(tmp_path / "b" / "bad", 255 - squares[:12]),
    )


def test_sets_from_folders(calibrated: Bundle, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    fine, noise, inverted = folders
    command = (calibrated.path, "--normal", fine, "--anomalous", noise, "--anomalous", inverted, "--resamples", 20)
    text = invoke(*command)
    for word in ("a/bad (10)", "b/bad (12)", "all sets (22)", "AUROC", "False positives on fine", "stated, 99%"):
        assert word in text
    picture = tmp_path / "picture.png"
    document = json.loads(invoke(*command, "--json", "--scores", "max_patch,combined", "--picture", picture))
    assert [of["name"] for of in document["sets"]] == ["a/bad", "b/bad", "all sets"]
    assert list(document["sets"][0]["scores"]) == ["combined", "max_patch"]
    assert document["sets"][0]["scores"]["combined"]["flagged"] == 1
    assert all(of["pixels"] is None for of in document["sets"])
    assert document["model_id"] == calibrated.model_id
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    short = json.loads(invoke(*command, "--json", "--limit", 4, "--resamples", 0))
    assert [of["num_images"] for of in short["sets"]] == [4, 4, 8]
    assert short["sets"][0]["scores"]["nll"]["intervals_95"] is None


def test_the_layout_of_mvtec_and_masks_give_pixel_figures(
    calibrated: Bundle, make_images: Callable[..., Images], tmp_path: Path
) -> None:
    root, squares = tmp_path / "squares", make_images(24, seed=6).pixels
    defects, masks = squares[:6].copy(), np.zeros((6, 1, 8, 8), np.uint8)
    defects[:, :, BLOCK, BLOCK] = 255 - defects[:, :, BLOCK, BLOCK]
    masks[:, :, BLOCK, BLOCK] = 255
    write(root / "train" / "good", squares)
    good, bad = write(root / "test" / "good", squares[6:]), write(root / "test" / "inverted", defects)
    write(root / "test" / "noise", noise_images(5))
    truth = write(root / "ground_truth" / "inverted", masks, "_mask")
    whole = json.loads(invoke(calibrated.path, "--mvtec", root, "--json", "--resamples", 0))
    inverted, noise, together = whole["sets"]
    assert whole["normal"] == {"name": "good", "num_images": 18}
    assert (inverted["name"], inverted["num_images"], together["num_images"]) == ("inverted", 6, 11)
    assert noise["pixels"] is None
    assert 0 <= inverted["pixels"]["aupro"] <= 1
    assert inverted["pixels"] == together["pixels"]
    apart = ("--normal", good, "--anomalous", bad, "--masks", truth, "--json", "--resamples", 0)
    assert json.loads(invoke(calibrated.path, *apart))["sets"] == [inverted]
    assert "pixel AUROC" in invoke(calibrated.path, "--mvtec", root, "--resamples", 0)
    for path in good.iterdir():
        path.unlink()
    good.rmdir()
    assert "has no test/good; give normal images" in invoke(calibrated.path, "--mvtec", root, status=2)
    invoke(calibrated.path, "--mvtec", root, "--normal", root / "train" / "good", "--resamples", 0)


def test_a_calibration_from_a_file(
    calibrated: Bundle, make_bundle: Callable[..., Bundle], folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    bare = make_bundle()
    command = (bare.path, "--normal", folders[0], "--anomalous", folders[1], "--resamples", 0)
    assert "has no calibration; make one" in invoke(*command, status=2)
    file = tmp_path / "normal.safetensors"
    assert calibrated.calibration is not None
    file.write_bytes(calibrated.calibration)
    assert "bad (10)" in invoke(*command, "--calibration", file)
    assert "nowhere" in invoke(*command, "--calibration", tmp_path / "nowhere", status=2)
    other = make_bundle(seed=1)
    assert "calibrate this model anew" in invoke(other.path, *command[1:], "--calibration", file, status=2)
    assert read_bundle(bare.path) == bare


def test_mistakes_are_told(calibrated: Bundle, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    fine, noise, _ = folders
    (tmp_path / "no-masks").mkdir()
    pair = ("--normal", fine, "--anomalous", noise)
    mistakes: list[tuple[tuple[object, ...], str]] = [
        ((), "--normal DIR with --anomalous DIR, or --mvtec DIR"),
        (("--normal", fine), "--normal DIR with --anomalous DIR"),
        (("--mvtec", tmp_path, "--anomalous", noise), "mvtec: got it with anomalous"),
        (("--mvtec", fine), "no test/DEFECT"),
        ((*pair, "--masks", tmp_path / "no-masks"), "masks: got"),
        ((*pair, "--scores", "luck"), "scores: got 'luck'"),
        ((*pair, *(("--anomalous", noise) * 14), "--picture", "p.png"), "picture: got 15 sets, allowed are up to 14"),
        (("--normal", fine, "--anomalous", tmp_path / "nowhere"), "no such directory"),
    ]
    for arguments, message in mistakes:
        assert message in invoke(calibrated.path, *arguments, status=2)
