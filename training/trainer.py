"""The training loop: from a configuration and images to weights.

A sample's noise, dropped label and flip come from a generator seeded with its number in the run, and a step's images
from the epoch's order: so the step alone fixes all randomness, whatever the number of processes, and a resumed run is
bit-equal to an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import check
from model.flow import NO_CLASS, Flow
from model.likelihood import add_noise, bits_per_dim, prior_terms
from training.checkpoint import (
    TrainState,
    check_continues,
    check_space,
    data_fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from training.config import TrainConfig
from training.data import Images, epoch_order
from training.execution import prepare
from training.optimizer import WeightAverage, bf16_is_faster, learning_rate
from training.processes import ALONE, ProcessError, Processes

MAX_SKIPPED_IN_A_ROW = 50
PRIOR_RATE = 0.1
CHECKPOINT_SECONDS = 120.0
"""What a run that is killed has to do again, at most."""


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


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


class Trainer:
    """Trains one flow, alone or as one of several processes that share each batch; construct, then :meth:`run`.

    Raises :class:`~training.checkpoint.CheckpointError` when ``out`` holds a run with another
    configuration, :class:`TrainingDiverged` when the loss stays non-finite.
    """

    def __init__(
        self, config: TrainConfig, images: Images, out: Path, device: torch.device, processes: Processes = ALONE
    ) -> None:
        self.config, self.out, self.device, self.processes = config, out, device, processes
        with processes.together():
            self._prepare(images)
        self._build()

    def _prepare(self, images: Images) -> None:
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
        self.data_sha256 = data_fingerprint(self.images)
        self.steps_per_epoch = len(self.images) // options.batch_size
        self.total_steps = max(1, round(options.epochs * self.steps_per_epoch))

    def _build(self) -> None:
        """Weights, optimizer and average: new, or from the checkpoint of the first process."""
        config, options, processes = self.config, self.config.optimization, self.processes
        hashes = processes.gather(self.data_sha256)
        if len(set(hashes)) > 1:
            raise ProcessError("data: the processes have different training images, allowed is the same for all")
        torch.manual_seed(config.seed)
        self.flow = Flow(config.flow).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.flow.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.average = WeightAverage(self.flow, options.ema_decay)
        self.step = self.images_seen = self.skipped_steps = 0
        self.seconds = 0.0
        self.stop_requested = False
        self._order_of_epoch: tuple[int, np.ndarray] | None = None
        self._skipped_in_a_row = 0
        state = None
        with processes.together():
            if processes.is_first:
                state = load_checkpoint(self.out)
                if state is not None:
                    check_continues(self.out, state, config, self.data_sha256)
                self.out.mkdir(parents=True, exist_ok=True)
                check_space(self.out, self.flow)
        state = processes.from_first(state)
        if state is None:
            bf16 = bf16_is_faster(self.device) if options.precision == "auto" else options.precision == "bf16"
            self.precision = processes.from_first("bf16" if bf16 else "float32")
        else:
            self.precision = state.precision
            self._restore(state)
        self._model = prepare(self.flow, config.execution, processes)

    def _restore(self, state: TrainState) -> None:
        self.flow.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.average.tensors = {k: v.to(self.device) for k, v in state.average.items()}
        self.average.updates = state.average_updates
        self.step, self.images_seen, self.seconds = state.step, state.images_seen, state.seconds
        self.skipped_steps = state.skipped_steps

    def save(self) -> None:
        """Write a checkpoint from which this run continues exactly, with any number of processes."""
        if not self.processes.is_first:
            return
        state = TrainState(
            config=self.config,
            precision=self.precision,
            step=self.step,
            images_seen=self.images_seen,
            seconds=self.seconds,
            skipped_steps=self.skipped_steps,
            model=self.flow.state_dict(),
            optimizer=self.optimizer.state_dict(),
            average=self.average.tensors,
            average_updates=self.average.updates,
            data_sha256=self.data_sha256,
        )
        save_checkpoint(self.out, state)

    def averaged_flow(self) -> Flow:
        """A copy of the flow with the averaged weights: what is evaluated and served."""
        flow = Flow(self.config.flow).to(self.device)
        flow.load_state_dict(self.average.tensors)
        return flow.eval().requires_grad_(False)

    def _batch(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Noisy patches and labels of this process's ``part`` of the present step, a function of (seed, step, rows)."""
        options, size = self.config.optimization, self.config.optimization.batch_size
        parts = self.config.execution.accumulation
        count = size // (self.processes.size * parts)
        first = (self.processes.rank * parts + part) * count
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            self._order_of_epoch = (epoch, epoch_order(len(self.images), self.config.seed, epoch))
        start = position * size + first
        chosen = self._order_of_epoch[1][start : start + count]
        pixels = torch.from_numpy(self.images.pixels[chosen]).to(self.device)
        draw, chance_B2 = self._random(self.step * size + first, pixels.shape)
        if self.config.data.flip:
            pixels = torch.where(chance_B2[:, 0].view(-1, 1, 1, 1) < 0.5, pixels.flip(3), pixels)
        x_BTD = self.flow.patchify(add_noise(pixels, self.config.noise, draw))
        if not self.config.flow.num_classes:
            return x_BTD, None
        labels = torch.from_numpy(self.images.labels[chosen]).to(self.device)
        return x_BTD, torch.where(chance_B2[:, 1] < options.label_drop, NO_CLASS, labels)

    def _random(self, first: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Noise of a part's ``shape`` and two numbers in [0, 1) a row: those of the run's samples from ``first`` on."""
        draw, chance_B2 = torch.empty(shape, device=self.device), torch.empty(shape[0], 2, device=self.device)
        generator, is_gaussian = torch.Generator(self.device), self.config.noise.kind == "gaussian"
        for row in range(shape[0]):
            generator.manual_seed(self.config.seed * 1_000_003 + first + row)
            chance_B2[row].uniform_(generator=generator)
            if is_gaussian:
                draw[row].normal_(generator=generator)
            else:
                draw[row].uniform_(generator=generator)
        return draw, chance_B2

    def _gradient(self) -> tuple[float, float, Tensor]:
        """The gradient of a whole batch, left in the parameters; returns loss, bits/dim, and the mean square of z."""
        parts, num_dims = self.config.execution.accumulation, self.config.flow.num_dims
        figures = torch.zeros(2, device=self.device)
        square_TD = torch.zeros_like(self.flow.prior_variance)
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            x_BTD, y_B = self._batch(part)
            # Gradients travel once, with the last part.
            with self._model.no_sync() if part < parts - 1 and self.processes.size > 1 else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    z_BTD, logdet_B = self._model(x_BTD, y_B)
                # Paper, equation 6: the negative log-likelihood per dimension without the prior's constant.
                loss = 0.5 * z_BTD.square().mean() - logdet_B.mean() / num_dims
                (loss / parts).backward()
            with torch.no_grad():
                nats = prior_terms(z_BTD, self.flow.prior_variance).sum(dim=(1, 2)) + logdet_B
                figures += torch.stack([loss.detach(), nats.mean()]) / parts
                square_TD += z_BTD.square().mean(dim=0) / parts
        loss_mean, nats_mean = self.processes.mean(figures).tolist()
        return loss_mean, float(bits_per_dim(nats_mean, num_dims, self.config.noise)), square_TD

    def _train_step(self) -> tuple[float, float, float, float]:
        """One optimizer step; returns loss, bits/dim, gradient norm and learning rate."""
        options = self.config.optimization
        warmup_steps = round(options.warmup_epochs * self.steps_per_epoch)
        rate = learning_rate(self.step, self.total_steps, warmup_steps, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, bits, square_TD = self._gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), options.clip_norm).item()
        # All processes have the same norm and loss, and so come to the same end.
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            if self.config.flow.volume_preserving:
                with torch.no_grad():
                    self.flow.prior_variance.lerp_(self.processes.mean(square_TD), PRIOR_RATE)
            self.average.update(self.flow)
            self._skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{MAX_SKIPPED_IN_A_ROW} steps in a row up to step {self.step} had a non-finite loss or gradient; "
                    "lower the learning rate, or use float32"
                )
        return loss, bits, norm, rate

    def run(self, observe: Callable[[StepReport], None], checkpoint_seconds: float = CHECKPOINT_SECONDS) -> bool:
        """Train until done or :attr:`stop_requested`; returns whether the run is complete.

        ``observe`` is called after every step. A checkpoint is written every
        ``checkpoint_seconds``, at the end, and when stopped.
        """
        last_save = time.monotonic()
        self.flow.train()
        while self.step < self.total_steps and not self.processes.any(self.stop_requested):
            start = time.monotonic()
            loss, bits, norm, rate = self._train_step()
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
                )
            )
            if time.monotonic() - last_save >= checkpoint_seconds:
                self.save()
                last_save = time.monotonic()
        self.save()
        return self.step >= self.total_steps
