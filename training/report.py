"""An evaluation in words: for the terminal, for programs (JSON) and for the model card."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.anomaly.codec import CODECS
from model.bundle import Bundle
from training.accuracy import Accuracy
from training.evaluate import Estimate, Evaluation, estimate, finite, paired_accuracy, paired_difference
from training.soundness import MARGIN, Soundness

MOST_SHOWN = 12
"""Classes whose prior is told in words."""


def lines(evaluation: Evaluation) -> list[str]:
    """The evaluation as a short list, the same on the terminal and in CARD.md."""
    ours = estimate(finite(evaluation.bits))
    config = evaluation.bundle.config
    given = "given its class" if evaluation.conditional else "without a class"
    options = evaluation.options
    draws = f"{options.draws} noise draw{'s' if options.draws > 1 else ''} an image"
    text = [
        f"{options.split} bits/dim: {ours.mean:.4f} ± {ours.standard_error:.4f} (standard error) "
        f"on {_count(evaluation.bits)} images of {evaluation.data_name}, each {given}{_missing(evaluation.bits)}",
        f"protocol: {config.noise.kind} noise, {draws}, image i with the noise of seed {options.seed} + i, float32; "
        f"{config.noise.meaning}",
    ]
    gap = evaluation.gap
    if evaluation.train_bits is not None and gap is not None:
        theirs = estimate(finite(evaluation.train_bits))
        text += [
            f"train bits/dim: {theirs.mean:.4f} ± {theirs.standard_error:.4f} "
            f"on {_count(evaluation.train_bits)} images that it was trained on, same noise seeds",
            f"train–test gap: {_signed(gap)}",
        ]
    else:
        text.append(f"train–test gap: none, {evaluation.no_gap_because}")
    if evaluation.codes is not None:
        escaping = evaluation.escaping_bits
        if escaping is not None:
            text.append(
                f"as a lossless code that stores raw what the model is no help with, at a bit an image: "
                f"{escaping.mean:.4f} ± {escaping.standard_error:.4f} bits/dim on all {len(evaluation.bits):,} images"
            )
        means = ", ".join(f"{name} {value:.4f}" for name, value in _codes(evaluation).items())
        text.append(f"lossless files of the same images, headers included: {means} bits/dim")
    if options.accuracy:
        text.append(f"Bayes accuracy: {_accuracy(evaluation, draws)}")
    if evaluation.soundness is not None:
        text.append(f"samples: {_soundness(evaluation.soundness)}")
    return text


def _count(values: NDArray[np.float64]) -> str:
    """How many figures there are, of how many images where some have none."""
    found = len(finite(values))
    return f"{found:,}" if found == len(values) else f"{found:,} of {len(values):,}"


def _missing(values: NDArray[np.float64]) -> str:
    missing = len(values) - len(finite(values))
    if not missing:
        return ""
    return f"; the density of the other {f'{missing:,} ' if missing > 1 else ''}is too small for a finite number"


def _soundness(found: Soundness) -> str:
    text = (
        f"{found.not_finite:,} of {found.num_samples:,}, drawn as the bundle recommends with seeds from 0 and all "
        "classes in turn, have values that are not finite"
    )
    if found.not_finite == found.num_samples:
        return text
    return f"{text}; of the values of the others {found.outside:.2%} are more than {MARGIN:g} outside of [-1, 1]"


def _codes(evaluation: Evaluation) -> dict[str, float]:
    """Mean bits/dim by codec."""
    if evaluation.codes is None:
        return {}
    return dict(zip((name.upper() for name in CODECS), evaluation.codes.mean(axis=0).tolist(), strict=True))


def _accuracy(evaluation: Evaluation, draws: str) -> str:
    accuracy = evaluation.accuracy
    if accuracy is None:
        return "none, the model has no classes"
    low, high = accuracy.interval
    return (
        f"{accuracy.value:.2%} (95% Wilson interval {low:.2%} to {high:.2%}) on {len(accuracy.correct):,} images, "
        f"{draws}, the most probable of {len(accuracy.prior)} classes under {_prior(evaluation.bundle, accuracy)}"
    )


def _prior(bundle: Bundle, accuracy: Accuracy) -> str:
    if not bundle.config.class_prior or len(set(accuracy.prior)) == 1:
        return "a uniform prior"
    pairs = list(zip(bundle.config.class_names, accuracy.prior, strict=True))
    shown = ", ".join(f"{name} {p:.4g}" for name, p in pairs[:MOST_SHOWN])
    return f"the bundle's prior ({shown}{', …' if len(pairs) > MOST_SHOWN else ''})"


def markdown(evaluation: Evaluation) -> str:
    """The list as Markdown, for the card."""
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines(evaluation))


def differences(evaluations: list[Evaluation]) -> list[str]:
    """One line for each further bundle compared with the first, or why it cannot be compared."""
    text = []
    for other in evaluations[1:]:
        first = evaluations[0]
        try:
            difference = paired_difference(first, other)
        except ValueError as error:
            text.append(f"no paired difference: {error}")
        else:
            text.append(
                f"paired difference, {_label(other.bundle)} minus {_label(first.bundle)}: {_signed(difference)}; "
                "same images, same noise"
            )
        if first.options.accuracy:
            text.append(_accuracy_difference(first, other))
    return text


def _accuracy_difference(first: Evaluation, other: Evaluation) -> str:
    try:
        difference = paired_accuracy(first, other)
    except ValueError as error:
        return f"no paired difference of accuracy: {error}"
    low, high = difference.interval
    return (
        f"paired difference of accuracy, {_label(other.bundle)} minus {_label(first.bundle)}: "
        f"{100 * difference.mean:+.2f} points (95% interval {100 * low:+.2f} to {100 * high:+.2f}); same images"
    )


def to_json(evaluations: list[Evaluation]) -> dict[str, Any]:
    """One JSON document with everything that the text says."""
    compared = []
    for other in evaluations[1:]:
        entry: dict[str, Any] = {"first": evaluations[0].bundle.model_id, "second": other.bundle.model_id}
        try:
            entry["difference"] = _estimate_json(paired_difference(evaluations[0], other))
        except ValueError as error:
            entry["not_comparable"] = str(error)
        if other.options.accuracy:
            try:
                entry["accuracy_difference"] = _estimate_json(paired_accuracy(evaluations[0], other))
            except ValueError as error:
                entry["accuracy_not_comparable"] = str(error)
        compared.append(entry)
    return {"evaluations": [_evaluation_json(e) for e in evaluations], "paired_differences": compared}


def _evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    options = evaluation.options
    config, gap, train = evaluation.bundle.config, evaluation.gap, evaluation.train_bits
    return {
        "name": config.name,
        "model_id": evaluation.bundle.model_id,
        "data": evaluation.data_name,
        "split": options.split,
        "num_images": len(evaluation.bits),
        "conditional": evaluation.conditional,
        "draws": options.draws,
        "seed": options.seed,
        "noise": config.noise.to_dict(),
        "protocol": config.noise.meaning,
        "not_finite": len(evaluation.bits) - len(finite(evaluation.bits)),
        "bits_per_dim": _estimate_json(estimate(finite(evaluation.bits))),
        "escaping_bits_per_dim": None if (code := evaluation.escaping_bits) is None else _estimate_json(code),
        "lossless_bits_per_dim": _codes(evaluation) or None,
        "train_num_images": None if train is None else len(train),
        "train_bits_per_dim": None if train is None else _estimate_json(estimate(finite(train))),
        "no_gap_because": evaluation.no_gap_because or None,
        "train_test_gap": None if gap is None else _estimate_json(gap),
        **({"bayes_accuracy": _accuracy_json(evaluation)} if options.accuracy else {}),
        **({} if evaluation.soundness is None else {"samples": _soundness_json(evaluation.soundness)}),
    }


def _soundness_json(soundness: Soundness) -> dict[str, Any]:
    """JSON knows no NaN."""
    outside = None if soundness.not_finite == soundness.num_samples else soundness.outside
    return {**asdict(soundness), "outside": outside, "margin": MARGIN}


def _accuracy_json(evaluation: Evaluation) -> dict[str, Any] | None:
    """The accuracy with all that it depends on; None for a model without classes."""
    accuracy = evaluation.accuracy
    if accuracy is None:
        return None
    return {
        "accuracy": accuracy.value,
        "interval_95": list(accuracy.interval),
        "interval": "wilson",
        "correct": int(accuracy.correct.sum()),
        "num_images": len(accuracy.correct),
        "draws": evaluation.options.draws,
        "prior": dict(zip(evaluation.bundle.config.class_names, accuracy.prior, strict=True)),
    }


def _estimate_json(value: Estimate) -> dict[str, Any]:
    low, high = value.interval
    return {
        "mean": json_number(value.mean),
        "standard_error": json_number(value.standard_error),
        "interval_95": [json_number(low), json_number(high)],
    }


def json_number(value: float) -> float | None:
    """JSON knows no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _signed(value: Estimate) -> str:
    low, high = value.interval
    return f"{value.mean:+.4f} bits/dim (95% interval {low:+.4f} to {high:+.4f})"


def _label(bundle: Bundle) -> str:
    return f"{bundle.name} ({bundle.model_id.removeprefix('sha256:')[:8]})"
