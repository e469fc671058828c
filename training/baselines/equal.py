"""The baseline of a bundle: a coupling flow trained on the same images, as many of them, under the same noise.

Batch, schedule, clipping and averaging of the weights are the bundle's too, since the same loop trains both. The
baseline's width is the largest with which a pass over an image takes no more operations than the bundle's, and its
learning rate is its own: what suits a transformer is no budget. For a model that was fine-tuned, the baseline has the
recipe of the first run, and the images of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import Bundle
from model.config import EMBEDDING_STD, FlowConfig
from model.flow import patchify
from model.likelihood import add_noise, centre_draw
from training.baselines.coupling import CouplingFlow, coupling_builder, matched_width
from training.checkpoint import load_checkpoint
from training.classes import match_labels
from training.config import DataOptions, Optimization, TrainConfig
from training.data import DataError, Images
from training.destinations import held
from training.evaluate import score_images
from training.latents import load_bundle_images
from training.log import RunLog
from training.provenance import check_images_of_last_run, training_runs
from training.run import stop_on_signals
from training.trainer import StepReport, Trainer

LEARNING_RATE = 1e-3
"""That of Glow (arXiv 1807.03039), whose couplings and normalizations these are; another may suit the data better."""
FIRST_IMAGES = 256
"""Images that the normalizations start from."""


class Stopped(Exception):
    """The baseline's training was asked to end; the same command continues it."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A coupling flow that was trained beside a bundle, and its score on the images that the bundle was scored on."""

    name: str
    num_parameters: int
    flops_per_image: int
    """Operations of one pass over an image."""
    learning_rate: float
    """Peak learning rate."""
    images_seen: int
    """Images trained on, repeats included."""
    model_images: int
    """Images that the bundle was trained on."""
    model_passes: float
    """Images that went through the bundle's flow in training: with the discriminative term again with wrong classes."""
    seconds: float
    """Time in training steps."""
    bits: NDArray[np.float64]
    """Bits/dim of each image, (N,), under the noise of the same seeds."""
    conditional: bool


def baseline_config(bundle: Bundle, images: int | None = None, learning_rate: float = LEARNING_RATE) -> TrainConfig:
    """The bundle's own training, for its baseline; with another number of images if one is given.

    Raises ``ValueError`` for a bundle that does not say how it was trained.
    """
    runs = training_runs(bundle) or ({},)
    missing = [name for name in ("optimization", "data", "steps") if any(name not in run for run in runs)]
    if missing:
        raise ValueError(f"{bundle.name}: does not say how it was trained ({', '.join(missing)}): no equal budget")
    if not all(run["steps"] for run in runs):
        raise ValueError(f"{bundle.name}: has a run without any step in its record: no equal budget")
    first, record = runs[0], runs[-1]
    known = {field.name for field in fields(DataOptions)}
    data = DataOptions.from_dict({k: v for k, v in record["data"].items() if k in known})
    optimization = Optimization.from_dict(first["optimization"])
    # Where the last run had fewer images than a batch of the first one, they are the batch.
    batch_size = min(optimization.batch_size, record["data"]["num_images"])
    # Rounded up: the baseline never has an image less.
    steps = math.ceil((images_trained_on(bundle) if images is None else images) / batch_size)
    per_epoch = record["data"]["num_images"] // batch_size
    warmup_steps = optimization.warmup_epochs * (first["data"]["num_images"] // optimization.batch_size)
    return TrainConfig(
        name=f"{bundle.name}-coupling",
        flow=bundle.config.flow,
        noise=bundle.config.noise,
        optimization=replace(
            optimization,
            batch_size=batch_size,
            learning_rate=learning_rate,
            # A quarter of a step more, so that rounding cannot lose one.
            epochs=(steps + 0.25) / per_epoch,
            # The same share of the run, however long that is.
            warmup_epochs=warmup_steps / first["steps"] * steps / per_epoch,
            precision="float32",
            # A term for a TarFlow's classes, which are not the baseline's task; nor has it embeddings or layers.
            optimizer="adamw",
            discriminative_weight=0.0,
            embedding_std=EMBEDDING_STD,
        ),
        data=replace(data, classes_from_data=False),
        class_names=bundle.config.class_names,
        seed=record.get("seed", 0),
    )


def images_trained_on(bundle: Bundle) -> int:
    """Images in the steps of all runs that are known to have made the bundle's weights, repeats included."""
    return sum(run["steps"] * run["optimization"]["batch_size"] for run in training_runs(bundle))


def passes_trained_on(bundle: Bundle) -> float:
    """Images that went through the flow in the steps of all runs, again with their wrong classes, on average."""
    passes = 0.0
    for run in training_runs(bundle):
        options = Optimization.from_dict(run["optimization"])
        wrong = options.wrong_classes * (1 - options.label_drop) if options.discriminative_weight else 0.0
        passes += run["steps"] * options.batch_size * (1 + wrong)
    return passes


def baseline_width(flow: FlowConfig) -> int:
    """The largest width with which the baseline takes no more operations an image than this flow.

    Raises ``ValueError`` for images that no coupling flow can be made for.
    """
    return matched_width(flow, flow.flops_per_image)


def train_baseline(
    bundle: Bundle,
    data: Path,
    out: Path,
    device: torch.device,
    *,
    images: int | None = None,
    learning_rate: float = LEARNING_RATE,
    cache: Path | None = None,
    observe: Callable[[StepReport], None] = lambda report: None,
) -> tuple[CouplingFlow, Trainer]:
    """Train the baseline of a bundle, or continue its run in ``out``.

    Raises ``ValueError`` for a bundle or data that it cannot be trained on, or where ``out`` has another baseline;
    :class:`Stopped` when a signal asked so.
    """
    config = baseline_config(bundle, images, learning_rate)
    train = load_bundle_images(bundle, data, "train", device, cache)
    if config.flow.num_classes:
        train = match_labels(train, config.class_names, bundle.name)
    try:
        check_images_of_last_run(bundle, train)
    except DataError as error:
        raise DataError(f"no baseline of equal budget: {error}") from error
    first = torch.from_numpy(train.pixels[:FIRST_IMAGES].copy())
    x_BTD = patchify(add_noise(first, config.noise, centre_draw(config.noise.kind)), config.flow.patch_size)
    build = coupling_builder(baseline_width(config.flow), x_BTD)
    with held(out):
        _check_continues(out, config)
        trainer = Trainer(config, train, out, device, build)
        if trainer.step < trainer.total_steps:
            with RunLog(out, trainer.step) as log, stop_on_signals(trainer):

                def both(report: StepReport) -> None:
                    log.record(report)
                    observe(report)

                if not trainer.run(both):
                    raise Stopped
    flow = trainer.averaged_flow()
    if not isinstance(flow, CouplingFlow):
        raise TypeError(f"got {type(flow).__name__}, where a coupling flow was built")
    return flow, trainer


def _check_continues(out: Path, config: TrainConfig) -> None:
    """Refuse a directory with the baseline of another training, even one that was only shorter: its schedule ended."""
    state = load_checkpoint(out)
    # As they are written: what an option that is off would need is not kept.
    if state is not None and state.config.to_dict() != config.to_dict():
        raise ValueError(
            f"report: {out} has the baseline of another training, allowed is one of {config.optimization.epochs:.4g} "
            f"epochs of the same recipe, with learning rate {config.optimization.learning_rate:g}; choose another "
            f"--report, or remove {out}"
        )


def score_baseline(
    flow: CouplingFlow,
    trainer: Trainer,
    images: Images,
    bundle: Bundle,
    *,
    conditional: bool,
    draws: int,
    seed: int,
    batch_size: int,
) -> Baseline:
    """The baseline's bits/dim on the images, with the same noise as the bundle's."""
    noise = trainer.config.noise
    return Baseline(
        name=f"coupling flow, {len(flow.levels)} scales, width {flow.width}",
        num_parameters=sum(p.numel() for p in flow.parameters()),
        flops_per_image=flow.flops_per_image,
        learning_rate=trainer.config.optimization.learning_rate,
        images_seen=trainer.images_seen,
        model_images=images_trained_on(bundle),
        model_passes=passes_trained_on(bundle),
        seconds=trainer.seconds,
        bits=score_images(flow, images, noise, conditional=conditional, draws=draws, seed=seed, batch_size=batch_size),
        conditional=conditional,
    )
