"""What passes of a flow say about images, before any calibration: likelihood terms and what the network saw.

All of it depends on the weights, the image and the noise alone, so that a worker can compute it whatever it is
compared with; that (:mod:`model.anomaly.calibration`) needs no torch.

Shape legend: B batch, C channels, T patches, D values per patch, K blocks, W width of the transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.anomaly.features import Statistics
from model.config import NoiseProtocol
from model.denoise import log_density_gradient
from model.flow import Flow
from model.likelihood import add_noise, bits_per_dim, centre_draw, prior_terms
from model.noise import input_noise


@torch.no_grad()
def flow_statistics(
    flow: Flow, noise: NoiseProtocol, x_BTD: Tensor, y_B: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """What one pass gives of continuous patches (B, T, D): log p(x | y) (B,) in nats, and statistics.

    The first is that of :func:`model.likelihood.log_likelihood`, to the last digit; the second are those of
    :mod:`model.anomaly.features` that need no gradient.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0].float())

    # The last block looks at what is nearly noise; it tells shapes apart better than the first.
    hook = flow.blocks[-1].proj_out.register_forward_pre_hook(keep)
    try:
        steps = flow.trace(x_BTD, y_B)
    finally:
        hook.remove()
    logdet_B = torch.zeros_like(steps[0][1][:, 0, 0])
    for _, alpha_BTD in steps:
        # Block by block as the flow does it: in another order the last digits were others.
        logdet_B = logdet_B - alpha_BTD.sum(dim=(1, 2))
    nats_B = prior_terms(steps[-1][0], flow.prior_variance).sum(dim=(1, 2)) + logdet_B
    log_scale_BKT = torch.stack([alpha.float().sum(dim=2) for _, alpha in steps], dim=1)
    latent_BTD = (steps[-1][0] / flow.prior_variance.sqrt()).float()
    states = [z.float() for z, _ in steps[:-1]] + [latent_BTD]
    patch_nll_BT = log_scale_BKT.sum(dim=1) - prior_terms(steps[-1][0].float(), flow.prior_variance).sum(dim=2)
    bits_B = torch.as_tensor(bits_per_dim(-patch_nll_BT.double().sum(dim=1), flow.config.num_dims, noise))
    statistics = {
        "bits": bits_B,
        "patch_nll": patch_nll_BT,
        "log_scale": log_scale_BKT,
        "energy": torch.stack([z.square().sum(dim=2) for z in states], dim=1),
        "latent": _latent_statistics(flow, latent_BTD),
        "hidden": _pooled(seen[0]),
    }
    return nats_B, {name: value.float().cpu().numpy() for name, value in statistics.items()}


def residual_statistics(
    flow: Flow, noise: NoiseProtocol, clean_BTD: Tensor, x_BTD: Tensor, y_B: Tensor | None = None
) -> Statistics:
    """``gradient`` and ``residual`` of noised patches x of clean ones; about three times the work of a pass."""
    *_, gradient_BTD = log_density_gradient(flow, x_BTD, y_B)
    if gradient_BTD is None:
        raise AssertionError("the last item is the gradient")
    denoised_BTD = x_BTD + noise_variance(noise) * gradient_BTD
    return {
        "gradient": (gradient_BTD.square().mean(dim=(1, 2)) + 1e-30).log().float().cpu().numpy(),
        "residual": flow.unpatchify((denoised_BTD - clean_BTD).float()).cpu().numpy(),
    }


def noise_variance(noise: NoiseProtocol) -> float:
    """Variance of a model's training noise on the [-1, 1] pixel scale."""
    return noise.std**2 if noise.kind == "gaussian" else (2 / 256) ** 2 / 12


def _pooled(hidden_BTW: Tensor) -> Tensor:
    """Means over either half of the sequence and the standard deviation over all of it, (B, 3W)."""
    half = max(1, hidden_BTW.shape[1] // 2)
    first_BW, second_BW = hidden_BTW[:, :half].mean(dim=1), hidden_BTW[:, -half:].mean(dim=1)
    return torch.cat([first_BW, second_BW, hidden_BTW.std(dim=1, correction=0)], dim=1)


def _latent_statistics(flow: Flow, latent_BTD: Tensor) -> Tensor:
    """Goodness of fit (B, 8) of latents u (B, T, D) to white standard normal noise."""
    u_BN = latent_BTD.flatten(1)
    count = u_BN.shape[1]
    grid = torch.arange(count, device=u_BN.device)
    cumulative_BN = torch.special.ndtr(u_BN.sort(dim=1).values)
    ks_B = torch.maximum(cumulative_BN - grid / count, (grid + 1) / count - cumulative_BN).amax(dim=1)
    image_BCHW = flow.unpatchify(latent_BTD)
    across_B = (image_BCHW[..., 1:] * image_BCHW[..., :-1]).mean(dim=(1, 2, 3))
    down_B = (image_BCHW[..., 1:, :] * image_BCHW[..., :-1, :]).mean(dim=(1, 2, 3))
    moments = [u_BN.mean(dim=1), u_BN.std(dim=1), u_BN.pow(3).mean(dim=1), u_BN.pow(4).mean(dim=1)]
    return torch.stack([*moments, ks_B, across_B, down_B, u_BN.abs().amax(dim=1)], dim=1)


def image_statistics(
    flow: Flow, noise: NoiseProtocol, pixels_BCHW: Tensor, y_B: Tensor | None, *, seed: int, gradient: bool = False
) -> Statistics:
    """Statistics of 8-bit images (B, C, H, W) on any device, each with the model's noise of ``seed``.

    All images get the same noise: a score is then a function of the image alone, which is all that conformal p-values
    ask for.
    """
    return likelihood_and_statistics(flow, noise, pixels_BCHW, y_B, seed=seed, gradient=gradient)[1]


def likelihood_and_statistics(
    flow: Flow, noise: NoiseProtocol, pixels_BCHW: Tensor, y_B: Tensor | None, *, seed: int, gradient: bool = False
) -> tuple[Tensor, Statistics]:
    """log p(x | y) (B,) in nats of the images with the first draw of ``seed``, and their :func:`image_statistics`.

    Both come from one pass.
    """
    device = flow.prior_variance.device
    # Noised where the images are, as for a likelihood: another device may round otherwise.
    draw_CHW = input_noise(noise.kind, seed, 1, tuple(pixels_BCHW.shape[1:]))[0].to(pixels_BCHW.device)
    x_BTD = flow.patchify(add_noise(pixels_BCHW, noise, draw_CHW).to(device))
    labels_B = None if y_B is None else y_B.to(device)
    nats_B, statistics = flow_statistics(flow, noise, x_BTD, labels_B)
    if gradient:
        clean_BTD = flow.patchify(add_noise(pixels_BCHW, noise, centre_draw(noise.kind)).to(device))
        statistics |= residual_statistics(flow, noise, clean_BTD, x_BTD, labels_B)
    return nats_B, statistics
