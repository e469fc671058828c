"""Drift: uniform p-values are near, shifted ones far, and only the last ones count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.broker.base import QueueStats
from service.drift import Drift, ks_limit, ks_statistic
from service.metrics import ServiceMetrics

CRITICAL = 1.95
"""√n times the statistic is above it in one of a thousand windows at most; on a grid it is rarer still."""


def samples(drift: Drift) -> dict[tuple[str, str], float]:
    """Values of the drift's families as Prometheus reads them, by name and last label."""
    stats = QueueStats(waiting={}, running={}, waiting_cost=0, oldest_wait_seconds=0)
    text = ServiceMetrics(drift).render(stats, [], 0, 0).decode()
    return {
        (sample.name, sample.labels.get("score") or sample.labels["verdict"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name.startswith("tarflow_anomaly")
    }


@pytest.mark.parametrize("num_calibration", [9, 99, 5000])
@pytest.mark.parametrize("count", [50, 1000])
def test_uniform_p_values_are_near_and_shifted_ones_far(num_calibration: int, count: int) -> None:
    random = np.random.default_rng(0)
    cells = num_calibration + 1
    for _ in range(20):
        uniform = random.integers(1, cells + 1, count) / cells
        assert ks_statistic(uniform, num_calibration) * math.sqrt(count) < CRITICAL
        shifted = np.ceil(uniform**4 * cells) / cells
        assert ks_statistic(shifted, num_calibration) * math.sqrt(count) > 1.63


def test_the_statistic_is_the_largest_distance_on_the_grid() -> None:
    random = np.random.default_rng(1)
    for num_calibration in (1, 4, 37):
        cells = num_calibration + 1
        for count in (1, 2, 3, 40):
            ranks = random.integers(1, cells + 1, count)
            grid = np.arange(cells + 1)
            expected = max(abs((ranks <= k).mean() - k / cells) for k in grid)
            assert ks_statistic(ranks / cells, num_calibration) == pytest.approx(expected, abs=1e-12)
    whole_grid = np.arange(1, 101) / 100
    assert ks_statistic(whole_grid, 99) == pytest.approx(0, abs=1e-12)
    assert ks_statistic([], 99) == 0


def test_what_has_not_changed_seldom_exceeds_the_limit() -> None:
    """Over calibrations, too: each is a sample of its own."""
    random, windows, level = np.random.default_rng(2), 2000, 0.05
    for num_values, num_calibration in ((50, 50), (200, 1000), (1000, 100)):
        limit = ks_limit(num_values, num_calibration, level)
        beyond = 0
        for _ in range(windows):
            calibration = np.sort(random.normal(size=num_calibration))
            below = np.searchsorted(calibration, random.normal(size=num_values))
            beyond += ks_statistic((below + 1) / (num_calibration + 1), num_calibration) > limit
        # Five standard deviations of the count.
        assert beyond / windows < level + 5 * math.sqrt(level / windows)
        shifted = np.searchsorted(calibration, random.normal(2, size=num_values))
        assert ks_statistic((shifted + 1) / (num_calibration + 1), num_calibration) > limit
    assert ks_limit(0, 10) == 1
    assert ks_limit(100, 100) > ks_limit(1000, 100) > ks_limit(1000, 1000)


def test_the_window_rolls() -> None:
    drift = Drift(100)
    for _ in range(3):
        drift.observe("m", "c", "nll", np.full(100, 0.1), np.full(100, True), num_calibration=9)
    before = samples(drift)
    assert before["tarflow_anomaly_ks", "nll"] == pytest.approx(0.9)
    assert before["tarflow_anomaly_flag_rate", "nll"] == 1
    drift.observe("m", "c", "nll", np.tile(np.arange(1, 11) / 10, 10), np.full(100, False), num_calibration=9)
    after = samples(drift)
    assert after["tarflow_anomaly_ks", "nll"] == pytest.approx(0, abs=1e-12)
    assert after["tarflow_anomaly_flag_rate", "nll"] == 0
    assert after["tarflow_anomaly_window", "nll"] == 100
    assert after["tarflow_anomaly_images_total", "anomalous"] == 300
    assert after["tarflow_anomaly_images_total", "normal"] == 100


def test_another_calibration_starts_anew() -> None:
    drift = Drift(10)
    drift.observe("m", "c", "nll", [0.5], [False], num_calibration=9)
    drift.observe("m", "other", "combined", [0.5], [False], num_calibration=9)
    drift.observe("m", "c", "nll", [0.25], [False], num_calibration=3)
    assert samples(drift)["tarflow_anomaly_window", "nll"] == 1
    drift.forget("m", "c")
    left = samples(drift)
    assert ("tarflow_anomaly_window", "nll") not in left
    assert left["tarflow_anomaly_window", "combined"] == 1
    assert left["tarflow_anomaly_images_total", "normal"] == 1
