"""Evaluation: figures that follow from the definition, gaps and paired differences that mean something."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from model.anomaly.codec import code_lengths
from model.bundle import Bundle, BundleConfig, read_bundle
from model.config import NoiseProtocol
from model.flow import Flow
from model.likelihood import add_noise, bits_per_dim, log_likelihood
from model.noise import input_noise
from model.weights import load_flow, write_bundle
from training.accuracy import recognize_images
from training.classes import resolve_classes
from training.config import TrainConfig
from training.data import DataError, Images, load_images
from training.evaluate import (
    Estimate,
    EvaluationOptions,
    estimate,
    evaluate_bundle,
    paired_accuracy,
    paired_difference,
    sample_images,
    score_images,
)
from training.report import differences, lines, markdown, to_json
from training.run import Origin, Run
from training.soundness import MARGIN, Soundness, sample_soundness

CPU = torch.device("cpu")
OPTIONS = EvaluationOptions()
UNIFORM = NoiseProtocol(kind="uniform")


@pytest.fixture
def bundle(config: TrainConfig, idx_data: Path, tmp_path: Path) -> Bundle:
    """A trained bundle."""
    config, images = resolve_classes(config, load_images(idx_data, "train", 8, 1))
    origin = Origin(command="tarflow train", data_name=idx_data.name)
    console = Console(file=io.StringIO())
    Run(config, images, tmp_path / "run", CPU, origin=origin, console=console, sample_every=10**6).execute()
    return read_bundle(tmp_path / "run" / "bundle")


def other_bundle(bundle: Bundle, noise: NoiseProtocol, path: Path) -> Bundle:
    """A bundle without training whose classes matter: random weights of the same architecture."""
    torch.manual_seed(1)
    flow = Flow(bundle.config.flow)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    config = BundleConfig(name="other", flow=bundle.config.flow, noise=noise, class_names=bundle.config.class_names)
    return write_bundle(path, config, flow, replace(bundle.sampling, denoise=False), "# other\n")


@pytest.mark.parametrize("noise", [NoiseProtocol(kind="gaussian", std=0.1), UNIFORM])
def test_each_image_is_scored_by_the_definition(bundle: Bundle, noise: NoiseProtocol, images: Images) -> None:
    flow = load_flow(bundle)
    few = images.part(0, 5)
    bits = score_images(flow, few, noise, conditional=True, draws=3, seed=40, batch_size=2)
    for i in range(5):
        pixels = torch.from_numpy(few.pixels[i : i + 1])
        draws = input_noise(noise.kind, 40 + i, 3, (1, 8, 8))
        y_B = torch.from_numpy(few.labels[i : i + 1])
        nats = torch.stack([log_likelihood(flow, flow.patchify(add_noise(pixels, noise, d)), y_B) for d in draws])
        nats = nats.squeeze(1).double()
        combined = nats.exp().mean().log() if noise.kind == "uniform" else nats.mean()
        assert bits[i] == pytest.approx(float(bits_per_dim(combined, 64, noise)), abs=1e-5)


def test_scores_do_not_depend_on_the_batch(bundle: Bundle, images: Images) -> None:
    flow = load_flow(bundle)
    scores = [
        score_images(flow, images, bundle.config.noise, conditional=True, batch_size=size) for size in (1, 7, 128)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-5)


def test_more_draws_tighten_the_uniform_bound(bundle: Bundle, images: Images) -> None:
    flow = load_flow(bundle)
    one, many = (score_images(flow, images, UNIFORM, conditional=True, draws=k).mean() for k in (1, 8))
    assert many < one


def test_bounds_on_lossless_codes_stand_beside_lossless_files(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    uniform = evaluate_bundle(other_bundle(bundle, UNIFORM, tmp_path / "uniform"), idx_data, OPTIONS, CPU)
    test = load_images(idx_data, "test", 8, 1)
    expected = code_lengths(test.pixels).mean(axis=0)
    [entry] = to_json([uniform])["evaluations"]
    assert entry["lossless_bits_per_dim"] == pytest.approx(dict(zip(("PNG", "WEBP", "ZLIB"), expected, strict=True)))
    assert f"PNG {expected[0]:.4f}, WEBP {expected[1]:.4f}" in markdown(uniform)
    # A density of noised images is no code length, and is not put beside one.
    gaussian = evaluate_bundle(bundle, idx_data, OPTIONS, CPU)
    assert to_json([gaussian])["evaluations"][0]["lossless_bits_per_dim"] is None
    assert "lossless files" not in markdown(gaussian)


def test_equal_images_get_different_noise(bundle: Bundle, images: Images) -> None:
    twins = Images(images.pixels[[0, 0]], images.labels[[0, 0]])
    bits = score_images(load_flow(bundle), twins, bundle.config.noise, conditional=True)
    assert bits[0] != bits[1]


def test_the_estimate_is_a_mean_with_its_error() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    result = estimate(values)
    assert result.mean == 2.5
    assert result.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert result.interval == pytest.approx(
        (2.5 - 1.96 * result.standard_error, 2.5 + 1.96 * result.standard_error), rel=1e-4
    )
    assert estimate(np.array([1.0])).standard_error == math.inf


def test_an_evaluation_has_the_gap_to_images_it_was_trained_on(bundle: Bundle, idx_data: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluation = evaluate_bundle(bundle, idx_data, OPTIONS, CPU, lambda done, total: seen.append((done, total)))
    assert (len(evaluation.bits), evaluation.conditional) == (20, True)
    assert evaluation.train_bits is not None
    assert len(evaluation.train_bits) == 20
    assert evaluation.gap is not None
    assert evaluation.gap.mean == pytest.approx(evaluation.bits.mean() - evaluation.train_bits.mean())
    assert seen[-1] == (40, 40)
    text = "\n".join(lines(evaluation))
    assert bundle.config.noise.meaning in text
    assert f"{evaluation.bits.mean():.4f}" in text
    assert "train–test gap: " in text
    assert markdown(evaluation).startswith("- Test bits/dim")


def test_training_images_never_include_the_holdout(bundle: Bundle, idx_data: Path, images: Images) -> None:
    options = EvaluationOptions(train_limit=1000)
    evaluation = evaluate_bundle(bundle, idx_data, options, CPU)
    trained = sample_images(images.part(0, 40), 1000, 0)
    expected = score_images(load_flow(bundle), trained, bundle.config.noise, conditional=True)
    np.testing.assert_allclose(evaluation.train_bits, expected, atol=1e-6)


def test_no_gap_when_the_training_images_are_others(
    bundle: Bundle, idx_data: Path, write_idx: Callable[..., Path], make_images: Callable[..., Images], tmp_path: Path
) -> None:
    write_idx(idx_data, make_images(seed=9))
    evaluation = evaluate_bundle(bundle, idx_data, OPTIONS, CPU)
    assert evaluation.gap is None
    assert "not the ones it was trained on" in "\n".join(lines(evaluation))
    imported = other_bundle(bundle, bundle.config.noise, tmp_path / "other")
    assert "does not say" in "\n".join(lines(evaluate_bundle(imported, idx_data, OPTIONS, CPU)))


def test_limit_and_split(bundle: Bundle, idx_data: Path) -> None:
    options = EvaluationOptions(limit=7, train_limit=0)
    evaluation = evaluate_bundle(bundle, idx_data, options, CPU)
    assert (len(evaluation.bits), evaluation.train_bits) == (7, None)
    assert len(evaluate_bundle(bundle, idx_data, EvaluationOptions(split="train"), CPU).bits) == 44
    with pytest.raises(ValueError, match="split"):
        EvaluationOptions(split="validation")


def test_without_classes_and_with_foreign_ones(
    bundle: Bundle, write_idx: Callable[..., Path], make_images: Callable[..., Images], tmp_path: Path
) -> None:
    foreign = make_images(20)
    foreign.labels[3] = 7
    data = write_idx(tmp_path / "foreign", foreign, "t10k")
    with pytest.raises(DataError, match="label 7"):
        evaluate_bundle(bundle, data, OPTIONS, CPU)
    evaluation = evaluate_bundle(bundle, data, EvaluationOptions(ignore_classes=True), CPU)
    assert not evaluation.conditional
    assert "without a class" in "\n".join(lines(evaluation))


def test_the_paired_difference_is_that_of_equal_noise(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    other = other_bundle(bundle, bundle.config.noise, tmp_path / "other")
    ours, theirs = (evaluate_bundle(b, idx_data, OPTIONS, CPU) for b in (bundle, other))
    difference = paired_difference(ours, theirs)
    assert difference.mean == pytest.approx(theirs.bits.mean() - ours.bits.mean())
    assert difference.standard_error == pytest.approx(np.std(theirs.bits - ours.bits, ddof=1) / math.sqrt(20))
    assert paired_difference(ours, ours).standard_error == 0
    (line,) = differences([ours, theirs])
    assert "other" in line
    document = to_json([ours, theirs])
    assert document["paired_differences"][0]["difference"]["mean"] == difference.mean
    assert document["evaluations"][0]["bits_per_dim"]["mean"] == ours.bits.mean()


def test_figures_of_different_protocols_are_not_subtracted(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    other = other_bundle(bundle, UNIFORM, tmp_path / "other")
    evaluations = [evaluate_bundle(b, idx_data, OPTIONS, CPU) for b in (bundle, other)]
    with pytest.raises(ValueError, match=r"gaussian 0\.1; uniform"):
        paired_difference(*evaluations)
    assert "not comparable" in differences(evaluations)[0]
    assert "not_comparable" in to_json(evaluations)["paired_differences"][0]


def test_accuracy_comes_when_it_is_asked_for(bundle: Bundle, idx_data: Path) -> None:
    plain = evaluate_bundle(bundle, idx_data, OPTIONS, CPU)
    assert plain.accuracy is None
    assert "ccuracy" not in "\n".join(lines(plain)) + str(to_json([plain, plain])) + str(differences([plain, plain]))
    seen: list[tuple[int, int]] = []
    options = EvaluationOptions(accuracy=True, draws=2, seed=5, batch_size=8)
    evaluation = evaluate_bundle(bundle, idx_data, options, CPU, lambda done, total: seen.append((done, total)))
    # 20 images, 20 to compare with, and 20 given each of two classes.
    assert seen[-1] == (80, 80)
    assert evaluation.accuracy is not None
    images = load_images(idx_data, "test", 8, 1)
    expected = recognize_images(
        load_flow(bundle), images, bundle.config.noise, bundle.config.prior, draws=2, seed=5, batch_size=20
    )
    assert np.array_equal(evaluation.accuracy.correct, expected.correct)
    np.testing.assert_array_equal(
        evaluation.bits, evaluate_bundle(bundle, idx_data, replace(options, accuracy=False), CPU).bits
    )
    (line,) = [line for line in lines(evaluation) if line.startswith("Bayes accuracy: ")]
    low, high = expected.interval
    for text in (f"{expected.value:.2%}", f"{low:.2%} to {high:.2%}", "20 images", "2 noise draws", "a uniform prior"):
        assert text in line
    assert f"- {line}" in markdown(evaluation)
    document = to_json([evaluation])["evaluations"][0]["bayes_accuracy"]
    assert document["accuracy"] == expected.value
    assert document["interval_95"] == [low, high]
    assert (document["num_images"], document["draws"], document["prior"]) == (20, 2, {"0": 0.5, "1": 0.5})


def test_images_without_a_finite_figure_are_told(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    other = other_bundle(bundle, UNIFORM, tmp_path / "other")
    whole = evaluate_bundle(other, idx_data, EvaluationOptions(train_limit=0), CPU)
    bits = whole.bits.copy()
    bits[3] = np.inf
    found = replace(whole, bits=bits)
    rest = np.delete(whole.bits, 3)
    line, *others = lines(found)
    assert line.startswith(f"test bits/dim: {rest.mean():.4f} ± ")
    assert "on 19 of 20 images" in line
    assert line.endswith("; the density of the other is too small for a finite number")
    assert "too small" not in lines(whole)[0]
    # A code may always fall back on the 8 bits of every value, if it says so.
    expected = (np.minimum(rest, 8).sum() + 8) / 20 + 1 / 64
    assert found.escaping_bits is not None
    assert found.escaping_bits.mean == pytest.approx(expected)
    assert any(f"at a bit an image: {expected:.4f}" in text for text in others)
    document = to_json([found, whole])
    assert json.loads(json.dumps(document, allow_nan=False))
    assert document["evaluations"][0]["not_finite"] == 1
    assert document["evaluations"][0]["bits_per_dim"]["mean"] == pytest.approx(rest.mean())
    assert paired_difference(found, whole).mean == 0
    gaussian = evaluate_bundle(bundle, idx_data, EvaluationOptions(train_limit=0), CPU)
    assert gaussian.escaping_bits is None


def test_samples_are_counted_when_it_is_asked_for(bundle: Bundle, idx_data: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = EvaluationOptions(samples=3, train_limit=0)
    evaluation = evaluate_bundle(bundle, idx_data, options, CPU, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (23, 23)
    found = evaluation.soundness
    assert found == sample_soundness(load_flow(bundle), bundle.config.noise, bundle.sampling, 3)
    assert found is not None
    (line,) = [line for line in lines(evaluation) if line.startswith("samples: 0 of 3, ")]
    assert f"{found.outside:.2%}" in line
    assert f"- S{line[1:]}" in markdown(evaluation)
    document = to_json([evaluation])["evaluations"][0]["samples"]
    assert document == {"num_samples": 3, "not_finite": 0, "outside": found.outside, "margin": MARGIN}
    none_finite = replace(evaluation, soundness=Soundness(num_samples=3, not_finite=3, outside=math.nan))
    assert lines(none_finite)[-1].endswith("have values that are not finite")
    assert json.loads(json.dumps(to_json([none_finite]), allow_nan=False))
    plain = evaluate_bundle(bundle, idx_data, OPTIONS, CPU)
    assert plain.soundness is None
    assert "samples" not in "\n".join(lines(plain)) + str(to_json([plain]))


def test_accuracy_uses_and_tells_the_bundle_s_prior(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    config = replace(bundle.config, class_prior=(1e-9, 1 - 1e-9))
    flow = Flow(config.flow)
    skewed = write_bundle(tmp_path / "skewed", config, flow, bundle.sampling, "")
    evaluation = evaluate_bundle(skewed, idx_data, EvaluationOptions(accuracy=True), CPU)
    assert evaluation.accuracy is not None
    assert np.array_equal(evaluation.accuracy.correct, load_images(idx_data, "test", 8, 1).labels == 1)
    assert "the bundle's prior (0 1e-09, 1 1)" in lines(evaluation)[-1]


def test_accuracy_without_giving_classes_to_the_scores(bundle: Bundle, idx_data: Path) -> None:
    options = EvaluationOptions(accuracy=True, ignore_classes=True)
    evaluation = evaluate_bundle(bundle, idx_data, options, CPU)
    given = evaluate_bundle(bundle, idx_data, replace(options, ignore_classes=False), CPU)
    assert not evaluation.conditional
    assert evaluation.accuracy is not None
    assert given.accuracy is not None
    assert np.array_equal(evaluation.accuracy.correct, given.accuracy.correct)


def test_a_model_without_classes_has_no_accuracy(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    config = BundleConfig(
        name="plain", flow=replace(bundle.config.flow, num_classes=0), noise=bundle.config.noise, class_names=()
    )
    plain = write_bundle(tmp_path / "plain", config, Flow(config.flow), bundle.sampling, "")
    options = EvaluationOptions(accuracy=True)
    ours, theirs = (evaluate_bundle(b, idx_data, options, CPU) for b in (bundle, plain))
    assert theirs.accuracy is None
    assert lines(theirs)[-1] == "Bayes accuracy: none, the model has no classes"
    assert to_json([theirs])["evaluations"][0]["bayes_accuracy"] is None
    for pair in ([ours, theirs], [theirs, ours]):
        assert "plain has no Bayes accuracy" in differences(pair)[-1]
        assert "accuracy_not_comparable" in to_json(pair)["paired_differences"][0]


def test_the_paired_difference_of_accuracy(bundle: Bundle, idx_data: Path, tmp_path: Path) -> None:
    other = other_bundle(bundle, UNIFORM, tmp_path / "other")
    options = EvaluationOptions(accuracy=True)
    ours, theirs = (evaluate_bundle(b, idx_data, options, CPU) for b in (bundle, other))
    assert ours.accuracy is not None
    assert theirs.accuracy is not None
    difference = paired_accuracy(ours, theirs)
    assert difference.mean == pytest.approx(theirs.accuracy.value - ours.accuracy.value)
    assert paired_accuracy(ours, ours) == Estimate(0, 0)
    # The protocols differ, so that bits/dim are not comparable; what is recognized is.
    not_bits, points = differences([ours, theirs])
    assert "not comparable" in not_bits
    assert f"{100 * difference.mean:+.2f} points" in points
    document = to_json([ours, theirs])["paired_differences"][0]
    assert document["accuracy_difference"]["mean"] == difference.mean
    strangers = replace(theirs, bundle=replace(other, config=replace(other.config, class_names=("a", "b"))))
    with pytest.raises(ValueError, match="different classes"):
        paired_accuracy(ours, strangers)
