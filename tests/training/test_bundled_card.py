"""The bundled models' cards say what an evaluation finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model.bundle import BUNDLED, find_bundles, read_bundle
from training.cli import app

DATA = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("fashion-mnist", "fashion-mnist-likelihood")
SECTIONS = ("## Model", "## Data", "## Training", "## Evaluation", "samples.png", "Hardware:", "Time in training")
FIGURES = (
    r"- Test bits/dim: \d\.\d{4} ± .* on 10,000 images",
    r"- Train–test gap: [+-]\d\.\d{4}",
    r"- Bayes accuracy: \d\d\.\d\d% .* on 10,000 images",
    r"- Baseline of equal budget: \d\.\d{4} ± ",
    r"- 1,000 samples .*; 0 not finite",
)
CODES = r"- Lossless files of the same images, headers included: PNG \d\.\d{4}, WEBP \d\.\d{4}"


def test_there_are_no_others() -> None:
    assert tuple(bundle.name for bundle in find_bundles(BUNDLED)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_complete(name: str) -> None:
    card = read_bundle(BUNDLED / name).card
    for section in SECTIONS:
        assert section in card
    for figure in FIGURES:
        assert re.search(figure, card), figure


def test_true_bits_per_dim_stand_beside_lossless_codes() -> None:
    """Only where the protocol makes them comparable."""
    assert re.search(CODES, read_bundle(BUNDLED / "fashion-mnist-likelihood").card)
    assert "Lossless" not in read_bundle(BUNDLED / "fashion-mnist").card


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_told_apart(name: str) -> None:
    accuracy = re.search(r"- Bayes accuracy: (\d\d\.\d\d)%", read_bundle(BUNDLED / name).card)
    assert accuracy is not None
    assert float(accuracy[1]) >= 89


def test_the_first_is_ahead_of_its_coupling_flow() -> None:
    """Of the second the documents say that it is not yet."""
    ahead = r"- Baseline of equal budget: .* more than the model .*\(95% interval of the difference \+0\.\d{4} to \+0"
    assert re.search(ahead, read_bundle(BUNDLED / "fashion-mnist").card)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_card_gives_the_bits_per_dim_of_all_test_images(name: str) -> None:
    card = read_bundle(BUNDLED / name).card
    draws = re.search(r"- Protocol: .* (\d+) noise draws? an image", card)
    assert draws is not None
    arguments = [
        "evaluate",
        name,
        "--data",
        str(DATA),
        "--train-limit",
        "0",
        "--draws",
        draws[1],
        "--accuracy",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)["evaluations"]
    stated = re.search(r"Test bits/dim: (\d\.\d+)", card)
    assert stated is not None
    accuracy = re.search(r"- Bayes accuracy: (\d\d\.\d\d)%", card)
    assert accuracy is not None
    # In percent, of as many images as there are.
    assert 100 * found["bayes_accuracy"]["accuracy"] == pytest.approx(float(accuracy[1]), abs=0.2)
    # Other processors and thread counts round sums differently.
    assert found["bits_per_dim"]["mean"] == pytest.approx(float(stated[1]), abs=2e-4)
    assert found["num_images"] == 10_000
