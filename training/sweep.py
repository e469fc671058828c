"""Which guidance suits a model: samples of every setting of a grid, measured against real images.

Every setting draws from the same seeds and, given a class, for the same classes, so that differences between settings
are paired. The best of many settings looks better than it is, because it was chosen on the samples that measured it; so
the chosen settings and no guidance are drawn once more from fresh seeds, and the verdict is theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bundle import Bundle
from model.config import NoiseProtocol, SamplingDefaults, check
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import to_pixels
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler
from model.weights import load_flow
from training.classes import match_labels
from training.data import DataError, Images, data_name, epoch_order, load_images
from training.features import Extractor, load_extractor
from training.frechet import COMPONENTS, Figure, Moments, Reference
from training.sweep_grid import DEFAULT_GRIDS, Grid, Mode, mode_settings

SHOWN = 12
"""Samples of each setting on the contact sheet."""
ROWS_PER_BATCH, ROWS_PER_DENOISING = 256, 64
BEYOND_DOUBT = 2.0
"""Standard errors by which the best must beat no guidance."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is drawn and what it is compared with."""

    grids: Mapping[Mode, Grid] = field(default_factory=lambda: DEFAULT_GRIDS)
    """The settings of each mode that is swept."""
    num_samples: int = 200
    """Samples of each setting."""
    confirm_samples: int = 500
    """Samples, from fresh seeds, of the chosen settings and of no guidance; 0 for no confirmation."""
    reference_images: int = 5000
    """Real images that samples are compared with, at most."""
    split: str = "test"
    """Split that the real images are from."""
    extractor: str = "efficientnet-lite0"
    """Name of the features' extractor."""
    components: int = COMPONENTS
    """Principal components of the features that distances are measured in."""
    seed: int = 0
    """Sample i has the seed ``seed + i``; the confirmation's seeds follow the sweep's."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting, measured."""

    setting: SamplingDefaults
    """How it was sampled."""
    figure: Figure | None
    """Its distance from real images; None where samples had values that are not finite."""
    seconds: float
    """Time to draw the samples."""
    shown: NDArray[np.uint8]
    """The first samples (N, C, H, W): where classes are given, of different classes."""

    @property
    def value(self) -> float:
        """The distance to sort by."""
        return math.inf if self.figure is None else self.figure.value


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """A setting and no guidance on fresh seeds."""

    setting: SamplingDefaults
    """The setting that was chosen."""
    unguided: Figure
    """No guidance."""
    guided: Figure
    """The setting."""

    @property
    def difference(self) -> Figure:
        """The setting minus no guidance: negative where guidance helps."""
        return self.guided - self.unguided

    @property
    def standard_errors(self) -> float:
        """By how many standard errors the setting is better."""
        return -self.difference.value / max(self.difference.standard_error, 1e-12)

    @property
    def beats_no_guidance(self) -> bool:
        """Whether that is beyond doubt."""
        return self.standard_errors > BEYOND_DOUBT


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """All settings of one mode."""

    mode: Mode
    """Whether samples were given classes."""
    trials: tuple[Trial, ...]
    """The measured settings, no guidance first."""
    confirmations: tuple[Confirmation, ...] = ()
    """The best setting and that for both modes on fresh seeds, unless they are no guidance or not finite."""

    @property
    def unguided(self) -> Trial:
        """No guidance."""
        return self.trials[0]

    @property
    def best(self) -> Trial:
        """The setting nearest to the real images."""
        return min(self.trials, key=lambda trial: trial.value)

    def value(self, setting: SamplingDefaults) -> float:
        """The distance of a setting, infinite if it was not measured."""
        return min((trial.value for trial in self.trials if trial.setting == setting), default=math.inf)

    def confirmation(self, setting: SamplingDefaults) -> Confirmation | None:
        """The setting on fresh seeds, if it was drawn with them."""
        return next((found for found in self.confirmations if found.setting == setting), None)


def shared_best(modes: Sequence[ModeResult]) -> SamplingDefaults | None:
    """The setting for requests with and without a class, since a bundle recommends one: the least sum of distances.

    None where not both modes were swept, or where no setting of both is better than no guidance.
    """
    if len(modes) < 2:
        return None
    settings = [trial.setting for trial in modes[0].trials]
    best = min(settings, key=lambda setting: sum(mode.value(setting) for mode in modes))
    return best if best.guidance_scale else None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything that was measured."""

    bundle: Bundle
    """The model."""
    data_name: str
    """Name of the data directory."""
    options: SweepOptions
    """What was asked for."""
    reference: Reference
    """What samples were compared with."""
    modes: tuple[ModeResult, ...]
    """Results of each mode."""

    @property
    def shared_best(self) -> SamplingDefaults | None:
        """See :func:`shared_best`."""
        return shared_best(self.modes)


def draw(
    sampler: Sampler, noise: NoiseProtocol, setting: SamplingDefaults, seeds: range, labels: Sequence[int | None]
) -> Iterator[Tensor | None]:
    """Samples as 8-bit images, (B, C, H, W) a batch; None for a batch with values that are not finite."""
    flow: Flow = sampler.flow
    config, device = flow.config, flow.prior_variance.device
    for start in range(0, len(seeds), ROWS_PER_BATCH):
        batch = slice(start, start + ROWS_PER_BATCH)
        u_BTD = latents(seeds[batch], config.num_patches, config.patch_dim).to(device)
        rows = make_rows(u_BTD, labels[batch], [setting] * len(u_BTD))
        x_BTD = finish(sampler.decode(rows)).x_BTD
        if setting.denoise:
            x_BTD = finish(denoise(flow, x_BTD, rows.label_B, noise.std, ROWS_PER_DENOISING))
        finite = bool(torch.isfinite(x_BTD).all())
        yield to_pixels(flow.unpatchify(x_BTD), noise.kind) if finite else None


@dataclass(frozen=True)
class _Bench:
    """What all trials of a sweep share."""

    sampler: Sampler
    noise: NoiseProtocol
    extractor: Extractor
    reference: Reference
    labels: NDArray[np.int64]
    """Classes of the real images, which samples are given too: the same shares of each."""
    advance: Callable[[int], None]

    def measure(self, setting: SamplingDefaults, mode: Mode, seeds: range) -> Trial:
        """Draw and measure samples of one setting."""
        given = [int(self.labels[i % len(self.labels)]) for i in range(len(seeds))]
        labels = given if mode == "conditional" else [None] * len(seeds)
        features: list[Tensor] = []
        images: list[NDArray[np.uint8]] = []
        seconds, started = 0.0, time.perf_counter()
        for pixels in draw(self.sampler, self.noise, setting, seeds, labels):
            seconds += time.perf_counter() - started
            if pixels is None:
                empty = np.zeros((0, *self._shape), np.uint8)
                self.advance(len(seeds) - sum(len(batch) for batch in features))
                return Trial(setting=setting, figure=None, seconds=seconds, shown=empty)
            features.append(self.extractor(pixels, self.advance).cpu())
            images.append(pixels.cpu().numpy())
            started = time.perf_counter()
        figure = self.reference.measure(torch.cat(features))
        shown = np.concatenate(images)[_to_show(given) if mode == "conditional" else range(SHOWN)]
        return Trial(setting=setting, figure=figure, seconds=seconds, shown=shown)

    @property
    def _shape(self) -> tuple[int, int, int]:
        config = self.sampler.flow.config
        return config.channels, config.image_size, config.image_size


def _to_show(labels: Sequence[int]) -> list[int]:
    """Indices of the samples on the contact sheet: as many classes as there is room for, in their order."""
    turn: dict[int, int] = {}
    order = []
    for index, label in enumerate(labels):
        turn[label] = turn.get(label, -1) + 1
        order.append((turn[label], label, index))
    return [index for _, _, index in sorted(order)[:SHOWN]]


def run_sweep(
    bundle: Bundle,
    data: Path,
    options: SweepOptions,
    device: torch.device,
    on_progress: Callable[[str, int, int], None] = lambda text, done, total: None,
    cache: Path | None = None,
) -> Sweep:
    """Measure all settings of the grids; ``on_progress`` is told what is done, and images so far and in all.

    ``cache`` is that of :func:`training.data.load_images`. Raises ``ValueError`` for options that do not fit the
    model, :class:`~training.data.DataError`, :class:`~model.bundle.BundleError` or
    :class:`~training.features.ExtractorError`.
    """
    flow_config, noise = bundle.config.flow, bundle.config.noise
    check(bool(options.grids), "modes", "none", "conditional, unconditional or both")
    check(
        "conditional" not in options.grids or flow_config.num_classes > 0,
        "modes",
        "conditional",
        f"unconditional for {bundle.name}, a model without classes",
    )
    settings = {mode: mode_settings(bundle.sampling, grid, mode) for mode, grid in options.grids.items()}
    if bundle.config.codec is not None:
        raise DataError(f"{bundle.name} models latents of an autoencoder; sweeps are for models of pixels")
    images = load_images(data, options.split, flow_config.image_size, flow_config.channels, cache)
    if flow_config.num_classes:
        images = match_labels(images, bundle.config.class_names, bundle.name)
    kept = epoch_order(len(images), seed=0, epoch=0)[: options.reference_images]
    images = Images(images.pixels[kept], images.labels[kept], images.class_names)
    extractor = load_extractor(options.extractor, device)

    text, done = "real images", 0
    # Every mode is confirmed with three settings at most: none, its best, and the best for both.
    total = len(images) + sum(len(s) * options.num_samples + 3 * options.confirm_samples for s in settings.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(text, done, total)

    real = Moments.of(torch.empty(0, extractor.num_features))
    for start in range(0, len(images), ROWS_PER_BATCH):
        pixels = torch.from_numpy(images.pixels[start : start + ROWS_PER_BATCH]).to(device)
        real = real + Moments.of(extractor(pixels, advance).cpu())
    reference = Reference.fit(extractor.name, real, options.components)
    for name in ("num_samples", "confirm_samples"):
        got, least = getattr(options, name), reference.min_samples
        check(got >= least or (name == "confirm_samples" and got == 0), name, got, f"an integer >= {least}")

    bench = _Bench(Sampler(load_flow(bundle, device)), noise, extractor, reference, images.labels, advance)
    seeds = range(options.seed, options.seed + options.num_samples)
    fresh = range(seeds.stop, seeds.stop + options.confirm_samples)
    modes = []
    for mode, mode_list in settings.items():
        trials = []
        for number, setting in enumerate(mode_list, 1):
            text = f"{mode} {number}/{len(mode_list)}"
            trials.append(bench.measure(setting, mode, seeds))
        modes.append(ModeResult(mode=mode, trials=tuple(trials)))
    shared = shared_best(modes)
    for i, result in enumerate(modes):
        text = f"{result.mode}, fresh seeds"
        modes[i] = replace(result, confirmations=_confirm(bench, result, shared, fresh))
    on_progress("done", total, total)
    return Sweep(bundle=bundle, data_name=data_name(data), options=options, reference=reference, modes=tuple(modes))


def _confirm(
    bench: _Bench, result: ModeResult, shared: SamplingDefaults | None, seeds: range
) -> tuple[Confirmation, ...]:
    """The chosen settings and no guidance on seeds that the choice has not seen."""
    chosen = [result.best.setting, *([] if shared in (None, result.best.setting) else [shared])]
    unguided = result.unguided.setting
    chosen = [setting for setting in chosen if setting != unguided]
    if not seeds or not chosen:
        return ()
    baseline, *figures = (bench.measure(setting, result.mode, seeds).figure for setting in (unguided, *chosen))
    return tuple(
        Confirmation(setting=setting, unguided=baseline, guided=figure)
        for setting, figure in zip(chosen, figures, strict=True)
        if baseline is not None and figure is not None
    )
