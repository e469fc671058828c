"""The benchmark of anomaly detection: its sets, its targets, one document, and clear refusals."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import anomaly
from benchmarks.anomaly import DEVELOPMENT_CHANGED, GUARANTEE, MATCHED, MNIST, NORMAL, TARGET_AUROC, matched
from benchmarks.negatives import DEVELOPMENT, TARGETS
from model.anomaly.calibration import calibrate
from model.anomaly.codec import code_lengths
from model.anomaly.detector import SCORES
from model.bundle import Bundle
from model.weights import load_flow, update_bundle
from tests.benchmarks.programs import document, run
from training.calibrate import all_statistics
from training.data import DataError, Images

SMALL = ["--limit", "6", "--resamples", "0", "--batch", "16"]


def squares(count: int, seed: int) -> NDArray[np.uint8]:
    """8x8 images of a light square on a dark ground."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 40, (count, 1, 8, 8), dtype=np.uint8)
    pixels[:, :, 2:6, 1:5] += rng.integers(120, 200, (count, 1, 1, 1), dtype=np.uint8)
    return pixels


@pytest.fixture
def calibrated(bundle: Bundle) -> Bundle:
    """A tiny bundle with a calibration of 40 squares."""
    pixels, noise = squares(40, seed=0), bundle.config.noise
    record = {
        "name": "default",
        "model": bundle.name,
        "model_id": bundle.model_id,
        "noise": noise.to_dict(),
        "seed": 0,
        "created": 0,
    }
    statistics = all_statistics(load_flow(bundle), noise, pixels, seed=0, gradient=True)
    return update_bundle(bundle, calibration=calibrate(statistics, pixels, record).to_bytes())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As many test images as Fashion-MNIST has, but of 8x8 pixels."""
    directory, pixels = tmp_path / "tiny-clothes", np.tile(squares(100, seed=1), (100, 1, 1, 1))
    directory.mkdir()
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", len(pixels), 8, 8)
    (directory / "t10k-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    header = bytes((0, 0, 8, 1)) + struct.pack(">I", len(pixels))
    (directory / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(len(pixels)))
    return directory


@pytest.fixture
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits of 8x8 pixels: some too simple, some as complex as the squares."""
    pixels = np.concatenate([np.zeros((5, 1, 8, 8), np.uint8), squares(20, seed=2)])
    monkeypatch.setattr(anomaly, "load_mnist", lambda: Images(pixels, np.zeros(len(pixels), np.int64)))


@pytest.mark.usefixtures("_digits")
def test_one_document_with_every_set(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calibrated: Bundle,
    data: Path,
    tmp_path: Path,
) -> None:
    arguments = ["--bundle", str(calibrated.path), "--data", str(data), *SMALL, "--picture", str(tmp_path / "p.png")]
    content = document(monkeypatch, capsys, anomaly, *arguments)
    assert [of["name"] for of in content["sets"]] == [MNIST, MATCHED, *TARGETS]
    for of in content["sets"]:
        assert of["num_images"] == 6
        assert tuple(of["scores"]) == SCORES
        assert (of["pixels"] is not None) == (of["name"] in ("occluded", "scratched"))
    goals = {goal["set"]: goal for goal in content["targets"]}
    assert set(goals) == set(TARGET_AUROC) == {MNIST, MATCHED, *TARGETS} - {"occluded", "scratched"}
    noise = goals["uniform noise"]
    assert noise["score"] == "combined"
    assert noise["met"] == (noise["auroc"] >= 0.99)
    # 20 calibration images allow no level of 1%.
    assert [rate["alpha"] for rate in content["guarantee"]["nll"]] == [0.05, 0.1]
    assert content["guarantee"]["nll"][0]["num_images"] == 6
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_development_has_other_sets_of_other_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calibrated: Bundle, data: Path
) -> None:
    arguments = ["--bundle", str(calibrated.path), "--data", str(data), *SMALL, "--development"]
    content = document(monkeypatch, capsys, anomaly, *arguments)
    assert [of["name"] for of in content["sets"]] == list(DEVELOPMENT)
    assert not {"targets", "guarantee"} & content.keys()
    assert content["sets"][-1]["pixels"] is not None
    used = [range(*place) for place in (NORMAL, GUARANTEE)]
    ours = [range(*place) for place in (anomaly.DEVELOPMENT_NORMAL, DEVELOPMENT_CHANGED)]
    assert not {i for r in used for i in r} & {i for r in ours for i in r}


def test_tables_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calibrated: Bundle, data: Path
) -> None:
    run(monkeypatch, anomaly, "--bundle", str(calibrated.path), "--data", str(data), *SMALL, "--without-mnist")
    printed = capsys.readouterr().out
    for word in ("AUROC against 6 Fashion-MNIST", "shuffled patches", "target 0.85", "AUPRO", "(stated "):
        assert word in printed
    assert f"{MNIST}:" not in printed
    assert f"{MNIST} (" not in printed


def test_matched_digits_are_as_complex(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = squares(50, seed=3)
    digits = np.concatenate([np.zeros((7, 1, 8, 8), np.uint8), squares(30, seed=4)])
    found = matched(digits, normal, 10)
    assert len(found) == 10
    low, high = np.quantile(code_lengths(normal).min(axis=1), [0.05, 0.95])
    lengths = code_lengths(found).min(axis=1)
    assert ((lengths >= low) & (lengths <= high)).all()
    monkeypatch.setattr(anomaly, "DIGITS_AT_ONCE", 3)
    np.testing.assert_array_equal(matched(digits, normal, 10), found)
    with pytest.raises(DataError, match="got no digit"):
        matched(digits[:7], normal, 10)


def test_what_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Bundle, calibrated: Bundle, data: Path
) -> None:
    def offline() -> Images:
        raise DataError("cannot be fetched")

    monkeypatch.setattr(anomaly, "load_mnist", offline)
    short = data.parent / "short"
    short.mkdir()
    for path in data.iterdir():
        content = path.read_bytes()
        size = 16 + 64 * 50 if "images" in path.name else 8 + 50
        (short / path.name).write_bytes(content[:4] + struct.pack(">I", 50) + content[8:size])
    arguments = ["--bundle", str(calibrated.path), "--data"]
    for given, message in [
        ([*arguments, str(data)], "cannot be fetched"),
        ([*arguments, str(short), "--development"], "has 50 test images, needed are 6001"),
        ([*arguments, str(data), "--limit", "0"], "--limit: got 0"),
        ([*arguments, str(data), "--calibration", "nowhere"], "nowhere"),
        (["--bundle", "nowhere"], "nowhere: no such directory"),
    ]:
        with pytest.raises(SystemExit):
            run(monkeypatch, anomaly, *given)
        assert message in capsys.readouterr().err
