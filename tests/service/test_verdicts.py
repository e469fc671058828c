"""Questions and verdicts: what a calibration allows, and what values that are not finite do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.anomaly.calibration import Calibration
from model.anomaly.detector import CODE_FREE
from model.anomaly.features import Statistics
from model.anomaly.statistics import image_statistics
from model.bundle import read_bundle
from model.weights import load_flow
from service.errors import InvalidRequest
from service.verdicts import MOST_REGIONS, ask, available_scores, judge, statistics_of
from tests.service.conftest import calibrated
from tests.service.pictures import normal

PIXELS = normal(6, 12, seed=4)[:, None]


@pytest.fixture(scope="module")
def calibration(models: Path) -> Calibration:
    return Calibration.from_bytes(calibrated(models / "tiny-uncond"))


@pytest.fixture(scope="module")
def statistics(models: Path) -> Statistics:
    bundle = read_bundle(models / "tiny-uncond")
    pixels = torch.from_numpy(PIXELS)
    return image_statistics(load_flow(bundle), bundle.config.noise, pixels, None, seed=0, gradient=True)


@pytest.fixture(scope="module")
def elsewhere(calibration: Calibration) -> Calibration:
    """The calibration as it would be read where codecs give other lengths."""
    return replace(calibration, record=replace(calibration.record, codec_fingerprint=((1, 2, 3),)))


def test_a_question_says_what_it_needs(calibration: Calibration) -> None:
    plain = ask(calibration, "own")
    assert (plain.alpha, plain.gradient, plain.passes) == (0.01, False, 1)
    assert plain.wanted == {"seed": 0, "gradient": False}
    for question in (ask(calibration, "own", maps=True), ask(calibration, "own", score="gradient")):
        assert (question.gradient, question.passes) == (True, 4)


def test_small_calibrations_have_a_larger_default_level(calibration: Calibration) -> None:
    fewer = {name: values[:30] for name, values in calibration.sorted_scores.items()}
    small = replace(calibration, record=replace(calibration.record, num_calibration=30), sorted_scores=fewer)
    question = ask(small, "own")
    assert question.alpha == 1 / 31
    assert question.threshold == fewer["combined"][-1]
    with pytest.raises(InvalidRequest, match="with 30 calibration images") as caught:
        ask(small, "own", alpha=0.03)
    assert (caught.value.param, caught.value.code) == ("alpha", "alpha_too_small")


def test_a_score_that_was_not_calibrated_is_refused(calibration: Calibration) -> None:
    scores = {name: values for name, values in calibration.sorted_scores.items() if name != "gradient"}
    with pytest.raises(InvalidRequest, match="allows 'combined', 'nll'") as caught:
        ask(replace(calibration, sorted_scores=scores), "own", score="gradient")
    assert (caught.value.param, caught.value.code) == ("score", "score_not_calibrated")


def test_other_codecs_are_told_and_worked_around(elsewhere: Calibration, statistics: Statistics) -> None:
    assert "complexity" not in available_scores(elsewhere)
    with pytest.raises(InvalidRequest, match="codecs give other code lengths") as caught:
        ask(elsewhere, "own", score="complexity")
    assert (caught.value.param, caught.value.code) == ("score", "codec_changed")
    question = ask(elsewhere, "own", alpha=0.2)
    assert question.notice is not None
    assert question.threshold == elsewhere.sorted_scores[CODE_FREE][-20]
    for verdict in judge(question, statistics, PIXELS):
        assert verdict.score == verdict.features[CODE_FREE]
        assert {"complexity", "combined"}.isdisjoint(verdict.features)
    assert ask(elsewhere, "own", score="nll").notice is None


def test_here_the_codecs_are_the_same(calibration: Calibration, statistics: Statistics) -> None:
    question = ask(calibration, "own")
    assert question.notice is None
    for verdict in judge(question, statistics, PIXELS):
        assert verdict.score == verdict.features["combined"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_anomalies(
    calibration: Calibration, statistics: Statistics, value: float
) -> None:
    broken = {name: values.copy() for name, values in statistics.items()}
    for values in broken.values():
        values[1] = value
    for score in calibration.scores:
        question = ask(calibration, "own", score=score, alpha=0.1, maps=True)  # type: ignore[arg-type]
        good, bad = judge(question, statistics, PIXELS), judge(question, broken, PIXELS)
        assert not any(np.isnan([*verdict.features.values(), verdict.p_value]).any() for verdict in bad)
        assert bad[1].map_HW is not None
        assert not np.isnan(bad[1].map_HW).any()
        assert bad[1].regions
        assert bad[1].is_anomaly
        # The others are as they were.
        assert [(v.p_value, v.is_anomaly) for v in bad[2:]] == [(v.p_value, v.is_anomaly) for v in good[2:]]


def test_regions_without_end_are_cut_off(calibration: Calibration, statistics: Statistics) -> None:
    dots = replace(calibration.maps, threshold=-1.0)
    residual = np.zeros_like(statistics["residual"])
    residual[:, :, ::2, ::2] = 1e6
    question = ask(replace(calibration, maps=dots), "own", maps=True)
    for verdict in judge(question, {**statistics, "residual": residual}, PIXELS):
        assert 1 <= len(verdict.regions) <= MOST_REGIONS


def test_only_statistics_are_taken_for_statistics() -> None:
    arrays = {"bits_per_dim": np.ones(1), "statistics.bits": np.zeros(1)}
    assert list(statistics_of(arrays)) == ["bits"]
