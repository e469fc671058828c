"""Random cases for the laws of sampling, and slow direct formulas that say what is right.

A case holds what a caller asks for. The formulas use whole passes of :mod:`model.flow` and scalar arithmetic
and share nothing with :mod:`model.sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from model.config import SamplingDefaults, SolverOptions
from model.flow import NO_CLASS, Block, Flow
from model.noise import latents
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Decoded, Sampler, Sampling
from tests.model.conftest import tiny_flow

DEEP_SHALLOW: dict[str, Any] = {
    "layers_per_block": (1, 1, 3),
    "conditioned_blocks": (2,),
    "scale_function": "softplus",
    "soft_clip": 1.5,
}
"""STARFlow's design: one deep block next to the noise, which alone sees the class, and another scale."""
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_classes": 0, "layers_per_block": 1},
    {"volume_preserving": True, "layers_per_block": 1},
    {"num_blocks": 2, "layers_per_block": (1, 3)},
    DEEP_SHALLOW,
    {"channels": 3, "image_size": 6},
    {"image_size": 4},
]
"""Shapes of tiny flows: 16, 9 and 4 patches."""
PLAIN = SamplingDefaults()
SEQUENTIAL = SolverOptions(solver="sequential")
ROUNDING = 1e-10
"""What float64 may differ by when the same is computed in another batch or in other pieces."""


def tough_flow(toughness: float, seed: int = 0, dtype: torch.dtype = torch.float64, **variant: Any) -> Flow:
    """A tiny flow of which every block depends ``toughness`` times as much on what came before."""
    flow = tiny_flow(seed, dtype, **variant)
    for block in flow.blocks:
        block.proj_out.weight.mul_(toughness)
    return flow


@dataclass(frozen=True)
class Case:
    """A flow, and one label, set of options and tolerance per latent."""

    flow: Flow
    latent_BTD: Tensor
    labels: list[int | None]
    options: list[SamplingDefaults]
    tolerances: list[float]

    def rows(self) -> Rows:
        return make_rows(self.latent_BTD, self.labels, self.options, self.tolerances)

    def label_tensor(self) -> Tensor:
        return torch.tensor([NO_CLASS if label is None else label for label in self.labels])


def noise(flow: Flow, seeds: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    return latents(seeds, flow.config.num_patches, flow.config.patch_dim).to(dtype)


def case_of(
    flow: Flow,
    options: Sequence[SamplingDefaults],
    tolerances: Sequence[float] | float = 1e-3,
    first_seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Rows with these options, of classes 0, 1, 2 and none in turn."""
    count = len(options)
    labels = [(0, 1, 2, None)[i % 4] if flow.config.num_classes else None for i in range(count)]
    each = [tolerances] * count if isinstance(tolerances, float) else list(tolerances)
    return Case(flow, noise(flow, range(first_seed, first_seed + count), dtype), labels, list(options), each)


def mixed_options(num_blocks: int) -> list[SamplingDefaults]:
    """Eight sets of options that differ in everything: rule, target, schedule, window, temperature."""
    last = (num_blocks - 1, num_blocks)
    return [
        PLAIN,
        SamplingDefaults(guidance_scale=1.5),
        SamplingDefaults(guidance_scale=2, guidance_schedule="linear", guidance_window=(0, 1)),
        SamplingDefaults(guidance_scale=1, attention_temperature=0.5),
        SamplingDefaults(guidance_scale=1, guidance_target="shift", guidance_schedule="cosine"),
        SamplingDefaults(guidance_scale=3, guidance_rule="closed_form", attention_temperature=1.4),
        SamplingDefaults(guidance_scale=1, guidance_target="scale", guidance_window=last),
        SamplingDefaults(guidance_scale=2, guidance_rule="closed_form", guidance_schedule="linear"),
    ]


@st.composite
def guidances(draw: st.DrawFn, num_blocks: int) -> SamplingDefaults:
    """Any rule, schedule, window, weight and temperature."""
    rule, target = draw(
        st.sampled_from([("linear", "both"), ("linear", "scale"), ("linear", "shift"), ("closed_form", "both")])
    )
    start = draw(st.integers(0, num_blocks - 1))
    window = draw(st.none() | st.integers(start + 1, num_blocks).map(lambda stop: (start, stop)))
    return SamplingDefaults(
        guidance_scale=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        guidance_rule=rule,
        guidance_target=target,
        guidance_schedule=draw(st.sampled_from(["constant", "linear", "cosine"])),
        guidance_window=window,
        attention_temperature=draw(st.sampled_from([1.0, 0.6, 1.5])),
    )


@st.composite
def cases(draw: st.DrawFn, tolerances: Sequence[float], most_rows: int = 5) -> Case:
    """Rows of anything, on any tiny flow."""
    flow = tough_flow(draw(st.sampled_from([1.0, 2.0])), draw(st.integers(0, 99)), **draw(st.sampled_from(VARIANTS)))
    count = draw(st.integers(1, most_rows))

    def one_each(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=count, max_size=count))

    labels = [None] * count
    if flow.config.num_classes:
        labels = one_each(st.none() | st.integers(0, flow.config.num_classes - 1))
    return Case(
        flow,
        noise(flow, one_each(st.integers(0, 999))),
        labels,
        one_each(guidances(flow.config.num_blocks)),
        one_each(st.sampled_from(tolerances)),
    )


@st.composite
def plans(draw: st.DrawFn, flow: Flow, gain: float = 4.0) -> Plan:
    """Any segment and start for each block; few segments divide the sequence."""
    block = st.builds(
        BlockPlan,
        segment=st.integers(1, flow.config.num_patches + 1),
        guess=st.sampled_from(["latent", "zeros"]),
    )
    blocks = draw(st.lists(block, min_size=flow.config.num_blocks, max_size=flow.config.num_blocks))
    return Plan(blocks=tuple(blocks), gain=gain)


def whole_plan(flow: Flow, gain: float = 4.0) -> Plan:
    """Every block as one sequence."""
    return Plan(blocks=(BlockPlan(segment=flow.config.num_patches - 1),) * flow.config.num_blocks, gain=gain)


def sequential(case: Case) -> Tensor:
    """The images by sequential decoding."""
    return finish(Sampler(case.flow).decode(case.rows(), SEQUENTIAL)).x_BTD


def decode(
    case: Case, plan: Plan | None = None, options: SolverOptions | None = None, rows_per_pass: int = 8
) -> Decoded:
    """The rows by a plan, with their trajectory."""
    sampler = Sampler(case.flow, rows_per_pass=rows_per_pass)
    return finish(sampler.decode(case.rows(), options or SolverOptions(), plan=plan, trajectory=True))


def run_dropping(slices: Sampling, num_rows: int, drops: dict[int, Sequence[int]]) -> tuple[Decoded, list[int]]:
    """Run to the end, sending after the given numbers of slices the indices to keep; and which rows stayed.

    Work may end before some of these slices, since rows that leave take their iterations along.
    """
    number, keep, kept = 0, None, list(range(num_rows))
    while True:
        try:
            slices.send(keep)
        except StopIteration as stop:
            return stop.value, kept
        number += 1
        keep = None
        if number in drops:
            kept = [kept[i] for i in drops[number]]
            keep = torch.tensor(drops[number], dtype=torch.long)


def distance(a: Tensor, b: Tensor) -> float:
    """max|a − b|, where both have the same shape; nan if any of it is."""
    assert a.shape == b.shape
    return float((a - b).abs().amax()) if a.numel() else 0.0


def patch_weight(options: SamplingDefaults, k: int, num_patches: int) -> float:
    """Weight of patch k of 0…T−1 in a block's own order (TarFlow, section 2.6; the cosine is ours)."""
    part = k / (num_patches - 1)
    ramp = {"constant": 1.0, "linear": part, "cosine": (1 - math.cos(math.pi * part)) / 2}
    return options.guidance_scale * ramp[options.guidance_schedule]


def guide_scalar(
    options: SamplingDefaults, w: float, alpha: float, mu: float, other_alpha: float, other_mu: float
) -> tuple[float, float]:
    """Guided α and μ of one value, by the formulas of the papers."""
    if options.guidance_rule == "linear":
        if options.guidance_target != "shift":
            alpha = alpha + w * (alpha - other_alpha)
        if options.guidance_target != "scale":
            mu = mu + w * (mu - other_mu)
        return alpha, mu
    sigma, other_sigma = math.exp(alpha), math.exp(other_alpha)
    s = min(sigma / other_sigma, 1) ** 2
    divisor = 1 + w - w * s
    return math.log(sigma / math.sqrt(divisor)), ((1 + w) * mu - w * s * other_mu) / divisor


def direct_affine(
    case: Case, block: Block, number: int, x_BTD: Tensor, patches: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Guided α and μ (B, T, D) of some patches of sequences in block order, one value after another."""
    tau = torch.tensor([o.attention_temperature for o in case.options], dtype=x_BTD.dtype)
    own = block.affine(x_BTD, case.label_tensor())
    other = block.affine(x_BTD, torch.full_like(case.label_tensor(), NO_CLASS), (1 / tau).view(-1, 1, 1, 1))
    # Plain numbers: (4, B, patches, D).
    values = torch.stack([*own, *other])[:, :, list(patches)].tolist()
    guided = torch.stack(own)
    for row, options in enumerate(case.options):
        start, stop = options.guidance_window or (0, len(case.flow.blocks))
        if not start <= number < stop:
            continue
        for place, k in enumerate(patches):
            w = patch_weight(options, k, x_BTD.shape[1])
            each = zip(*(values[i][row][place] for i in range(4)), strict=True)
            pairs = [guide_scalar(options, w, *numbers) for numbers in each]
            guided[:, row, k] = torch.tensor(pairs, dtype=x_BTD.dtype).t()
    return guided[0], guided[1]


def direct_decode(case: Case) -> Tensor:
    """Images in image order by the published loop: an uncached pass for every patch of every block."""
    x_BTD = case.latent_BTD * case.flow.prior_variance.sqrt()
    for number, block in enumerate(reversed(case.flow.blocks)):
        z_BTD = block.in_block_order(x_BTD)
        x_BTD = z_BTD.clone()
        for k in range(1, x_BTD.shape[1]):
            alpha, mu = direct_affine(case, block, number, x_BTD, [k])
            x_BTD[:, k] = z_BTD[:, k] * alpha[:, k].exp() + mu[:, k]
        x_BTD = block.in_block_order(x_BTD)
    return x_BTD


def direct_backward_error(case: Case, x_BTD: Tensor) -> Tensor:
    """max|u' − u| (B,) of images in image order."""
    for place, block in enumerate(case.flow.blocks):
        x_BTD = block.in_block_order(x_BTD)
        number = len(case.flow.blocks) - 1 - place
        alpha, mu = direct_affine(case, block, number, x_BTD, range(x_BTD.shape[1]))
        x_BTD = block.in_block_order((x_BTD - mu) * (-alpha).exp())
    return (x_BTD / case.flow.prior_variance.sqrt() - case.latent_BTD).abs().amax(dim=(1, 2))
