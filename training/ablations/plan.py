"""What is trained, what is measured, and what the paper found: the studies as data.

Source of the orderings: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329), whose FIDs
are of 64×64 ImageNet; here only their order is compared. One study is of STARFlow's design (Gu et al., arXiv
2506.06276).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from model.config import FlowConfig, NoiseProtocol, SamplingDefaults, check
from training.config import DataOptions, Optimization, TrainConfig

Architecture = Literal["autoregressive", "channel"]
BASE, HALF, DOUBLE = "base", "width-half", "width-double"
SNAPSHOTS = 10
"""Points of the base run at which loss and distance are compared."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A flow that is trained; rows may share it."""

    name: str
    """Name of its run directory."""
    base: TrainConfig
    """The run that it differs from in one thing."""
    noise: NoiseProtocol
    """How images are made continuous."""
    changes: Mapping[str, Any]
    """Fields of the flow that are not the base's."""
    architecture: Architecture = "autoregressive"
    """``channel``: :class:`training.baselines.channel_coupling.ChannelCouplingFlow`."""
    snapshots: int = 0
    """How often its averaged weights are kept on the way, the last ones included."""

    @property
    def config(self) -> TrainConfig:
        """The whole run; raises ``ValueError`` where the scale has no such flow (:func:`check_trainings`)."""
        flow = replace(self.base.flow, **self.changes)
        return replace(self.base, name=self.name, noise=self.noise, flow=flow)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: a trained flow, and how it is sampled."""

    name: str
    training: str
    sampling: SamplingDefaults
    text: str
    """What is special about it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The paper's order of two rows: the first one's samples are better."""

    better: str
    worse: str


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows that are compared, and the order in which the paper has them."""

    name: str
    title: str
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]
    paper: str
    """What the paper says."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it for one budget."""

    trainings: Mapping[str, Training]
    rows: Mapping[str, Row]
    studies: tuple[Study, ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is. The defaults take about an hour on one core of a server."""

    width: int = 64
    """Width of the transformers of the base model; the sizes are half and twice of it."""
    head_dim: int = 32
    """Size of an attention head."""
    depth: int = 4
    """Blocks of the base model, and layers in each: all rows have depth² layers in all."""
    patch_size: int = 4
    """Side of a patch."""
    batch_size: int = 64
    """Images per step."""
    images: int = 25_600
    """Images that every flow is trained on, repeats included."""
    learning_rate: float = 1e-3
    """Peak learning rate, the same for all."""

    @property
    def steps(self) -> int:
        """Steps of every run."""
        return max(1, self.images // self.batch_size)


def parse_budget(text: str, batch_size: int) -> int:
    """``25600 images`` or ``400 steps`` as a number of images; raises ``ValueError`` for anything else."""
    found = re.fullmatch(r"\s*([1-9][0-9]*(?:_[0-9]+)*)\s*(images|steps)\s*", text)
    check(found is not None, "budget", text, "a number of images or steps, as in '25600 images' or '400 steps'")
    assert found is not None  # noqa: S101 - for the type checker
    number = int(found[1])
    images = number if found[2] == "images" else number * batch_size
    check(images >= batch_size, "budget", text, f"at least one step, that is {batch_size} images")
    return images


def make_plan(scale: Scale, *, image_size: int, channels: int, class_names: Sequence[str], num_images: int) -> Plan:
    """The studies at this scale for a data set; raises ``ValueError`` for a scale that does not fit it."""
    depth, gaussian = scale.depth, NoiseProtocol(kind="gaussian", std=0.1)
    steps_per_epoch = num_images // scale.batch_size
    check(steps_per_epoch >= 1, "batch_size", scale.batch_size, f"at most the {num_images} training images")
    values = channels * scale.patch_size**2
    check(values > 1, "patch_size", scale.patch_size, "a size with at least two values a patch, which coupling halves")
    flow = FlowConfig(
        image_size=image_size,
        channels=channels,
        patch_size=scale.patch_size,
        width=scale.width,
        num_blocks=depth,
        layers_per_block=depth,
        num_classes=len(class_names),
        head_dim=scale.head_dim,
    )
    base = TrainConfig(
        name=BASE,
        flow=flow,
        noise=gaussian,
        class_names=tuple(class_names),
        optimization=Optimization(
            batch_size=scale.batch_size,
            # A quarter of a step more than asked for, so that rounding cannot lose one.
            epochs=(scale.steps + 0.25) / steps_per_epoch,
            learning_rate=scale.learning_rate,
            warmup_epochs=0.05 * scale.steps / steps_per_epoch,
            # An average over about a tenth of the run.
            ema_decay=1 - 1 / max(2.0, 0.1 * scale.steps),
            precision="float32",
        ),
        data=DataOptions(),
    )

    def training(
        name: str,
        architecture: Architecture = "autoregressive",
        noise: NoiseProtocol = gaussian,
        snapshots: int = 0,
        **changes: Any,
    ) -> Training:
        return Training(
            name=name, base=base, noise=noise, changes=changes, architecture=architecture, snapshots=snapshots
        )

    total = depth * depth
    depths = [blocks for blocks in range(1, total + 1) if total % blocks == 0 and _is_power(blocks, depth)]
    sigmas = (0.05, 0.2)
    # As many layers in all: the block next to the noise has what the others leave.
    stack = (1,) * (depth - 1) + (total - depth + 1,)
    trainings = [
        training(BASE, snapshots=SNAPSHOTS),
        training("volume-preserving", volume_preserving=True),
        training("channel-coupling", architecture="channel"),
        *(
            training(_depth_name(blocks, total), num_blocks=blocks, layers_per_block=total // blocks)
            for blocks in depths
            if blocks != depth
        ),
        *(training(f"sigma-{std:g}", noise=NoiseProtocol(kind="gaussian", std=std)) for std in sigmas),
        training("uniform", noise=NoiseProtocol(kind="uniform")),
        *([training("deep-shallow", layers_per_block=stack, conditioned_blocks=(depth - 1,))] if depth > 1 else []),
        training("softplus", scale_function="softplus"),
        training(HALF, width=scale.width // 2),
        training(DOUBLE, width=2 * scale.width),
    ]
    denoised, raw = SamplingDefaults(denoise=True), SamplingDefaults()
    texts = {
        BASE: f"{_architecture(depth, depth, scale.width)}, σ 0.1, denoised, no guidance",
        "volume-preserving": "without scales, the prior's variance learned",
        "channel-coupling": "halves of each patch's values in place of autoregression, as many layers",
        "uniform": "uniform dequantization",
        "deep-shallow": f"blocks of {', '.join(map(str, stack))} layers, the class in the last alone",
        "softplus": "scales that are a softplus, which grows only linearly",
        **{_depth_name(b, total): _architecture(b, total // b, scale.width) for b in depths if b != depth},
        **{HALF: _architecture(depth, depth, scale.width // 2), DOUBLE: _architecture(depth, depth, 2 * scale.width)},
        **{f"sigma-{std:g}": f"σ {std:g}, denoised" for std in sigmas},
    }
    rows = [
        Row(name=t.name, training=t.name, sampling=raw if t.name == "uniform" else denoised, text=texts[t.name])
        for t in trainings
    ]
    raw_rows = {0.1: BASE, **{std: f"sigma-{std:g}" for std in sigmas}}
    rows += [
        Row(name=f"{'sigma-0.1' if name == BASE else name}-raw", training=name, sampling=raw,
            text=f"σ {std:g}, not denoised")
        for std, name in sorted(raw_rows.items())
    ]  # fmt: skip
    guided = {
        f"{schedule}-{weight:g}": replace(denoised, guidance_scale=weight, guidance_schedule=schedule)
        for weight in (1.0, 2.0)
        for schedule in ("constant", "linear", "cosine")
    }
    rows += [
        Row(name=f"guidance-{name}", training=BASE, sampling=setting,
            text=f"guidance {setting.guidance_scale:g}, {setting.guidance_schedule}")
        for name, setting in guided.items()
    ] if class_names else []  # fmt: skip
    studies = _studies(depth, total, depths, guidance=bool(class_names))
    return Plan(trainings={t.name: t for t in trainings}, rows={r.name: r for r in rows}, studies=studies)


def check_trainings(scale: Scale, names: Collection[str]) -> None:
    """Refuse a scale that has no such trainings; raises ``ValueError`` that names what was given."""
    check(
        HALF not in names or scale.width % (2 * scale.head_dim) == 0,
        "width",
        scale.width,
        f"a multiple of {2 * scale.head_dim}, twice the head_dim, for the row {HALF}; --rows can leave that out",
    )


def _studies(depth: int, total: int, depths: Sequence[int], *, guidance: bool) -> tuple[Study, ...]:
    stacks = tuple(_depth_name(blocks, total) if blocks != depth else BASE for blocks in depths)
    studies = [
        Study(
            name="volume",
            title="Scales, or volume preserving",
            rows=(BASE, "volume-preserving"),
            claims=(Claim(better=BASE, worse="volume-preserving"),),
            paper="FID 5.7 with scales, 51 volume preserving",
        ),
        Study(
            name="coupling",
            title="Autoregression over patches, or coupling over channels",
            rows=(BASE, "channel-coupling"),
            claims=(Claim(better=BASE, worse="channel-coupling"),),
            paper="FID 5.7 autoregressive, 20.4 with channel coupling",
        ),
        Study(
            name="depth",
            title=f"Blocks × layers, {total} layers in all",
            rows=stacks,
            claims=tuple(Claim(better=BASE, worse=name) for name in stacks if name != BASE),
            paper="best where there are as many blocks as layers in each; one block alone FID 267",
        ),
        Study(
            name="denoising",
            title="Gaussian noise, with and without denoising",
            rows=("sigma-0.05", "sigma-0.05-raw", BASE, "sigma-0.1-raw", "sigma-0.2", "sigma-0.2-raw"),
            claims=(
                Claim(better="sigma-0.05", worse="sigma-0.05-raw"),
                Claim(better=BASE, worse="sigma-0.1-raw"),
                Claim(better="sigma-0.2", worse="sigma-0.2-raw"),
            ),
            paper="denoising is needed; more noise needs it more",
        ),
        Study(
            name="noise",
            title="Uniform or Gaussian noise in training",
            rows=(BASE, "uniform"),
            claims=(Claim(better=BASE, worse="uniform"),),
            paper="Gaussian noise gives the better samples; with uniform noise sampling may fail numerically",
        ),
        Study(
            name="size",
            title="Size of the model",
            rows=(HALF, BASE, DOUBLE),
            claims=(Claim(better=DOUBLE, worse=BASE), Claim(better=BASE, worse=HALF)),
            paper="larger models are better",
        ),
    ]
    if depth > 1:
        studies.append(
            Study(
                name="starflow",
                title="STARFlow's design",
                rows=(BASE, "deep-shallow", "softplus"),
                claims=(Claim(better="deep-shallow", worse=BASE),),
                paper="one deep block next to the noise and shallow ones do better than equal ones (arXiv 2506.06276)",
            )
        )
    if guidance:
        names = tuple(f"guidance-{s}-{w}" for w in (1, 2) for s in ("constant", "linear", "cosine"))
        studies.append(
            Study(
                name="guidance",
                title="Guidance and its schedule over the patches",
                rows=(BASE, *names),
                claims=(
                    Claim(better="guidance-linear-1", worse=BASE),
                    Claim(better="guidance-linear-1", worse="guidance-constant-1"),
                    Claim(better="guidance-linear-2", worse="guidance-constant-2"),
                ),
                paper="guidance helps, and more with a weight that grows linearly over the patches than a constant one",
            )
        )
    return tuple(studies)


def _is_power(blocks: int, depth: int) -> bool:
    """1, 2, 4, … and the depth itself: enough of a series at equal depth."""
    return blocks == depth or blocks & (blocks - 1) == 0


def _depth_name(blocks: int, total: int) -> str:
    return f"depth-{blocks}x{total // blocks}"


def _architecture(blocks: int, layers: int, width: int) -> str:
    return f"{blocks} blocks × {layers} layers, width {width}"
