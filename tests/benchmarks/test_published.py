"""The published samplers make the same images as our decode, and as each other when run to the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.models import random_flow
from benchmarks.published import Strategy, gs_jacobi, sample, selective_jacobi
from benchmarks.published.gs_jacobi import Guess
from benchmarks.published.strategy import choose_strategy, convergence_shares, initial_guesses
from model.config import FlowConfig, SamplingDefaults
from model.flow import NO_CLASS, Flow
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler

LABELS = [0, None, 2]


def small_flow(num_classes: int, volume_preserving: bool) -> Flow:
    """Three blocks, 16 patches of 4 values, float64."""
    config = FlowConfig(
        image_size=8,
        channels=1,
        patch_size=2,
        width=16,
        num_blocks=3,
        layers_per_block=(2, 1, 2),
        num_classes=num_classes,
        volume_preserving=volume_preserving,
        head_dim=8,
    )
    flow = random_flow(config).double()
    for block in flow.blocks:
        # New positions and classes are almost zero; here they have to matter.
        block.position.mul_(30)
        if block.class_embedding is not None:
            block.class_embedding.mul_(30)
    flow.prior_variance.mul_(torch.linspace(0.5, 2, 16).double().unsqueeze(1) if volume_preserving else 1)
    return flow


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        SamplingDefaults(),
        SamplingDefaults(guidance_scale=2),
        SamplingDefaults(guidance_scale=2, guidance_schedule="linear"),
        SamplingDefaults(guidance_scale=1, guidance_schedule="linear", attention_temperature=0.5),
    ],
    ids=["plain", "guided", "annealed", "tempered"],
)
def test_same_images(num_classes: int, volume_preserving: bool, options: SamplingDefaults) -> None:
    flow = small_flow(num_classes, volume_preserving)
    latent_BTD = latents(range(3), 16, 4).double()
    labels = LABELS if num_classes else [None] * 3
    y_B = torch.tensor([NO_CLASS if y is None else y for y in labels])
    is_linear = options.guidance_schedule == "linear"
    theirs = sample(flow, latent_BTD, y_B, options.guidance_scale, is_linear, options.attention_temperature)
    ours = finish(Sampler(flow).decode(make_rows(latent_BTD, labels, [options] * 3))).x_BTD
    assert (ours - latent_BTD).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 1e-10


Setting = tuple[float, bool, float]

SETTINGS: dict[str, Setting] = {
    "plain": (0.0, False, 1.0),
    "guided": (2.0, False, 1.0),
    "annealed": (2.0, True, 1.0),
    "tempered": (1.0, True, 0.5),
}


@pytest.fixture(params=list(SETTINGS.values()), ids=list(SETTINGS))
def setting(request: pytest.FixtureRequest) -> Setting:
    value: Setting = request.param
    return value


@pytest.fixture(params=[(0, False), (3, False), (3, True)], ids=lambda it: f"classes{it[0]}-vp{it[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Flow, Tensor, Tensor]:
    num_classes, volume_preserving = request.param
    y_B = torch.tensor([NO_CLASS if y is None or not num_classes else y for y in LABELS])
    return small_flow(num_classes, volume_preserving), latents(range(3), 16, 4).double(), y_B


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_selective_jacobi_converges_to_the_loop(case: tuple[Flow, Tensor, Tensor], setting: Setting) -> None:
    x_BTD, passes = selective_jacobi(*case, *setting, tolerance=1e-12)
    assert difference(x_BTD, sample(*case, *setting)) < 1e-10
    assert passes[0] == 15
    assert max(passes) <= 15


@pytest.mark.parametrize("segments", [(4, 1, 0), (0, 15, 2), (1, 3, 99)], ids=str)
def test_gs_jacobi_converges_to_the_loop(
    case: tuple[Flow, Tensor, Tensor], setting: Setting, segments: tuple[int, ...]
) -> None:
    strategy = Strategy(segments=segments, guesses=["latent", "zeros", "zeros"])
    x_BTD, iterations = gs_jacobi(*case, *setting, strategy, 1e-13)
    assert difference(x_BTD, sample(*case, *setting)) < 1e-10
    assert max(iterations) <= 15


def test_without_tolerance_the_last_possible_pass_is_exact(case: tuple[Flow, Tensor, Tensor]) -> None:
    setting = SETTINGS["annealed"]
    exact_BTD = sample(*case, *setting)
    x_BTD, passes = selective_jacobi(*case, *setting, tolerance=0)
    assert difference(x_BTD, exact_BTD) < 1e-10
    assert passes == [15] * 3
    guesses: list[Guess] = ["zeros", "latent", "zeros"]
    x_BTD, iterations = gs_jacobi(*case, *setting, Strategy(segments=[1, 4, 15], guesses=guesses), -1)
    assert difference(x_BTD, exact_BTD) < 1e-10
    assert iterations == [15] * 3


def test_no_classes_may_be_left_out(case: tuple[Flow, Tensor, Tensor]) -> None:
    flow, latent_BTD, _ = case
    exact_BTD = sample(flow, latent_BTD)
    assert difference(selective_jacobi(flow, latent_BTD, tolerance=0)[0], exact_BTD) < 1e-10
    strategy = Strategy(segments=[2] * 3, guesses=["zeros"] * 3)
    assert difference(gs_jacobi(flow, latent_BTD, None, 0.0, False, 1.0, strategy, 0)[0], exact_BTD) < 1e-10


def test_a_looser_tolerance_takes_fewer_passes() -> None:
    flow, latent_BTD = small_flow(0, False), latents(range(3), 16, 4).double()
    exact_BTD = sample(flow, latent_BTD)
    strategy = Strategy(segments=[3, 1, 1], guesses=["latent"] * 3)
    for method in (
        lambda tolerance: selective_jacobi(flow, latent_BTD, tolerance=tolerance),
        lambda tolerance: gs_jacobi(flow, latent_BTD, None, 0.0, False, 1.0, strategy, tolerance),
    ):
        results = [method(tolerance) for tolerance in (1e-1, 1e-3, 1e-6)]
        totals = [sum(passes) for _, passes in results]
        assert totals == sorted(set(totals))
        differences = [difference(x_BTD, exact_BTD) for x_BTD, _ in results]
        assert differences == sorted(differences, reverse=True)
        assert differences[0] > 1e-4


def test_limits_on_iterations_end_each_segment() -> None:
    flow, latent_BTD = small_flow(0, False), latents(range(3), 16, 4).double()
    strategy = Strategy(segments=[5, 1, 0], guesses=["zeros"] * 3, max_iterations=[2, 4, 1])
    assert gs_jacobi(flow, latent_BTD, None, 0.0, False, 1.0, strategy, 0)[1] == [10, 4, 15]


def test_clamping_is_a_choice() -> None:
    flow, latent_BTD = small_flow(0, False), 3 * latents(range(3), 16, 4).double()
    exact_BTD = sample(flow, latent_BTD)
    assert exact_BTD.abs().max() > 3
    for clamp, is_exact in ((None, True), (100.0, True), (3.0, False)):
        strategy = Strategy(segments=[2, 1, 1], guesses=["latent"] * 3, clamp=clamp)
        x_BTD, _ = gs_jacobi(flow, latent_BTD, None, 0.0, False, 1.0, strategy, 0)
        assert (difference(x_BTD, exact_BTD) < 1e-10) == is_exact


def test_the_tough_block_is_the_one_with_heavy_weights(case: tuple[Flow, Tensor, Tensor]) -> None:
    flow, latent_BTD, y_B = case
    flow.blocks[1].proj_out.weight.mul_(20)
    x_BTD = sample(flow, latent_BTD, y_B)
    shares = convergence_shares(flow, x_BTD, y_B)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) == shares[1]
    strategy = choose_strategy(flow, x_BTD, y_B, segments=5, iterations=(7, 2))
    assert (strategy.segments, strategy.max_iterations) == ([1, 5, 1], [2, 7, 2])


def test_the_initial_guess_is_the_nearer_one() -> None:
    """A block that changes little had best begin at its z, and one that shrinks all patches at zeros."""
    flow = small_flow(0, False)
    flow.blocks[1].proj_out.bias[:4] = -6
    x_BTD = sample(flow, latents(range(3), 16, 4).double())
    assert initial_guesses(flow, x_BTD, None) == ["latent", "zeros", "latent"]
