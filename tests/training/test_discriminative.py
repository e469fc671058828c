"""The discriminative term: exact with every wrong class, right on average with some, and off unless it is asked for."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from model.bayes import posterior
from model.bundle import read_bundle
from model.config import FlowConfig, NoiseProtocol
from model.flow import NO_CLASS, Flow
from model.likelihood import log_likelihood
from training.baselines.direct import DirectFlow
from training.config import TrainConfig
from training.data import Images
from training.discriminative import WrongClasses, draw_wrong_classes, inclusion_probabilities
from training.log import read_log
from training.run import Origin, Run
from training.trainer import StepReport, Trainer

CPU = torch.device("cpu")
CLASSES = 5
CONFIG = FlowConfig(
    image_size=8, channels=1, patch_size=4, width=16, num_blocks=2, layers_per_block=1, head_dim=8, num_classes=CLASSES
)
PRIOR = (0.1, 0.3, 0.2, 0.25, 0.15)
LABELS = torch.tensor([3, NO_CLASS, 0, 4, 0])
LABELLED = torch.tensor([0, 2, 3, 4])


@pytest.fixture
def flow() -> Flow:
    """A flow whose classes matter, in double precision."""
    torch.manual_seed(1)
    flow = Flow(CONFIG).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow


@pytest.fixture
def patches() -> Tensor:
    """One image for each of the labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LABELS), 4, 16, generator=generator, dtype=torch.float64)


def label_nats(flow: Flow, patches: Tensor, wrong: WrongClasses) -> Tensor:
    nats_R = log_likelihood(flow, *wrong.beside(patches, LABELS))
    return wrong.label_nats(nats_R, LABELS, torch.tensor(PRIOR, dtype=torch.float64).log())


def every_class(flow: Flow, patches: Tensor) -> Tensor:
    """log p(x | y) of the images that have a label, (L, Y), one class after the other."""
    x_LTD = patches[LABELLED]
    passes = [log_likelihood(flow, x_LTD, torch.full((len(x_LTD),), y)) for y in range(CLASSES)]
    return torch.stack(passes, dim=1)


def test_with_every_wrong_class_it_is_the_posterior_and_so_is_its_gradient(flow: Flow, patches: Tensor) -> None:
    wrong = draw_wrong_classes(flow, LABELS, CLASSES - 1, torch.rand(len(LABELS)))
    nats_L = label_nats(flow, patches, wrong)
    exact_LY = every_class(flow, patches)
    served = posterior(exact_LY.detach().unsqueeze(0), PRIOR, NoiseProtocol(kind="gaussian", std=0.1)).probability_BY
    label_L1 = LABELS[LABELLED, None]
    torch.testing.assert_close((-nats_L).exp(), served.gather(1, label_L1).squeeze(1))
    exact_L = -(exact_LY + torch.tensor(PRIOR).log()).log_softmax(dim=1).gather(1, label_L1).squeeze(1)
    ours, theirs = (torch.autograd.grad(nats.mean(), list(flow.parameters())) for nats in (nats_L, exact_L))
    for mine, brute_force in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, brute_force, rtol=1e-6, atol=1e-9)
        assert bool((brute_force != 0).any())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_some_the_denominator_is_right_on_average(flow: Flow, patches: Tensor, count: int) -> None:
    steps = 500
    total_L = torch.zeros(len(LABELLED), dtype=torch.float64)
    # Flattened, so that every class has its share of the sum, which is 1: the drawn ones must make up for the others.
    joint_LY = every_class(flow, patches).detach() + torch.tensor(PRIOR, dtype=torch.float64).log()
    exact_LY = joint_LY.div(50).log_softmax(dim=1)
    own_L = exact_LY.gather(1, LABELS[LABELLED, None]).squeeze(1)
    for step in range(steps):
        # Chances on a grid: what is left of the average's error is that of a step function's integral.
        wrong = draw_wrong_classes(flow, LABELS, count, torch.full((len(LABELS),), (step + 0.5) / steps))
        others_LK = exact_LY.gather(1, wrong.label_LK) + wrong.log_weight_LK
        total_L += own_L.exp() + others_LK.exp().sum(dim=1)
    assert (total_L / steps).tolist() == pytest.approx([1.0] * len(LABELLED), abs=0.02)


@given(
    likeness=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=8),
    count=st.integers(1, 8),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_inclusion_is_in_proportion_up_to_certainty(likeness: list[float], count: int, chance: float) -> None:
    count = min(count, len(likeness))
    pi_O = inclusion_probabilities(torch.tensor([likeness], dtype=torch.float64), count)[0]
    assert float(pi_O.sum()) == pytest.approx(count)
    assert bool((pi_O > 0).all())
    assert bool((pi_O <= 1).all())
    ratios = [float(pi) / value for pi, value in zip(pi_O, likeness, strict=True) if pi < 1 - 1e-9]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else count == len(likeness)
    # The certain ones are the likest.
    if ratios:
        assert all(value * ratios[0] >= 1 - 1e-6 for pi, value in zip(pi_O, likeness, strict=True) if pi >= 1)


@pytest.mark.parametrize("count", range(1, CLASSES))
def test_wrong_classes_are_wrong_and_different_and_the_likest_most_often(flow: Flow, count: int) -> None:
    with torch.no_grad():
        for block in flow.blocks:
            assert block.class_embedding is not None
            # Classes 0 and 4 are nearly the same.
            block.class_embedding[4] = block.class_embedding[0] + 0.01
    labels = torch.arange(CLASSES).repeat_interleave(1000)
    chances = (torch.arange(1000) + 0.5).div(1000).repeat(CLASSES)
    wrong = draw_wrong_classes(flow, labels, count, chances)
    assert wrong.label_LK.shape == (len(labels), count)
    assert bool((wrong.label_LK != labels.unsqueeze(1)).all())
    assert all(len(set(row)) == count for row in wrong.label_LK.tolist())
    for label, twin in ((0, 4), (4, 0)):
        drawn = (wrong.label_LK[labels == label] == twin).any(dim=1).double().mean()
        assert float(drawn) > 0.99


def test_flows_that_have_not_learned_classes_draw_them_evenly() -> None:
    flow = Flow(CONFIG)
    with torch.no_grad():
        for block in flow.blocks:
            assert block.class_embedding is not None
            block.class_embedding.zero_()
    wrong = draw_wrong_classes(flow, LABELS, 2, torch.rand(len(LABELS)))
    torch.testing.assert_close(wrong.log_weight_LK.exp(), torch.full((len(LABELLED), 2), 2.0, dtype=torch.float64))


def hybrid(config: TrainConfig, **changes: object) -> TrainConfig:
    return config.with_overrides(discriminative_weight=50.0, wrong_classes=1, **changes)


def train(config: TrainConfig, images: Images, out: Path, stops: tuple[int | None, ...] = (None,)) -> list[StepReport]:
    """A run that is stopped and continued at ``stops``."""
    reports: list[StepReport] = []
    for stop_at in stops:
        trainer = Trainer(config, images, out, CPU)

        def observe(report: StepReport, trainer: Trainer = trainer, stop_at: int | None = stop_at) -> None:
            reports.append(report)
            trainer.stop_requested = report.step == stop_at

        trainer.run(observe)
    return reports


def figures(reports: list[StepReport]) -> list[tuple[float, float, float | None]]:
    return [(report.loss, report.bits_per_dim, report.label_nats) for report in reports]


def test_it_is_learned_and_continues_exactly(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    config = hybrid(config, epochs=6)
    reports = train(config, images, tmp_path / "straight")
    nats = [report.label_nats for report in reports]
    assert all(value is not None for value in nats)
    assert sum(nats[-5:]) < 0.2 * sum(nats[:5])  # type: ignore[arg-type]
    assert figures(train(config, images, tmp_path / "resumed", (7, 10, None))) == figures(reports)


def test_parts_of_a_batch_give_the_same_curve(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    # Half of the labels are dropped: parts have different numbers of labelled images, or none.
    config = hybrid(config, label_drop=0.5, learning_rate=1e-3)
    straight = figures(train(config, images, tmp_path / "whole"))
    parts = figures(train(config.with_overrides(accumulation=4), images, tmp_path / "parts"))
    for ours, theirs in zip(parts, straight, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_baseline_has_no_blocks_to_draw_by(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    out, allowed = tmp_path / "run", "optimization.discriminative_weight: got 50.0, allowed is 0 for DirectFlow, which"
    with pytest.raises(ValueError, match=allowed):
        Trainer(hybrid(config), images, out, CPU, DirectFlow)
    assert not out.exists()


def test_without_a_weight_the_loss_is_the_published_one(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    plain = train(config, images, tmp_path / "plain")
    assert figures(train(config.with_overrides(wrong_classes=1), images, tmp_path / "other")) == figures(plain)
    assert {report.label_nats for report in plain} == {None}
    assert figures(train(hybrid(config), images, tmp_path / "hybrid"))[1:] != figures(plain)[1:]


def test_a_batch_may_have_lost_all_its_labels(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    reports = train(hybrid(config, batch_size=1, epochs=1, label_drop=0.9), images, tmp_path)
    assert 0.0 in {report.label_nats for report in reports}
    assert reports[-1].skipped_steps == 0


def test_the_log_and_the_card_have_it_where_it_is_trained(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    origin, console = Origin(command="tarflow train", data_name="squares"), Console(file=io.StringIO())
    for name, made in (("hybrid", hybrid(config)), ("plain", config)):
        out = tmp_path / name
        Run(replace(made, class_names=("0", "1")), images, out, CPU, origin=origin, console=console).execute()
        assert all(("label_nats" in line) is (name == "hybrid") for line in read_log(out))
        loss = "- Loss: −log p(x | y) − 50·log p(y | x), the posterior estimated with 1 wrong class an image"
        bundle = read_bundle(out / "bundle")
        assert (loss in bundle.card) is (name == "hybrid")
        # Where it is not, the configuration is what it was before there was such a loss, and so is the model's id.
        assert ("discriminative_weight" in bundle.config.training["optimization"]) is (name == "hybrid")


def test_more_wrong_classes_than_there_are_means_all(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    few = train(hybrid(config), images, tmp_path / "few")
    many = train(hybrid(config).with_overrides(wrong_classes=9), images, tmp_path / "many")
    assert figures(many) == figures(few)
    origin, console = Origin(command="tarflow train", data_name="squares"), Console(file=io.StringIO())
    for count in (1, 9):
        out, made = tmp_path / f"run-{count}", replace(hybrid(config), class_names=("0", "1"))
        made = made.with_overrides(wrong_classes=count)
        Run(made, images, out, CPU, origin=origin, console=console).execute()
        assert "estimated with 1 wrong class an image" in read_bundle(out / "bundle").card


def test_a_flow_without_classes_has_no_posterior(config: TrainConfig, images: Images, tmp_path: Path) -> None:
    config = replace(hybrid(config), flow=replace(config.flow, num_classes=0))
    with pytest.raises(ValueError, match=r"optimization.discriminative_weight: got 50.0, allowed is 0 for a flow with"):
        Trainer(config, images, tmp_path, CPU)
