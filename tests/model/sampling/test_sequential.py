"""Sequential decoding: the inverse of the forward pass, guided or not, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import SamplingDefaults
from model.flow import NO_CLASS, Block, Flow
from model.likelihood import encode
from model.noise import latents
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Sampler, Sampling
from tests.model.sampling.cases import DEEP_SHALLOW

MakeFlow = Callable[..., Flow]
PLAIN = SamplingDefaults()
OPTIONS = [
    PLAIN,
    SamplingDefaults(guidance_scale=1.5),
    SamplingDefaults(guidance_scale=2, guidance_schedule="linear"),
    SamplingDefaults(guidance_scale=1, attention_temperature=0.5),
    SamplingDefaults(guidance_scale=0.5, attention_temperature=1.7, guidance_schedule="linear"),
    SamplingDefaults(guidance_scale=1, guidance_target="shift"),
    SamplingDefaults(guidance_scale=1, guidance_target="scale"),
]
LABELS: list[int | None] = [0, 1, 2, None]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_blocks": 2, "layers_per_block": (1, 3)},
    DEEP_SHALLOW,
    {"num_classes": 0},
    {"volume_preserving": True},
    {"channels": 3, "image_size": 4},
]


def decode(flow: Flow, rows: Rows) -> Sampling:
    return Sampler(flow).decode(rows)


def mixed_rows(flow: Flow, count: int, first_seed: int = 0, dtype: torch.dtype = torch.float64) -> Rows:
    """Rows that differ in latent, class, guidance, schedule and temperature."""
    config = flow.config
    seeds = range(first_seed, first_seed + count)
    latent_BTD = latents(seeds, config.num_patches, config.patch_dim).to(dtype)
    labels = [LABELS[i % len(LABELS)] if config.num_classes else None for i in seeds]
    return make_rows(latent_BTD, labels, [OPTIONS[i % len(OPTIONS)] for i in seeds])


def direct_block_inverse(block: Block, z_BTD: Tensor, row: Rows, index: int) -> Tensor:
    """One row through one block by the published formula: whole uncached passes, patch after patch."""
    num_patches = z_BTD.shape[1]
    z_BTD = z_BTD.flip(1) if block.reverse else z_BTD
    x_BTD = z_BTD.clone()
    label, w, tau = row.label_B[index : index + 1], row.scale_B[index].item(), row.temperature_B[index].item()
    for k in range(1, num_patches):
        alpha, mu = block.affine(x_BTD, label)
        tempered = torch.full((1, 1, 1, 1), 1 / tau, dtype=z_BTD.dtype)
        other_alpha, other_mu = block.affine(x_BTD, torch.full_like(label, NO_CLASS), tempered)
        weight = w * (k / (num_patches - 1) if row.schedule_B[index] == 1 else 1)
        if row.target_B2[index, 0]:
            alpha = alpha + weight * (alpha - other_alpha)
        if row.target_B2[index, 1]:
            mu = mu + weight * (mu - other_mu)
        x_BTD[:, k] = z_BTD[:, k] * torch.exp(alpha[:, k]) + mu[:, k]
    return x_BTD.flip(1) if block.reverse else x_BTD


def direct_decode(flow: Flow, rows: Rows) -> Tensor:
    decoded = []
    for index in range(len(rows)):
        x_BTD = rows.latent_BTD[index : index + 1] * flow.prior_variance.sqrt()
        for block in reversed(flow.blocks):
            x_BTD = direct_block_inverse(block, x_BTD, rows, index)
        decoded.append(x_BTD)
    return torch.cat(decoded)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_decode_inverts_encode(make_flow: MakeFlow, variant: dict[str, Any]) -> None:
    flow = make_flow(**variant)
    config = flow.config
    x_BTD = latents(range(4), config.num_patches, config.patch_dim).double()
    labels: list[int | None] = LABELS if config.num_classes else [None] * 4
    y = torch.tensor([NO_CLASS if label is None else label for label in labels])
    u_BTD, _ = encode(flow, x_BTD, y)
    assert (u_BTD - x_BTD).abs().max() > 0.1
    back = finish(decode(flow, make_rows(u_BTD, labels, [PLAIN] * 4))).x_BTD
    assert back.dtype == torch.float64
    assert (back - x_BTD).abs().max() < 1e-9
    again, _ = encode(flow, back, y)
    assert (again - u_BTD).abs().max() < 1e-9


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_cached_decode_is_the_uncached_inverse(make_flow: MakeFlow, variant: dict[str, Any]) -> None:
    flow = make_flow(**variant)
    rows = mixed_rows(flow, 14)
    assert (finish(decode(flow, rows)).x_BTD - direct_decode(flow, rows)).abs().max() < 1e-9


def test_unguided_decode_is_the_fixed_point_of_parallel_passes(make_flow: MakeFlow) -> None:
    """x ← z·exp(α(x)) + μ(x) over the whole sequence is exact after T−1 passes."""
    flow = make_flow()
    rows = make_rows(latents([5], 16, 4).double(), [1], [PLAIN])
    x_BTD = rows.latent_BTD
    for block in reversed(flow.blocks):
        z_BTD = block.in_block_order(x_BTD)
        x_BTD = z_BTD
        for _ in range(flow.config.num_patches - 1):
            alpha, mu = block.affine(x_BTD, rows.label_B)
            x_BTD = z_BTD * alpha.exp() + mu
        x_BTD = block.in_block_order(x_BTD)
    assert (finish(decode(flow, rows)).x_BTD - x_BTD).abs().max() < 1e-9


def test_every_option_changes_the_image(make_flow: MakeFlow) -> None:
    flow = make_flow()
    latent_BTD = latents([3] * len(OPTIONS), 16, 4).double()
    decoded = finish(decode(flow, make_rows(latent_BTD, [1] * len(OPTIONS), OPTIONS))).x_BTD
    distance = torch.cdist(decoded.flatten(1), decoded.flatten(1))
    assert (distance + torch.eye(len(OPTIONS)) > 1e-3).all()


def test_guidance_without_a_difference_changes_nothing(make_flow: MakeFlow) -> None:
    """Guidance of no class by no class at temperature 1 takes no second pass."""
    flow = make_flow()
    latent_BTD = latents([3, 3], 16, 4).double()
    rows = make_rows(latent_BTD, [None, None], [PLAIN, SamplingDefaults(guidance_scale=3)])
    assert len(rows.guided(0, flow.blocks[-1])) == 0
    decoded = finish(decode(flow, rows)).x_BTD
    assert torch.equal(decoded[0], decoded[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_its_batch_mates(make_flow: MakeFlow, dtype: torch.dtype) -> None:
    flow = make_flow(dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for special in range(len(OPTIONS)):
        alone = mixed_rows(flow, 1, special, dtype)
        expected = finish(decode(flow, alone)).x_BTD
        for size, place in ((7, 3), (32, 0), (32, 31)):
            others = mixed_rows(flow, size, 1000 + special, dtype)
            batch = Rows(**{name: value.clone() for name, value in vars(others).items()})
            for name, value in vars(batch).items():
                value[place] = getattr(alone, name)[0]
            assert (finish(decode(flow, batch)).x_BTD[place] - expected[0]).abs().max() < tolerance


def decode_dropping(flow: Flow, rows: Rows, drops: dict[int, Sequence[int]]) -> Tensor:
    """Decode, sending at the given slice numbers the indices to keep."""
    slices = decode(flow, rows)
    try:
        next(slices)
        for number in range(10_000):
            slices.send(torch.tensor(drops[number], dtype=torch.long) if number in drops else None)
    except StopIteration as stop:
        return stop.value.x_BTD
    raise AssertionError("the sampler does not end")


@pytest.mark.parametrize(
    ("drops", "kept"),
    [
        ({3: [0, 2, 5, 6]}, [0, 2, 5, 6]),
        ({0: [1, 3]}, [1, 3]),
        ({15: [1, 3]}, [1, 3]),
        ({14: [4]}, [4]),
        ({13: [4, 5]}, [4, 5]),
        ({2: [0]}, [0]),
        ({2: [7, 0]}, [7, 0]),
        ({5: [6, 1, 4, 3]}, [6, 1, 4, 3]),
        ({5: [6, 5, 4, 3, 2, 1, 0], 20: [6, 1, 3], 40: [1, 0]}, [5, 0]),
    ],
    ids=str,
)
def test_rows_that_stay_are_as_without_drops(
    make_flow: MakeFlow, drops: dict[int, Sequence[int]], kept: list[int]
) -> None:
    """Row 0 and 7 are plain, 3 and 7 have no class: subsets of guided rows, and other orders too."""
    flow = make_flow()
    rows = mixed_rows(flow, 8)
    whole = finish(decode(flow, rows)).x_BTD
    survivors = decode_dropping(flow, rows, drops)
    assert survivors.shape == whole[kept].shape
    assert (survivors - whole[kept]).abs().max() < 1e-10


def test_all_rows_may_leave(make_flow: MakeFlow) -> None:
    flow = make_flow()
    assert decode_dropping(flow, mixed_rows(flow, 3), {4: []}).shape == (0, 16, 4)


def test_progress_is_bounded_slices_up_to_one(make_flow: MakeFlow) -> None:
    flow = make_flow()
    progress = list(decode(flow, mixed_rows(flow, 2)))
    fractions = [step.fraction for step in progress]
    assert len(progress) == 3 * 15
    assert fractions == sorted(set(fractions))
    assert fractions[-1] == 1
    assert [step.block for step in progress[::15]] == [0, 1, 2]


@pytest.mark.parametrize("mode", [True, False])
def test_grad_mode_is_the_callers_between_slices(make_flow: MakeFlow, mode: bool) -> None:
    slices = decode(make_flow().requires_grad_(True), mixed_rows(make_flow(), 2))
    with torch.set_grad_enabled(mode):
        for _ in range(20):
            next(slices)
            assert torch.is_grad_enabled() is mode
        assert not finish(slices).x_BTD.requires_grad


def test_decoding_leaves_its_inputs_alone(make_flow: MakeFlow) -> None:
    flow = make_flow()
    rows = mixed_rows(flow, 4)
    before = {name: value.clone() for name, value in vars(rows).items()}
    finish(decode(flow, rows))
    assert all(torch.equal(before[name], value) for name, value in vars(rows).items())


def test_two_samplers_of_one_flow_may_be_in_flight(make_flow: MakeFlow) -> None:
    """The cache belongs to the sampler, not to the model."""
    flow = make_flow()
    first, second = mixed_rows(flow, 2), mixed_rows(flow, 3, 50)
    expected = finish(decode(flow, first)).x_BTD, finish(decode(flow, second)).x_BTD
    a, b = decode(flow, first), decode(flow, second)
    for _ in range(30):
        next(a)
        next(b)
    assert torch.equal(finish(b).x_BTD, expected[1])
    assert torch.equal(finish(a).x_BTD, expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_weights_decode_to_float32(make_flow: MakeFlow, dtype: torch.dtype) -> None:
    flow = make_flow(dtype=torch.bfloat16)
    decoded = finish(decode(flow, mixed_rows(flow, 2, dtype=dtype))).x_BTD
    assert decoded.dtype == torch.float32
    exact = finish(decode(make_flow(), mixed_rows(make_flow(), 2))).x_BTD
    assert (decoded - exact).square().mean() < 0.01
