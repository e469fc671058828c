"""Laws of the baselines: the inverse inverts, the log-determinant is that of the Jacobian, everything is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import FlowConfig, NoiseProtocol
from model.flow import NO_CLASS
from model.likelihood import log_likelihood
from training.baselines.channel_coupling import ChannelCouplingFlow
from training.baselines.coupling import (
    ActNorm,
    CouplingFlow,
    channel_half,
    checkerboard,
    coupling_builder,
    matched_width,
)
from training.baselines.direct import DirectFlow
from training.config import TrainConfig
from training.data import Images
from training.evaluate import score_images
from training.trainer import Trainer

CONFIG = FlowConfig(
    image_size=8, channels=1, patch_size=4, width=16, num_blocks=2, layers_per_block=1, head_dim=8, num_classes=3
)  # fmt: skip
COLOUR = FlowConfig(image_size=4, channels=3, patch_size=2, width=8, num_blocks=3, layers_per_block=1, head_dim=8)
VOLUME_PRESERVING = FlowConfig(
    image_size=8, channels=1, patch_size=4, width=16, num_blocks=2, layers_per_block=1, head_dim=8,
    volume_preserving=True,
)  # fmt: skip
FLOWS: dict[str, Callable[[], DirectFlow]] = {
    "channel": lambda: ChannelCouplingFlow(CONFIG),
    "channel colour": lambda: ChannelCouplingFlow(COLOUR),
    "channel volume preserving": lambda: ChannelCouplingFlow(VOLUME_PRESERVING),
    "convolutional": lambda: CouplingFlow(CONFIG, 8),
    "convolutional colour": lambda: CouplingFlow(COLOUR, 8),
}


def random_flow(name: str) -> DirectFlow:
    """A flow in float64 whose every weight matters."""
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow


def batch(flow: DirectFlow, count: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    config = flow.config
    x_BTD = torch.randn(count, config.num_patches, config.patch_dim, dtype=torch.float64)
    classes = torch.arange(count) - 1 if config.num_classes else None
    return x_BTD, classes


@pytest.mark.parametrize("name", FLOWS)
def test_the_inverse_inverts(name: str) -> None:
    flow = random_flow(name)
    x_BTD, y_B = batch(flow)
    z_BTD, _ = flow(x_BTD, y_B)
    assert not torch.allclose(z_BTD, x_BTD, atol=1e-2)
    torch.testing.assert_close(flow.inverse(z_BTD, y_B), x_BTD)


@pytest.mark.parametrize("name", FLOWS)
def test_the_log_determinant_is_that_of_the_jacobian(name: str) -> None:
    flow = random_flow(name)
    x_BTD, y_B = batch(flow, 1)
    _, logdet_B = flow(x_BTD, y_B)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, y_B)[0], x_BTD)
    dims = flow.config.num_dims
    assert float(logdet_B.detach()) == pytest.approx(float(torch.linalg.slogdet(jacobian.view(dims, dims)).logabsdet))
    if flow.config.volume_preserving:
        assert float(logdet_B.detach()) == 0


@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_is_learned(name: str) -> None:
    flow = random_flow(name)
    x_BTD, y_B = batch(flow)
    log_likelihood(flow, x_BTD, y_B).sum().backward()
    unused = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert unused == []


def test_classes_matter_and_no_class_is_their_mean() -> None:
    for name in ("channel", "convolutional"):
        flow = random_flow(name)
        x_BTD, _ = batch(flow)
        none = log_likelihood(flow, x_BTD)
        torch.testing.assert_close(log_likelihood(flow, x_BTD, torch.full((3,), NO_CLASS)), none)
        assert not torch.allclose(log_likelihood(flow, x_BTD, torch.full((3,), 1)), none)


def test_masks_are_halves_that_complement_each_other() -> None:
    for mask in (checkerboard, channel_half):
        even, odd = mask(4, 6, False), mask(4, 6, True)
        assert torch.equal(even + odd, torch.ones(4, 6, 6))
        assert even.mean() == 0.5
    assert (checkerboard(1, 4, False)[0, :, 1:] != checkerboard(1, 4, False)[0, :, :-1]).all()


def test_normalizations_start_from_the_data() -> None:
    flow = CouplingFlow(CONFIG, 8)
    x_BTD = 5 + 3 * torch.randn(64, CONFIG.num_patches, CONFIG.patch_dim)
    flow.initialize(x_BTD)
    z_BTD, _ = flow(x_BTD)
    assert z_BTD.mean().abs() < 0.01
    assert (z_BTD.std() - 1).abs() < 0.01
    assert sum(isinstance(module, ActNorm) for module in flow.modules()) > 4


def test_operations_are_counted_as_torch_counts_them() -> None:
    for config in (CONFIG, COLOUR):
        flow = CouplingFlow(config, 16)
        with FlopCounterMode(display=False) as counter:
            flow(torch.randn(1, config.num_patches, config.patch_dim))
        assert flow.flops_per_image == counter.get_total_flops()


def test_the_width_is_the_largest_that_the_operations_allow() -> None:
    least = CouplingFlow(CONFIG, 8).flops_per_image
    for flops in (least, 5 * least, 20 * least):
        width = matched_width(CONFIG, flops)
        assert CouplingFlow(CONFIG, width).flops_per_image <= flops < CouplingFlow(CONFIG, width + 8).flops_per_image
    assert matched_width(CONFIG, 1) == 8


def test_a_side_that_cannot_be_squeezed_is_refused() -> None:
    odd = FlowConfig(image_size=9, channels=1, patch_size=3, width=8, num_blocks=1, layers_per_block=1, head_dim=8)
    with pytest.raises(ValueError, match="image_size: got 9"):
        CouplingFlow(odd, 8)


@pytest.mark.parametrize("name", ["channel", "convolutional"])
def test_the_trainer_trains_them_and_continues(
    name: str, config: TrainConfig, images: Images, make_images: Callable[..., Images], tmp_path: Path
) -> None:
    noise = NoiseProtocol(kind="gaussian", std=0.1)

    def trainer() -> Trainer:
        build = ChannelCouplingFlow
        if name == "convolutional":
            flow = CouplingFlow(config.flow, 8)
            first = flow.patchify(torch.from_numpy(images.pixels).float() / 127.5 - 1)
            return Trainer(config, images, tmp_path, torch.device("cpu"), coupling_builder(8, first))
        return Trainer(config, images, tmp_path, torch.device("cpu"), build)

    fresh = make_images(20, seed=5)
    before = score_images(trainer().averaged_flow(), fresh, noise, conditional=True).mean()
    assert trainer().run(lambda report: None)
    finished = trainer()
    assert finished.step == finished.total_steps
    assert score_images(finished.averaged_flow(), fresh, noise, conditional=True).mean() < before - 0.1
