"""The training loop: from a configuration and images to weights.

A step's noise, dropped labels and flips come from a generator seeded with (seed, step), and its
images from the epoch's order, so the step number alone fixes all randomness and a resumed run is
bit-equal to an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import FlowConfig
from model.flow import NO_CLASS, Flow
from model.likelihood import add_noise, bits_per_dim, prior_terms
from training.checkpoint import TrainState, check_continues, data_fingerprint, load_checkpoint, save_checkpoint
from training.config import TrainConfig
from training.data import Images, epoch_order
from training.optimizer import WeightAverage, bf16_is_faster, learning_rate

MAX_SKIPPED_IN_A_ROW = 50
PRIOR_RATE = 0.1


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
    """Trains one flow in one process; construct, then :meth:`run`.

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
    ) -> None:
        """``build`` makes the flow of a configuration: a baseline is trained by the same loop."""
        self.config, self.out, self.device, self._build = config, out, device, build
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
        self.data_sha256 = data_fingerprint(self.images)
        self.steps_per_epoch = len(self.images) // options.batch_size
        self.total_steps = max(1, round(options.epochs * self.steps_per_epoch))
        torch.manual_seed(config.seed)
        self.flow = build(config.flow).to(device)
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
        out.mkdir(parents=True, exist_ok=True)
        state = load_checkpoint(out)
        if state is None:
            bf16 = bf16_is_faster(device) if options.precision == "auto" else options.precision == "bf16"
            self.precision = "bf16" if bf16 else "float32"
        else:
            self.precision = state.precision
            self._restore(state)

    def _restore(self, state: TrainState) -> None:
        check_continues(self.out, state, self.config, self.data_sha256)
        self.flow.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.average.tensors = {k: v.to(self.device) for k, v in state.average.items()}
        self.average.updates = state.average_updates
        self.step, self.images_seen, self.seconds = state.step, state.images_seen, state.seconds
        self.skipped_steps = state.skipped_steps

    def save(self) -> None:
        """Write a checkpoint from which this run continues exactly."""
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
        flow = self._build(self.config.flow).to(self.device)
        flow.load_state_dict(self.average.tensors)
        return flow.eval().requires_grad_(False)

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        """Noisy patches and labels of the present step, a function of (seed, step)."""
        options, size = self.config.optimization, self.config.optimization.batch_size
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            self._order_of_epoch = (epoch, epoch_order(len(self.images), self.config.seed, epoch))
        chosen = self._order_of_epoch[1][position * size : (position + 1) * size]
        generator = torch.Generator(self.device)
        generator.manual_seed(self.config.seed * 1_000_003 + self.step)
        pixels = torch.from_numpy(self.images.pixels[chosen]).to(self.device)
        if self.config.data.flip:
            flipped = torch.rand(size, 1, 1, 1, generator=generator, device=self.device) < 0.5
            pixels = torch.where(flipped, pixels.flip(3), pixels)
        sample = torch.randn if self.config.noise.kind == "gaussian" else torch.rand
        draw = sample(pixels.shape, generator=generator, device=self.device)
        x_BTD = self.flow.patchify(add_noise(pixels, self.config.noise, draw))
        if not self.config.flow.num_classes:
            return x_BTD, None
        labels = torch.from_numpy(self.images.labels[chosen]).to(self.device)
        dropped = torch.rand(size, generator=generator, device=self.device) < options.label_drop
        return x_BTD, torch.where(dropped, NO_CLASS, labels)

    def _train_step(self) -> tuple[float, float, float, float]:
        """One optimizer step; returns loss, bits/dim, gradient norm and learning rate."""
        options = self.config.optimization
        warmup_steps = round(options.warmup_epochs * self.steps_per_epoch)
        rate = learning_rate(self.step, self.total_steps, warmup_steps, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x_BTD, y_B = self._batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            z_BTD, logdet_B = self.flow(x_BTD, y_B)
        # Paper, equation 6: the negative log-likelihood per dimension without the prior's constant.
        loss = 0.5 * z_BTD.square().mean() - logdet_B.mean() / self.config.flow.num_dims
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), options.clip_norm)
        if math.isfinite(norm.item()) and math.isfinite(loss.item()):
            self.optimizer.step()
            if self.config.flow.volume_preserving:
                with torch.no_grad():
                    self.flow.prior_variance.lerp_(z_BTD.detach().square().mean(dim=0), PRIOR_RATE)
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
        with torch.no_grad():
            nats = prior_terms(z_BTD, self.flow.prior_variance).sum(dim=(1, 2)) + logdet_B
            bits = bits_per_dim(nats.mean(), self.config.flow.num_dims, self.config.noise)
        return loss.item(), float(bits), norm.item(), rate

    def run(self, observe: Callable[[StepReport], None], checkpoint_seconds: float = 120.0) -> bool:
        """Train until done or :attr:`stop_requested`; returns whether the run is complete.

        ``observe`` is called after every step. A checkpoint is written every
        ``checkpoint_seconds``, at the end, and when stopped.
        """
        last_save = time.monotonic()
        self.flow.train()
        while self.step < self.total_steps and not self.stop_requested:
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
            if time.monotonic() - last_save > checkpoint_seconds:
                self.save()
                last_save = time.monotonic()
        self.save()
        return self.step >= self.total_steps
