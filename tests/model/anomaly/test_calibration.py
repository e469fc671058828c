"""Detectors and calibrations: on a small flow, from pictures to p-values and back from a file."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import model.anomaly.calibration as calibration_module
import model.anomaly.gaussian as gaussian_module
import model.anomaly.maps as maps_module
from model.anomaly.calibration import Calibration, CalibrationError, CalibrationMismatch, calibrate, split_sizes
from model.anomaly.codec import CODECS, code_lengths, fingerprint
from model.anomaly.conformal import p_values
from model.anomaly.detector import CODE_FREE, SCORES
from model.anomaly.features import Statistics, concatenate
from model.anomaly.normals import distinct
from model.anomaly.regions import regions
from model.anomaly.statistics import image_statistics
from model.config import NoiseProtocol
from model.flow import Flow
from tests.model.conftest import tiny_flow

NOISE = NoiseProtocol(kind="gaussian", std=0.1)
FLOW = tiny_flow(dtype=torch.float32, image_size=16)
RECORD = {
    "name": "mine",
    "model": "tiny",
    "model_id": "sha256:" + 64 * "a",
    "noise": NOISE.to_dict(),
    "seed": 0,
    "created": 1,
}


def pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth ramps with noise, (N, 1, 16, 16)."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(16), np.arange(16))[None] * rng.uniform(2, 6, (count, 1, 1))
    return np.clip(40 + ramp + rng.normal(0, 4, (count, 16, 16)), 0, 255).astype(np.uint8)[:, None]


def statistics(pixels: NDArray[np.uint8], gradient: bool = True, flow: Flow = FLOW) -> Statistics:
    parts = [pixels[i : i + 50] for i in range(0, len(pixels), 50)]
    found = [image_statistics(flow, NOISE, torch.from_numpy(p), None, seed=0, gradient=gradient) for p in parts]
    return concatenate(found)


@cache
def calibrated() -> Calibration:
    pixels = pictures(200)
    return calibrate(statistics(pixels), pixels, RECORD)


def scores(pixels: NDArray[np.uint8], calibration: Calibration | None = None) -> dict[str, NDArray[np.float64]]:
    found = (calibration or calibrated()).detector.scores(statistics(pixels), code_lengths(pixels))
    return dict(found)


def test_every_score_can_be_asked_for() -> None:
    assert calibrated().scores == SCORES
    assert set(scores(pictures(3))) == {*SCORES, CODE_FREE}
    assert all(values.shape == (100,) for values in calibrated().sorted_scores.values())


def test_without_gradient_or_codes_the_others_are_the_same() -> None:
    pixels = pictures(4, seed=5)
    everything = scores(pixels)
    some = calibrated().detector.scores(statistics(pixels, gradient=False), None)
    assert set(everything) - set(some) == {"gradient", "complexity", "combined"}
    for name, values in some.items():
        np.testing.assert_allclose(values, everything[name])


@pytest.mark.parametrize("score", [*SCORES, CODE_FREE])
def test_p_values_of_new_normal_images_are_uniform(score: str) -> None:
    """Kolmogorov's distance of 300 p-values stays below what one of a thousand uniform samples exceeds."""
    p = np.sort(p_values(calibrated().sorted_scores[score], scores(pictures(300, seed=9))[score]))
    distance = np.abs(p - np.arange(1, 301) / 300).max()
    # The 100 calibration images vary too.
    assert distance < 1.95 * np.sqrt(1 / 300 + 1 / 100)


@pytest.mark.parametrize(
    "odd",
    [
        np.full((1, 1, 16, 16), 0, np.uint8),
        np.full((1, 1, 16, 16), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16), dtype=np.uint8),
        pictures(1)[..., ::-1].copy(),
    ],
    ids=["black", "white", "noise", "mirrored"],
)
def test_odd_images_are_flagged_and_every_score_is_finite(odd: NDArray[np.uint8]) -> None:
    found = scores(odd)
    assert all(np.isfinite(values).all() for values in found.values())
    assert p_values(calibrated().sorted_scores["combined"], found["combined"])[0] <= 0.02


def test_what_is_not_finite_is_as_anomalous_as_anything() -> None:
    broken = {name: np.full_like(values, np.nan) for name, values in statistics(pictures(2)).items()}
    found = calibrated().detector.scores(broken, code_lengths(pictures(2)))
    for name in SCORES:
        assert not np.isnan(found[name]).any()
        assert p_values(calibrated().sorted_scores[name], found[name]).max() <= 2 / 101


def test_a_planted_defect_is_where_the_map_is_largest() -> None:
    """Under a flow that is the identity, where every patch speaks for itself."""
    flow = Flow(FLOW.config)
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    normal = pictures(200)
    calibration = calibrate(statistics(normal, flow=flow), normal, RECORD)
    hits = 0
    for seed in range(20):
        pixels = pictures(1, seed=100 + seed)
        row, column = np.random.default_rng(seed).integers(2, 10, 2)
        pixels[0, 0, row : row + 4, column : column + 4] = 255
        [heat] = calibration.maps.maps(statistics(pixels, flow=flow), calibration.detector)
        best = regions(heat, calibration.maps.threshold)
        if best:
            x, y, width, height = best[0].bbox
            hits += x < column + 4 and column < x + width and y < row + 4 and row < y + height
    assert hits >= 18


def test_few_normal_images_have_regions() -> None:
    pixels = pictures(100, seed=77)
    heat = calibrated().maps.maps(statistics(pixels), calibrated().detector)
    assert np.mean(heat.max(axis=(1, 2)) > calibrated().maps.threshold) < 0.2


def test_the_maps_threshold_holds_for_new_images_of_small_calibrations() -> None:
    """It is taken from images that the scales were not fitted to; in-sample half of all normal images exceeded it."""
    shares = []
    for seed in range(6):
        pixels = pictures(60, seed=200 + seed)
        small = calibrate(statistics(pixels), pixels, RECORD)
        heat = small.maps.maps(statistics(pictures(60, seed=300 + seed)), small.detector)
        shares.append(np.mean(heat.max(axis=(1, 2)) > small.maps.threshold))
    assert np.mean(shares) <= 0.1


def test_working_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pictures(150, seed=4)
    found = statistics(pixels)
    made = []
    for rows in (7, 10_000):
        for module in (gaussian_module, maps_module):
            monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(gaussian_module, "COLUMNS", rows)
        made.append(calibrate(found, pixels, RECORD))
    few, whole = made
    for name, values in whole.sorted_scores.items():
        np.testing.assert_allclose(few.sorted_scores[name], values, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(few.maps.rare_HW, whole.maps.rare_HW, rtol=1e-6)
    assert few.maps.threshold == pytest.approx(whole.maps.threshold, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10, 100, 101, 250])
def test_the_quantile_of_parts_is_that_of_all(count: int) -> None:
    values = np.random.default_rng(count).normal(size=(count, 3, 4))
    parts = (values[start : start + 9] for start in range(0, count, 9))
    expected = np.quantile(values, 0.99, axis=0)
    np.testing.assert_allclose(maps_module.upper_quantile(parts, count, 0.99), expected, rtol=1e-12)


def test_calibrating_takes_less_memory_than_its_statistics() -> None:
    """Of colour images, whose residual is nearly all of them; it was four times as much."""
    count, random = 2000, np.random.default_rng(0)
    shapes = {"bits": (), "patch_nll": (16,), "log_scale": (2, 16), "energy": (2, 16), "latent": (8,), "hidden": (48,)}
    found: Statistics = {
        name: random.normal(size=(count, *shape)).astype(np.float32)
        for name, shape in {**shapes, "gradient": (), "residual": (3, 32, 32)}.items()
    }
    pixels = np.zeros((count, 3, 32, 32), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.divmod(np.arange(count), 256)  # no two alike
    tracemalloc.start()
    try:
        calibrate(found, pixels, RECORD)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(values.nbytes for values in found.values())


def test_an_image_without_finite_statistics_is_named() -> None:
    pixels = pictures(20)
    found = statistics(pixels)
    found["residual"][7, 0, 3, 3] = np.nan
    with pytest.raises(ValueError, match="image 7 no finite residual"):
        calibrate(found, pixels, RECORD)


def test_histograms_of_equal_images_have_one_bin() -> None:
    still = replace(calibrated(), sorted_scores={"nll": np.full(10, 3.5)})
    assert still.histogram("nll")[1].tolist() == [10]
    close = replace(calibrated(), sorted_scores={"nll": np.array([1.0, np.nextafter(1.0, 2.0)])})
    assert close.histogram("nll")[1].tolist() == [2]


def otherwise_rounded(found: Statistics, seed: int) -> Statistics:
    """What another size of the batch makes of statistics: up to four last digits more or less, most of it of all alike.

    One thread of a CPU gives the same digits in every batch; many threads and GPUs do not.
    """
    rng, last = np.random.default_rng(seed), 4 * np.finfo(np.float32).eps
    return {
        name: (
            values
            + last * (1 + np.abs(values)) * (0.7 * rng.uniform(-1, 1, values.shape[1:]) + 0.3 * rng.uniform(-1, 1))
        ).astype(np.float32)
        for name, values in found.items()
    }


def test_last_digits_decide_nothing_where_normal_images_are_all_but_the_same() -> None:
    """A static scene: one grey level of one pixel tells its images apart, and the flow sees nothing of that."""
    pixels = np.repeat(pictures(1), 60, axis=0)
    pixels.reshape(60, -1)[np.arange(60), np.arange(60)] ^= 1
    one = statistics(pixels[:1])
    same = {name: np.repeat(values, 60, axis=0) for name, values in one.items()}
    calibration = calibrate(otherwise_rounded(same, 0), pixels, RECORD)
    detector, codes = calibration.detector, code_lengths(pixels)
    found = [otherwise_rounded(same, seed) for seed in range(1, 6)]
    assert all((batch["bits"] != same["bits"]).any() for batch in found)
    for name in SCORES:
        p = [p_values(calibration.sorted_scores[name], detector.scores(batch, codes)[name]) for batch in found]
        np.testing.assert_array_equal(p, np.broadcast_to(p[0], np.shape(p)), err_msg=name)
        if name not in ("combined", "complexity"):
            # Nothing but rounding tells these apart.
            assert (p[0] == 1).all(), name
    for batch in found:
        assert (calibration.maps.maps(batch, detector).max(axis=(1, 2)) <= calibration.maps.threshold).all()
    # And yet nothing is overlooked: neither a spot nor another brightness.
    spot, darker = pixels[:1].copy(), pixels[:1] - 12
    spot[0, 0, 5:8, 5:8] += 40
    for odd in (spot, darker):
        worse = scores(odd, calibration)
        assert p_values(calibration.sorted_scores["combined"], worse["combined"])[0] == pytest.approx(1 / 31)
    assert calibration.maps.maps(statistics(spot), detector).max() > calibration.maps.threshold


def test_last_digits_move_other_p_values_by_next_to_nothing() -> None:
    found = statistics(pictures(60, seed=8))
    codes = code_lengths(pictures(60, seed=8))
    before, after = (calibrated().detector.scores(s, codes) for s in (found, otherwise_rounded(found, 1)))
    for name in SCORES:
        p, q = (p_values(calibrated().sorted_scores[name], of[name]) for of in (before, after))
        assert np.abs(p - q).max() <= 0.05, name


def test_exact_copies_count_once() -> None:
    """An image in both halves would be calibrated with by densities that were fitted to it."""
    pixels = pictures(30)
    order = np.r_[0:30, 5:25, 5]
    assert distinct(pixels[order]).tolist() == list(range(30))
    assert distinct(pixels[order][::-1], pixels[:7]).tolist() == [*range(1, 19), *range(21, 26)]
    copied, plain = (calibrate(statistics(some), some, RECORD) for some in (pixels[order], pixels))
    assert (copied.record.num_fit, copied.record.num_calibration) == (15, 15)
    for name, values in plain.sorted_scores.items():
        np.testing.assert_allclose(copied.sorted_scores[name], values, rtol=1e-3, atol=1e-3, err_msg=name)
    still = np.repeat(pixels[:19], 2, axis=0)
    with pytest.raises(ValueError, match="got 19, allowed are 20 and more"):
        calibrate(statistics(still), still, RECORD)


def test_a_file_gives_the_same_scores_and_record() -> None:
    again = Calibration.from_bytes(calibrated().to_bytes())
    assert again.record == calibrated().record
    pixels = pictures(5, seed=3)
    for name, values in scores(pixels, again).items():
        np.testing.assert_array_equal(values, scores(pixels)[name])
        np.testing.assert_array_equal(again.sorted_scores[name], calibrated().sorted_scores[name])
    np.testing.assert_array_equal(
        again.maps.maps(statistics(pixels), again.detector),
        calibrated().maps.maps(statistics(pixels), calibrated().detector),
    )
    assert again.to_bytes() == calibrated().to_bytes()


@pytest.mark.parametrize("cut", [0, 7, 100, 5000, -1])
def test_a_damaged_file_is_refused(cut: int) -> None:
    with pytest.raises(CalibrationError, match=r"some\.file: not a calibration"):
        Calibration.from_bytes(calibrated().to_bytes()[:cut], "some.file")


def test_another_version_and_unsorted_scores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unsorted = replace(calibrated(), sorted_scores={k: v[::-1] for k, v in calibrated().sorted_scores.items()})
    with pytest.raises(CalibrationError, match="sorted"):
        Calibration.from_bytes(unsorted.to_bytes())
    monkeypatch.setattr(calibration_module, "FORMAT_VERSION", 2)
    newer = calibrated().to_bytes()
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="format 2, this program reads up to 1"):
        Calibration.from_bytes(newer)


def test_another_models_calibration_is_refused() -> None:
    calibrated().check_model("tiny", RECORD["model_id"])
    with pytest.raises(CalibrationMismatch, match=r"'mine' was made with model 'tiny'.*not with 'other'"):
        calibrated().check_model("other", "sha256:" + 64 * "b")


def test_changed_codecs_are_noticed() -> None:
    assert calibrated().codecs_match
    record = replace(calibrated().record, codec_fingerprint=((1, 2, 3),))
    assert not replace(calibrated(), record=record).codecs_match


def test_too_few_images_are_refused_with_what_is_needed() -> None:
    with pytest.raises(ValueError, match="got 19, allowed are 20 and more"):
        split_sizes(19)
    pixels = pictures(20)
    small = calibrate(statistics(pixels), pixels, RECORD)
    assert (small.record.num_fit, small.record.num_calibration) == (10, 10)
    assert small.record.default_alpha == pytest.approx(1 / 11)
    assert all(np.isfinite(v).all() for v in scores(pictures(3, seed=1), small).values())


def test_the_record_is_plain_data() -> None:
    assert json.loads(json.dumps(asdict(calibrated().record)))["num_calibration"] == 100


def test_histograms_hold_every_calibration_image() -> None:
    for name in calibrated().scores:
        edges, counts = calibrated().histogram(name)
        assert counts.sum() == 100
        assert len(edges) == len(counts) + 1
    infinite = replace(calibrated(), sorted_scores={"nll": np.array([1.0, 2.0, np.inf])})
    assert infinite.histogram("nll")[1].sum() == 3


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 64), (1, 2)])
def test_code_lengths_are_those_of_lossless_files(channels: int, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, channels, size, size), dtype=np.uint8)
    flat = np.zeros_like(noise)
    lengths, short = code_lengths(noise), code_lengths(flat)
    assert lengths.shape == (2, len(CODECS))
    # Noise cannot be compressed, and nothing beats a flat picture.
    assert (lengths >= 8).all()
    assert (short <= lengths).all()
    assert code_lengths(noise[:0]).shape == (0, len(CODECS))
    assert fingerprint(channels, size) == fingerprint(channels, size)
    assert len({tuple(row) for row in fingerprint(channels, size)}) == 3
