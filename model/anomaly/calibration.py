"""A calibration: what is normal, fitted on some images and calibrated on others, for one model.

One half of the normal images fits the densities (:class:`~model.anomaly.detector.Detector`), the other is scored with
them; these scores turn a new score into a conformal p-value (:mod:`model.anomaly.conformal`). A file holds all of it:
safetensors with a JSON record in its metadata. Plain numpy: verdicts need no torch, and no new pass of the flow for
another threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from model.anomaly.arrays import flatten, unflatten
from model.anomaly.codec import code_lengths, fingerprint
from model.anomaly.conformal import smallest_alpha
from model.anomaly.detector import FEWEST_IMAGES, SCORES, Detector
from model.anomaly.features import Statistics
from model.anomaly.maps import MapScale
from model.anomaly.normals import distinct
from model.anomaly.rounding import raised

FORMAT_VERSION = 1
DEFAULT_ALPHA = 0.01
FEWEST_NORMALS = 2 * FEWEST_IMAGES
FIT_SHARE = 0.5
"""Share of the normal images that the densities are fitted to."""
HISTOGRAM_BINS = 40

Floats = NDArray[np.float64]


class CalibrationError(ValueError):
    """A calibration that cannot be used; the message says why."""


class CalibrationMismatch(CalibrationError):
    """It was made with another model."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """What a calibration is about."""

    name: str
    model: str
    """Name of the model."""
    model_id: str
    """Hash of the model's weights and configuration; no other model's scores can be compared."""
    noise: Mapping[str, Any]
    """Noise protocol, as the bundle has it."""
    seed: int
    """Seed of the noise, the same for every image."""
    num_fit: int
    """Images that the densities were fitted to."""
    num_calibration: int
    """Images whose scores make the p-values."""
    codec_fingerprint: tuple[tuple[int, ...], ...]
    """Code lengths of fixed pictures; where they differ, scores that use codecs do not apply."""
    created: int
    """Seconds since 1970 (UTC)."""
    source: str = ""
    """Where the normal images came from, for people."""

    @property
    def default_alpha(self) -> float:
        """1%, or the smallest level that so many images allow."""
        return max(DEFAULT_ALPHA, smallest_alpha(self.num_calibration))


@dataclass(frozen=True)
class Calibration:
    """Densities, scores of calibration images, and the scales of maps."""

    record: CalibrationRecord
    detector: Detector
    sorted_scores: Mapping[str, Floats]
    """Scores of the calibration images by name, raised above what rounding may do to them, sorted, (m,) each."""
    maps: MapScale

    @cached_property
    def codecs_match(self) -> bool:
        """Whether the codecs here give the lengths that they gave when it was made."""
        size, channels = self.maps.image_size, self.maps.channels
        found = tuple(tuple(lengths) for lengths in fingerprint(channels, size))
        return found == self.record.codec_fingerprint

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores that can be asked for."""
        return tuple(name for name in SCORES if name in self.sorted_scores)

    def check_model(self, name: str, model_id: str) -> None:
        """Raise :class:`CalibrationMismatch` unless it was made with these very weights."""
        if self.record.model_id != model_id:
            raise CalibrationMismatch(
                f"calibration {self.record.name!r} was made with model {self.record.model!r} "
                f"({self.record.model_id[:19]}…), not with {name!r} ({model_id[:19]}…); calibrate this model anew"
            )

    def histogram(self, score: str) -> tuple[Floats, NDArray[np.int64]]:
        """Edges (bins + 1,) and counts (bins,) of the calibration images' scores; infinite ones are in the last."""
        values = self.sorted_scores[score]
        finite = values[np.isfinite(values)]
        if not len(finite):
            return np.array([0.0, 1.0]), np.array([len(values)])
        # Values that differ in their last digits alone have no room for bins between them.
        spread = float(finite.max() - finite.min())
        bins = HISTOGRAM_BINS if spread > 1e-9 * (1 + float(np.abs(finite).max())) else 1
        counts, edges = np.histogram(finite, bins)
        counts[-1] += len(values) - len(finite)
        return edges, counts

    def to_bytes(self) -> bytes:
        """The content of a calibration file."""
        arrays: dict[str, NDArray[Any]] = {f"detector/{k}": v for k, v in flatten(self.detector).items()}
        arrays |= {f"maps/{k}": v for k, v in flatten(self.maps).items()}
        arrays |= {f"scores/{k}": np.ascontiguousarray(v) for k, v in self.sorted_scores.items()}
        record = json.dumps({"format_version": FORMAT_VERSION, **asdict(self.record)})
        return save_arrays(arrays, metadata={"calibration": record})

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "calibration") -> Calibration:
        """Inverse of :meth:`to_bytes`; raises :class:`CalibrationError`."""
        try:
            arrays = load_arrays(data)
            length = int.from_bytes(data[:8], "little")
            content = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["calibration"])
            version = content.pop("format_version")
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise CalibrationError(f"{where}: format {version!r}, this program reads up to {FORMAT_VERSION}")
            content["codec_fingerprint"] = tuple(tuple(lengths) for lengths in content["codec_fingerprint"])
            parts = {kind: _under(kind, arrays) for kind in ("detector/", "maps/", "scores/")}
            calibration = cls(
                CalibrationRecord(**content),
                unflatten(Detector, parts["detector/"]),
                {name: np.asarray(values, np.float64) for name, values in parts["scores/"].items()},
                unflatten(MapScale, parts["maps/"]),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"{where}: not a calibration: {error}") from error
        if "nll" not in calibration.sorted_scores or any(
            values.shape != (calibration.record.num_calibration,) or (np.diff(values) < 0).any()
            for values in calibration.sorted_scores.values()
        ):
            raise CalibrationError(f"{where}: the scores are not sorted lists of num_calibration values")
        return calibration


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def split_sizes(count: int) -> tuple[int, int]:
    """How many of ``count`` normal images fit the densities and how many calibrate; ``ValueError`` for too few."""
    if count < FEWEST_NORMALS:
        raise ValueError(
            f"normal images: got {count}, allowed are {FEWEST_NORMALS} and more; some hundreds make good verdicts, "
            "and a level of 1% needs 200"
        )
    fit = round(FIT_SHARE * count)
    return fit, count - fit


def calibrate(
    statistics: Statistics, pixels: NDArray[np.uint8], record: Mapping[str, Any], order_seed: int = 0
) -> Calibration:
    """Make a calibration of normal images' statistics, residuals included, and their pixels (N, C, H, W).

    ``record`` holds the fields of :class:`CalibrationRecord` that are not counted here. The images are split at random,
    by ``order_seed``, since files often come in some order; exact copies count once. Raises ``ValueError`` for too few
    different images, and for one that the model has no finite statistics of.

    The statistics are the most of the memory that it takes: of the residual, their largest, nothing is copied.
    """
    kept = distinct(pixels)
    fit_size, calibration_size = split_sizes(len(kept))
    for name, values in statistics.items():
        finite_N = np.array([np.isfinite(row).all() for row in values])
        if not finite_N.all():
            raise ValueError(f"normal images: the model gives image {int(finite_N.argmin())} no finite {name}")
    order = np.random.Generator(np.random.Philox(key=[order_seed, 0])).permutation(len(kept))
    fit, rest = np.sort(kept[order[:fit_size]]), np.sort(kept[order[fit_size:]])
    codes = code_lengths(pixels)
    # What is served is what was stored: the scores are those of the rounded arrays.
    detector = unflatten(Detector, flatten(Detector.fit(_take(statistics, fit), codes[fit])))
    maps = unflatten(MapScale, flatten(MapScale.fit(statistics, fit, detector, pixels.shape)))
    maps = maps.with_threshold(statistics, rest, detector)
    scores = detector.scores(_take(statistics, rest), codes[rest])
    _, channels, size, _ = pixels.shape
    complete = CalibrationRecord(
        **record,
        num_fit=fit_size,
        num_calibration=calibration_size,
        codec_fingerprint=tuple(tuple(lengths) for lengths in fingerprint(channels, size)),
    )
    return Calibration(complete, detector, {name: raised(np.sort(values)) for name, values in scores.items()}, maps)


def _take(statistics: Statistics, index: NDArray[np.int64]) -> Statistics:
    """What the detector looks at, of some of the images."""
    return {name: values[index] for name, values in statistics.items() if name != "residual"}
