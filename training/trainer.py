"""The training loop: from a configuration and images to weights.

A step's noise, dropped labels and flips come from a generator seeded with its number, and its images from the epoch's
order (:mod:`training.batches`): so the step alone fixes all randomness, whatever the number of processes, and a resumed
run is bit-equal to an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.config import FlowConfig, check
from model.flow import Block, Flow
from model.likelihood import bits_per_dim, prior_terms
from model.weights import load_flow
from training.batches import Batches, Part
from training.checkpoint import (
    FILE_NAME,
    TrainState,
    check_continues,
    check_space,
    data_fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from training.classes import class_frequencies
from training.config import TrainConfig
from training.data import Images
from training.discriminative import check_has_likeness, check_wrong_classes, draw_wrong_classes
from training.execution import check_compiler, part_of_batch, prepare
from training.optimizer import Optimizer, WeightAverage, bf16_is_faster, check_optimizer, learning_rate
from training.processes import ALONE, ProcessError, Processes
from training.sharding import gathered, placed, whole
from training.start import Start

MAX_SKIPPED_IN_A_ROW = 50
PRIOR_RATE = 0.1
CHECKPOINT_SECONDS = 120.0
"""What a run that is killed has to do again, at most."""


class TrainingDiverged(RuntimeError):
    """Too many steps in a row, or all of a run, had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class StepReport:
    """What one step tells its observers; ``loss`` is per dimension, without the prior's constant."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    bits_per_dim: float
    grad_norm: float
    learning_rate: float
    images_per_second: float
    seconds: float
    skipped_steps: int
    label_nats: float | None = None
    """−log p(y | x) as it is in the loss, a mean in nats per image; None where it is not."""


class Trainer:
    """Trains one flow, alone or as one of several processes that share each batch; construct, then :meth:`run`.

    Raises :class:`~training.checkpoint.CheckpointError` when ``out`` holds a run with another
    configuration, :class:`TrainingDiverged` when the loss stays non-finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        out: Path,
        device: torch.device,
        build: Callable[[FlowConfig], Flow] = Flow,
        *,
        processes: Processes = ALONE,
        start: Start | None = None,
        codec: torch.nn.Module | None = None,
    ) -> None:
        """``build`` makes the flow of a configuration: a baseline is trained by the same loop. With a ``start`` the
        first step begins with its weights. The disk has to have room for a ``codec`` in the bundle too."""
        self.config, self.out, self.device, self._build, self.processes = config, out, device, build, processes
        self.started_from = "" if start is None else start.bundle.model_id
        with processes.together():
            self._check(images, start)
        self._start(start, codec)

    def _check(self, images: Images, start: Start | None) -> None:
        """Refuse what cannot be trained; nothing is written yet."""
        config, processes = self.config, self.processes
        if config.data.holdout >= len(images):
            raise ValueError(
                f"holdout: got {config.data.holdout}, allowed is less than the {len(images)} images there are"
            )
        self.images = images.part(None, len(images) - config.data.holdout)
        options = config.optimization
        if len(self.images) < options.batch_size:
            raise ValueError(
                f"data: got {len(self.images)} training images, allowed is >= batch_size {options.batch_size}"
            )
        share = processes.size * config.execution.accumulation
        check(
            options.batch_size % share == 0,
            "batch_size",
            options.batch_size,
            f"a multiple of {share} ({processes.size} processes with execution.accumulation = "
            f"{config.execution.accumulation})",
        )
        check_compiler(config.execution)
        check_optimizer(options)
        self.data_sha256 = data_fingerprint(self.images)
        check_wrong_classes(config)
        if start is not None:
            start.check_fits(config)
            start.check_holdout(config, images)
        frequencies = class_frequencies(self.images, config.flow.num_classes)
        self._log_prior_Y = torch.tensor(frequencies, device=self.device).log()
        self.batches = Batches(self.images, config, self.device, processes)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = max(1, round(options.epochs * self.steps_per_epoch))
        self.warmup_steps = round(options.warmup_epochs * self.steps_per_epoch)

    def _start(self, start: Start | None, codec: torch.nn.Module | None) -> None:
        """Weights, optimizer and average: new, a bundle's, or from the checkpoint of the first process."""
        config, options, processes = self.config, self.config.optimization, self.processes
        hashes = processes.gather(self.data_sha256)
        if len(set(hashes)) > 1:
            raise ProcessError("data: the processes have different training images, allowed is the same for all")
        if len(set(processes.gather(self.started_from))) > 1:
            raise ProcessError("from: the processes begin with different bundles, allowed is the same for all")
        torch.manual_seed(config.seed)
        self.flow = self._build(config.flow).to(self.device)
        for module in self.flow.modules():
            if isinstance(module, Block):
                module.spread_embeddings(options.embedding_std)
        if start is not None:
            self.flow.load_state_dict(load_flow(start.bundle, self.device).state_dict())
        self.step = self.images_seen = self.skipped_steps = 0
        self.seconds = 0.0
        self.stop_requested = False
        self._skipped_in_a_row = 0
        state = None
        with processes.together():
            check_has_likeness(config, self.flow)
            if processes.is_first:
                state = load_checkpoint(self.out)
                if state is not None:
                    check_continues(self.out, state, config, self.data_sha256, self.started_from)
                self.out.mkdir(parents=True, exist_ok=True)
                check_space(self.out, self.flow, codec)
        state = processes.from_first(state)
        if state is not None:
            self.flow.load_state_dict(state.model)
        # Whatever the weights begin with, they have it before they are spread over the processes.
        self._model = prepare(self.flow, config.execution, self.device, processes)
        self.optimizer = Optimizer(self.flow, options)
        self.average = WeightAverage(self.flow, options.ema_decay)
        if state is None:
            bf16 = bf16_is_faster(self.device) if options.precision == "auto" else options.precision == "bf16"
            self.precision = processes.from_first("bf16" if bf16 else "float32")
        else:
            self.precision = state.precision
            self._restore(state)

    def _restore(self, state: TrainState) -> None:
        self.optimizer.load_state_dict(state.optimizer)
        self.average.tensors = {k: placed(state.average[k], like) for k, like in self.average.tensors.items()}
        self.average.updates = state.average_updates
        self.step, self.images_seen, self.seconds = state.step, state.images_seen, state.seconds
        self.skipped_steps, self._skipped_in_a_row = state.skipped_steps, state.skipped_in_a_row

    def save(self) -> None:
        """Write a checkpoint from which this run continues exactly, with any number of processes; all call this."""
        is_first = self.processes.is_first
        model, optimizer, average = (
            gathered(content, keep=is_first)
            for content in (self.flow.state_dict(), self.optimizer.state_dict(), self.average.tensors)
        )
        if not is_first:
            return
        state = TrainState(
            config=self.config,
            precision=self.precision,
            step=self.step,
            images_seen=self.images_seen,
            seconds=self.seconds,
            skipped_steps=self.skipped_steps,
            model=model,
            optimizer=optimizer,
            average=average,
            average_updates=self.average.updates,
            data_sha256=self.data_sha256,
            started_from=self.started_from,
            skipped_in_a_row=self._skipped_in_a_row,
        )
        save_checkpoint(self.out, state)

    @property
    def has_learned(self) -> bool:
        """Whether any step has counted: else the weights are as they began, and no model."""
        return self.average.updates > 0

    def _discard(self) -> None:
        """Take back the checkpoint of a run that has learned nothing: the mended one may take the same directory."""
        if self.processes.is_first and not self.has_learned:
            (self.out / FILE_NAME).unlink(missing_ok=True)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights, whole in the first process; with several processes all call this together."""
        weights: dict[str, Tensor] = gathered(self.average.tensors, keep=self.processes.is_first)
        return weights

    def averaged_flow(self) -> Flow:
        """A copy of the flow with :meth:`averaged_weights`: what is evaluated and served."""
        weights = self.averaged_weights()
        flow = self._build(self.config.flow).to(self.device)
        flow.load_state_dict(weights)
        return flow.eval().requires_grad_(False)

    def _loss(self, part: Part, labelled: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a part, its figures (3,), and the mean square (T, D) of z.

        The figures are the loss, the mean log-likelihood and −log p(y | x), both in nats; ``labelled`` is the mean
        number of labelled images in a part of the whole batch, or None where the posterior is not in the loss.
        """
        image_BCHW, y_B, chance_B = part
        options, num_dims, count = self.config.optimization, self.config.flow.num_dims, len(image_BCHW)
        x_BTD, wrong = self.flow.patchify(image_BCHW), None
        rows: tuple[Tensor, Tensor | None] = (x_BTD, y_B)
        if y_B is not None and chance_B is not None:
            wrong = draw_wrong_classes(self.flow, y_B, options.wrong_classes, chance_B)
            rows = wrong.beside(x_BTD, y_B)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            z_RTD, logdet_R = self._model(*rows)
        z_BTD, logdet_B = z_RTD[:count], logdet_R[:count]
        # Paper, equation 6: the negative log-likelihood per dimension without the prior's constant.
        loss = 0.5 * z_BTD.square().mean() - logdet_B.mean() / num_dims
        with torch.set_grad_enabled(wrong is not None):
            nats_R = prior_terms(z_RTD, self.flow.prior_variance).sum(dim=(1, 2)) + logdet_R
        label_nats = torch.zeros((), device=self.device)
        if y_B is not None and wrong is not None and labelled is not None:
            # Parts have different numbers of labelled images: the mean is the whole batch's.
            label_nats = wrong.label_nats(nats_R, y_B, self._log_prior_Y).sum() / labelled
            loss = loss + options.discriminative_weight * label_nats / num_dims
        with torch.no_grad():
            figures = torch.stack([loss, nats_R[:count].mean(), label_nats.to(loss.dtype)])
            return loss, figures, z_BTD.square().mean(dim=0)

    def _labelled(self, parts: Sequence[Part]) -> Tensor:
        """Labelled images in a part, a mean over all parts of all processes; all call this together."""
        labels = [y_B for _, y_B, _ in parts if y_B is not None]
        mine = torch.stack([(y_B >= 0).sum() for y_B in labels]).sum().float()
        shares = self.processes.size * len(parts)
        # A batch can have lost all its labels.
        return (self.processes.mean(mine) * self.processes.size).clamp(min=1) / shares

    def _gradient(self) -> tuple[float, float, float | None, Tensor]:
        """The gradient of a whole batch, left in the parameters.

        Returns loss, bits/dim, −log p(y | x) where it is in the loss, and the mean square of z.
        """
        figures = torch.zeros(3, device=self.device)
        square_TD = torch.zeros_like(self.flow.prior_variance)
        self.optimizer.zero_grad()
        parts = self.batches.parts(self.step)
        labelled = self._labelled(parts) if self.config.optimization.discriminative_weight else None
        for number, part in enumerate(parts):
            with part_of_batch(self._model, is_last=number == len(parts) - 1):
                loss, part_figures, part_TD = self._loss(part, labelled)
                (loss / len(parts)).backward()
            figures += part_figures / len(parts)
            square_TD += part_TD / len(parts)
        loss_mean, nats_mean, label_nats = self.processes.mean(figures).tolist()
        bits = float(bits_per_dim(nats_mean, self.config.flow.num_dims, self.config.noise))
        return loss_mean, bits, None if labelled is None else label_nats, square_TD

    def _train_step(self) -> tuple[float, float, float, float, float | None]:
        """One optimizer step; returns loss, bits/dim, gradient norm, learning rate and −log p(y | x)."""
        options = self.config.optimization
        rate = learning_rate(self.step, self.total_steps, self.warmup_steps, options)
        loss, bits, label_nats, square_TD = self._gradient()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.flow.parameters(), options.clip_norm)).item()
        # All processes have the same norm and loss, and so come to the same end.
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step(rate)
            if self.config.flow.volume_preserving:
                with torch.no_grad():
                    self.flow.prior_variance.lerp_(self.processes.mean(square_TD), PRIOR_RATE)
            self.average.update(self.flow)
            self._skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                self._discard()
                raise TrainingDiverged(
                    f"{MAX_SKIPPED_IN_A_ROW} steps in a row up to step {self.step} had a non-finite loss or gradient; "
                    "lower the learning rate, or use float32"
                )
        return loss, bits, norm, rate, label_nats

    def run(self, observe: Callable[[StepReport], None], checkpoint_seconds: float = CHECKPOINT_SECONDS) -> bool:
        """Train until done or :attr:`stop_requested`; returns whether the run is complete.

        ``observe`` is called after every step. A checkpoint is written every
        ``checkpoint_seconds``, at the end, and when stopped. Raises :class:`TrainingDiverged` at the end, too, of a run
        whose every step was skipped.
        """
        last_save = time.monotonic()
        self.flow.train()
        stop = self.processes.any(self.stop_requested)[0]
        while self.step < self.total_steps and not stop:
            start = time.monotonic()
            loss, bits, norm, rate, label_nats = self._train_step()
            elapsed = time.monotonic() - start
            self.step += 1
            self.images_seen += self.config.optimization.batch_size
            self.seconds += elapsed
            observe(
                StepReport(
                    step=self.step,
                    total_steps=self.total_steps,
                    epoch=self.step / self.steps_per_epoch,
                    loss=loss,
                    bits_per_dim=bits,
                    grad_norm=norm,
                    learning_rate=rate,
                    images_per_second=self.config.optimization.batch_size / elapsed,
                    seconds=self.seconds,
                    skipped_steps=self.skipped_steps,
                    label_nats=label_nats,
                )
            )
            due = time.monotonic() - last_save >= checkpoint_seconds
            stop, save = self.processes.any(self.stop_requested, due)
            if save and self.has_learned:
                self.save()
                last_save = time.monotonic()
        is_complete = self.step >= self.total_steps
        if is_complete and not self.has_learned:
            self._discard()
            raise TrainingDiverged(
                f"none of the {self.step} steps had a finite loss and gradient, and the weights are as they began; "
                "lower the learning rate or embedding_std, or use float32"
            )
        self.save()
        return is_complete
