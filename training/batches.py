"""The batches of a run: what is in one is a function of (seed, step) alone, whatever the number of processes.

While a step is computed, a thread reads the images of the next one, for a GPU into memory that it copies from at once:
the device waits for no disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from model.flow import NO_CLASS
from model.likelihood import add_noise
from training.config import TrainConfig
from training.data import Images, epoch_order
from training.processes import Processes

Part: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""Noisy images (B, C, H, W), their labels (B,) or None without classes, and the numbers in [0, 1) (B,) that draw wrong
classes, or None where the loss has none."""


class Batches:
    """The rows of each batch that are this process's, in ``execution.accumulation`` parts."""

    def __init__(self, images: Images, config: TrainConfig, device: torch.device, processes: Processes) -> None:
        self.images, self.config, self.device = images, config, device
        self.size = config.optimization.batch_size
        self.steps_per_epoch = len(images) // self.size
        count = self.size // processes.size
        self._mine = slice(processes.rank * count, (processes.rank + 1) * count)
        self._reader = ThreadPoolExecutor(1, "images of the next step")
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None
        self._order = (-1, epoch_order(0, 0, 0))

    def parts(self, step: int) -> Sequence[Part]:
        """Each part of a step.

        Every process draws for the whole batch and takes its rows: so the same numbers meet the same image.
        """
        pixels, labels = self._take(step)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.config.seed * 1_000_003 + step)
        if self.config.data.flip:
            flipped = torch.rand(self.size, 1, 1, 1, generator=generator, device=self.device) < 0.5
            pixels = torch.where(flipped[self._mine], pixels.flip(3), pixels)
        sample = torch.randn if self.config.noise.kind == "gaussian" else torch.rand
        draw = sample(self.size, *pixels.shape[1:], generator=generator, device=self.device)[self._mine]
        parts = self.config.execution.accumulation
        noisy = add_noise(pixels, self.config.noise, draw).chunk(parts)
        if not self.config.flow.num_classes:
            return [(image, None, None) for image in noisy]
        chance_B = torch.rand(self.size, generator=generator, device=self.device)[self._mine]
        y_B = torch.where(chance_B < self.config.optimization.label_drop, NO_CLASS, labels)
        if not self.config.optimization.discriminative_weight:
            return [(image, label, None) for image, label in zip(noisy, y_B.chunk(parts), strict=True)]
        # The last draw: with or without it, the others are the same.
        wrong_B = torch.rand(self.size, generator=generator, device=self.device)[self._mine]
        return list(zip(noisy, y_B.chunk(parts), wrong_B.chunk(parts), strict=True))

    def _take(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels and labels of a step's rows on the device; those of the next step are asked for."""
        asked = self._ahead
        future = asked[1] if asked is not None and asked[0] == step else self._reader.submit(self._read, step)
        pixels, labels = future.result()
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        return pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.images), self.config.seed, epoch))
        chosen = self._order[1][position * self.size : (position + 1) * self.size][self._mine]
        rows = torch.from_numpy(self.images.pixels[chosen]), torch.from_numpy(self.images.labels[chosen])
        if self.device.type == "cuda":
            return rows[0].pin_memory(), rows[1].pin_memory()
        return rows
