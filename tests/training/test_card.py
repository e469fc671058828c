"""The model card and its evaluation section."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.card import (
    RECOMMENDED,
    RunFacts,
    architecture,
    calibration_note,
    evaluation_section,
    render_card,
    with_calibration,
    with_evaluation,
)
from training.config import TrainConfig, load_preset

FACTS = RunFacts(
    command="tarflow train tiny --data squares --out run",
    data_name="squares",
    num_images=40,
    num_parameters=12_345,
    step=15,
    total_steps=15,
    images_seen=120,
    skipped_steps=0,
    seconds=3700.0,
    precision="bf16",
    hardware="A processor, 2 threads",
    torch_version="2.0",
    bits_per_dim=3.14159,
)


def test_a_card_says_what_a_person_asks(config: TrainConfig) -> None:
    card = render_card(replace(config, class_names=("left", "right")), FACTS)
    for text in (
        "# tiny",
        "class-conditional",
        "8x8 grey",
        "4-16-2-1",
        "12,345 parameters",
        "left, right",
        "Gaussian, σ = 0.1",
        "guidance 1 (constant)",
        "denoising on",
        "`squares`, 40 training images",
        "the last 4 images",
        FACTS.command,
        "AdamW",
        "120 images, 3.00 epochs",
        "A processor, 2 threads",
        "bf16 autocast",
        "1:01:40",
        "3.1416",
        "Not evaluated yet",
    ):
        assert text in card
    assert "not finished" not in card
    assert "skipped" not in card


def test_wide_embeddings_are_told_where_they_begin(config: TrainConfig) -> None:
    wide = replace(config, optimization=replace(config.optimization, embedding_std=1.0))
    told = "embeddings of standard deviation 1 at first"
    assert told in render_card(wide, FACTS)
    assert told not in render_card(config, FACTS)
    # A fine-tuned model's are those of the model that it began with.
    assert told not in render_card(wide, replace(FACTS, started_from={"name": "tiny", "model_id": "sha256:0"}))


def test_the_recipe_says_which_weights_muon_trains(config: TrainConfig) -> None:
    assert "Muon" not in render_card(config, FACTS)
    options = replace(config.optimization, optimizer="muon", learning_rate=1e-3, muon_learning_rate=2e-3)
    card = render_card(replace(config, optimization=options), FACTS)
    assert "learning rate 0.001 to 1e-06, Muon (0.95) for the matrices of the layers with 0.002 to 2e-06" in card


def test_an_unfinished_run_says_so(config: TrainConfig) -> None:
    card = render_card(config, replace(FACTS, total_steps=1500, skipped_steps=3, bits_per_dim=None))
    assert "15 of 1,500: not finished" in card
    assert "3 skipped as not finite" in card
    assert "Training bits/dim" not in card


def test_deep_shallow_architecture() -> None:
    flow = replace(load_preset("toy-28").flow, num_blocks=3, layers_per_block=(2, 2, 8))
    assert architecture(flow) == "4-128-3-(2,2,8)"


def test_the_card_names_what_differs_from_tarflow(config: TrainConfig) -> None:
    assert "STARFlow" not in render_card(config, FACTS)
    flow = replace(config.flow, conditioned_blocks=(1,), scale_function="softplus", soft_clip=4.0)
    card = render_card(replace(config, flow=flow), FACTS)
    assert "the class enters block 1 of 0 to 1 alone" in card
    assert "the scale is a softplus; scales and shifts are bound by 4" in card
    assert "class enters" not in render_card(replace(config, flow=replace(flow, num_classes=0)), FACTS)


def test_results_replace_earlier_results(config: TrainConfig) -> None:
    card = render_card(config, FACTS)
    assert evaluation_section(card) is None
    once = with_evaluation(card, "- first")
    twice = with_evaluation(once, "- second\n")
    assert evaluation_section(twice) == "- second"
    assert "first" not in twice
    assert with_evaluation(twice, "- first") == once


@pytest.mark.parametrize("card", ["", "# imported\n\nText.\n"])
def test_a_card_without_markers_gets_a_section(card: str) -> None:
    result = with_evaluation(card, "- figures")
    assert evaluation_section(result) == "- figures"
    assert result.startswith(card.rstrip())
    assert result.count("## Evaluation") == 1
    assert with_evaluation(result, "- figures") == result


def test_one_line_is_about_the_calibration(config: TrainConfig) -> None:
    card = render_card(config, FACTS)
    assert calibration_note(card) is None
    once = with_calibration(card, "some images")
    lines = once.split("\n")
    assert lines[lines.index("- Calibration of normal images: some images") - 1].startswith(RECOMMENDED)
    assert calibration_note(once) == "some images"
    assert with_calibration(once, "others") == with_calibration(card, "others")
    assert once.replace("- Calibration of normal images: some images\n", "") == card
    alone = "# other\n\n## Calibration\n\n- Calibration of normal images: some images\n"
    assert with_calibration("# other", "some images") == alone
    again = with_calibration(with_calibration("# other", "some images"), "others")
    assert again == with_calibration("# other", "others")
