"""Whether what is judged still looks like what was calibrated on: rolling windows of p-values, for Prometheus.

Conformal p-values of images like the calibration's are uniform on the grid 1/(m + 1), …, 1. The largest distance of a
window's distribution from that one (Kolmogorov 1933) stays below about 1.63/√n in 99 of 100 windows of n such images,
and grows when cameras, products or processes change. (One set of m calibration images is itself a sample: as with any
two samples the distance to expect is that of √(1/n + 1/m).) Everything here runs on the event loop.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MOST_JOBS = 10_000
"""Jobs of which it is remembered that their images were observed."""


def ks_statistic(p_values_N: Sequence[float] | NDArray[np.float64], num_calibration: int) -> float:
    """Kolmogorov–Smirnov statistic of p-values (N,) against the uniform distribution on k/(m + 1), k = 1 … m + 1.

    Both distribution functions jump on this grid alone, so they are farthest apart at one of its points. 0 for no
    values.
    """
    values_N = np.asarray(p_values_N, np.float64)
    if not len(values_N):
        return 0.0
    cells = num_calibration + 1
    rank_N = np.clip(np.rint(values_N * cells).astype(np.int64), 1, cells)
    rank_U, counts_U = np.unique(rank_N, return_counts=True)
    upto_U = np.cumsum(counts_U) / len(values_N)
    before_U = upto_U - counts_U / len(values_N)
    # Between two ranks that occur the empirical function is flat: its extremes are at a rank and just before one.
    return float(max(np.abs(upto_U - rank_U / cells).max(), np.abs((rank_U - 1) / cells - before_U).max()))


def ks_limit(num_values: int, num_calibration: int, level: float = 0.001) -> float:
    """The distance that a share ``level`` of windows exceeds when nothing has changed; 1 for no values.

    The asymptotic quantile of two samples (Smirnov 1948), since the calibration is one itself: with the grid's
    ties it errs on the side of silence.
    """
    if not num_values:
        return 1.0
    return min(1.0, math.sqrt(-math.log(level / 2) / 2 * (1 / num_values + 1 / num_calibration)))


class _Window:
    """The last values of one score of one calibration."""

    def __init__(self, size: int, num_calibration: int) -> None:
        self.num_calibration = num_calibration
        self.p_values: deque[float] = deque(maxlen=size)
        self.flags: deque[bool] = deque(maxlen=size)


class Drift(Collector):
    """Windows by model, calibration and score, and how many images were judged which way."""

    def __init__(self, window: int) -> None:
        """``window`` is the most values of one window."""
        self._size = window
        self._windows: dict[tuple[str, str, str], _Window] = {}
        self._judged: Counter[tuple[str, str, str]] = Counter()
        self._versions: dict[tuple[str, str], object] = {}
        self._jobs: dict[str, None] = {}

    def observe(
        self,
        model: str,
        calibration: str,
        score: str,
        p_values: Sequence[float] | NDArray[np.float64],
        flagged: Sequence[bool] | NDArray[np.bool_],
        *,
        num_calibration: int,
        version: object = None,
    ) -> None:
        """Add judged images: their p-values (N,) and whether each was flagged (N,).

        Names become labels: give only those of calibrations that exist. ``num_calibration`` is m, the number of
        calibration images, which makes the grid; with another one than before the window starts anew.
        ``version`` is told from another calibration of this name, which somebody may have put in the place of the
        former.
        """
        if self._versions.setdefault((model, calibration), version) is not version:
            self.forget(model, calibration)
            self._versions[model, calibration] = version
        key = model, calibration, score
        window = self._windows.get(key)
        if window is None or window.num_calibration != num_calibration:
            window = self._windows[key] = _Window(self._size, num_calibration)
        window.p_values.extend(map(float, p_values))
        window.flags.extend(map(bool, flagged))
        for flag in flagged:
            self._judged[model, calibration, "anomalous" if flag else "normal"] += 1

    def forget(self, model: str, calibration: str) -> None:
        """Start anew for a calibration that was replaced or deleted."""
        self._versions.pop((model, calibration), None)
        for windows in (self._windows, self._judged):
            for key in [key for key in windows if key[:2] == (model, calibration)]:
                del windows[key]

    def is_new(self, job_id: str) -> bool:
        """Whether a job's images have not been observed here, as far as is remembered; from now on they have.

        The same verdicts may be asked for again and again.
        """
        if job_id in self._jobs:
            return False
        self._jobs[job_id] = None
        if len(self._jobs) > MOST_JOBS:
            del self._jobs[next(iter(self._jobs))]
        return True

    def collect(self) -> Iterable[Metric]:
        """All families, each once."""
        labels = ["model", "calibration", "score"]
        distance = GaugeMetricFamily(
            "tarflow_anomaly_ks", "Distance of recent p-values from uniform (Kolmogorov-Smirnov)", labels=labels
        )
        rate = GaugeMetricFamily("tarflow_anomaly_flag_rate", "Share of recent images that were flagged", labels=labels)
        limit = GaugeMetricFamily(
            "tarflow_anomaly_ks_limit",
            "Distance that images like the calibration's exceed once in a thousand windows",
            labels=labels,
        )
        count = GaugeMetricFamily("tarflow_anomaly_window", "Recent images that drift is measured over", labels=labels)
        for key, window in self._windows.items():
            distance.add_metric(key, ks_statistic(list(window.p_values), window.num_calibration))
            limit.add_metric(key, ks_limit(len(window.p_values), window.num_calibration))
            rate.add_metric(key, sum(window.flags) / max(1, len(window.flags)))
            count.add_metric(key, len(window.p_values))
        yield distance
        yield limit
        yield rate
        yield count
        judged = CounterMetricFamily(
            "tarflow_anomaly_images", "Judged images by verdict", labels=["model", "calibration", "verdict"]
        )
        for verdict_key, number in self._judged.items():
            judged.add_metric(verdict_key, number)
        yield judged
