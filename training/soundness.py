"""How many of a model's samples are images at all: finite, and inside of the range that pixels have.

Flows that were trained with uniform dequantization fail at this more often than those trained with Gaussian noise,
which is why TarFlow trains with the latter (arXiv 2412.06329).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.codecs.base import Codec, Identity
from model.config import NoiseProtocol, SamplingDefaults
from model.denoise import denoise
from model.flow import Flow
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler

ROWS_PER_BATCH = 64
MARGIN = 0.1
"""So far beyond the pixels' range [-1, 1] a value may be."""


@dataclass(frozen=True, kw_only=True)
class Soundness:
    """What became of samples."""

    num_samples: int
    not_finite: int
    """Samples with a value that is not finite."""
    outside: float
    """Mean share of the values of the other samples that are more than :data:`MARGIN` outside of the pixels' range;
    nan if there are none."""


def sample_soundness(
    flow: Flow,
    noise: NoiseProtocol,
    sampling: SamplingDefaults,
    count: int,
    *,
    codec: Codec | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Soundness:
    """Draw ``count`` samples as ``sampling`` says, with seeds from 0 and all classes in turn, and look at their values.

    ``codec`` makes images of latents, whose own values have no such range.
    ``advance`` is told the number of samples after each batch.
    """
    config, device, sampler = flow.config, flow.prior_variance.device, Sampler(flow)
    not_finite, outside = 0, 0.0
    for start in range(0, count, ROWS_PER_BATCH):
        seeds = range(start, min(count, start + ROWS_PER_BATCH))
        labels = [seed % config.num_classes if config.num_classes else None for seed in seeds]
        u_BTD = latents(seeds, config.num_patches, config.patch_dim).to(device)
        rows = make_rows(u_BTD, labels, [sampling] * len(seeds))
        x_BTD = finish(sampler.decode(rows)).x_BTD
        if sampling.denoise:
            x_BTD = finish(denoise(flow, x_BTD, rows.label_B, noise.std, ROWS_PER_BATCH))
        x_BN = (codec or Identity()).images(flow.unpatchify(x_BTD)).flatten(1)
        finite_B = x_BN.isfinite().all(dim=1)
        not_finite += int((~finite_B).sum())
        outside += float((x_BN[finite_B].abs() > 1 + MARGIN).double().mean(dim=1).sum())
        advance(len(seeds))
    finite = count - not_finite
    return Soundness(num_samples=count, not_finite=not_finite, outside=outside / finite if finite else float("nan"))
