"""The bundled model's card says what an evaluation finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model.bundle import BUNDLED, read_bundle
from training.cli import app

DATA = Path("/usr/share/datasets/fashion-mnist")
SECTIONS = ("## Model", "## Data", "## Training", "## Evaluation", "samples.png", "Hardware:", "Time in training")


def test_the_card_is_complete() -> None:
    card = read_bundle(BUNDLED / "fashion-mnist").card
    for section in SECTIONS:
        assert section in card
    assert re.search(r"Test bits/dim: \d\.\d{4} ± .* on 10,000 images", card)
    assert re.search(r"Train–test gap: [+-]\d\.\d{4}", card)


@pytest.mark.long
def test_the_card_gives_the_bits_per_dim_of_all_test_images() -> None:
    arguments = ["evaluate", "fashion-mnist", "--data", str(DATA), "--train-limit", "0", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)["evaluations"]
    stated = re.search(r"Test bits/dim: (\d\.\d+)", read_bundle(BUNDLED / "fashion-mnist").card)
    assert stated is not None
    # Other processors and thread counts round sums differently.
    assert found["bits_per_dim"]["mean"] == pytest.approx(float(stated[1]), abs=2e-4)
    assert found["num_images"] == 10_000
