"""Exact Bayes classification with a class-conditional flow: p(y | x) ∝ p(x | y) p(y).

A flow gives log p(x | y) exactly, so the posterior over its classes and the log marginal log Σ_y p(y) p(x | y) are
exact too, up to float32 in the flow; what follows the flow is in float64. A generative classifier in this sense:
Ng and Jordan, "On Discriminative vs. Generative Classifiers" (NIPS 2001); with flows: Mackowiak et al.
(arXiv 2007.15036), equation 1. log p(x | ∅), given :data:`model.flow.NO_CLASS`, uses the mean class embedding: it is
another density of the model, and no marginal.

Shape legend: K noise draws, B batch, Y classes. Nats, summed per image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import NoiseProtocol
from model.flow import NO_CLASS, Flow
from model.likelihood import combine_draws, log_likelihood


@dataclass(frozen=True)
class Posterior:
    """What a flow and a prior say of B images, in float64."""

    log_likelihood_BY: Tensor
    """log p(x | y) in nats, the draws combined as :func:`model.likelihood.combine_draws` does."""
    probability_BY: Tensor
    """p(y | x); a row sums to 1, or is not a number where the likelihoods are not."""
    log_marginal_B: Tensor
    """log Σ_y p(y) p(x | y) in nats."""


def every_label(num_classes: int) -> tuple[int, ...]:
    """The labels that an image is classified with: none, then every class in order."""
    return (NO_CLASS, *range(num_classes))


def posterior(nats_KBY: Tensor, prior: Sequence[float], noise: NoiseProtocol) -> Posterior:
    """Bayes' rule over the log-likelihoods of K noise draws, each draw's noise the same for every class.

    Under uniform dequantization the draws of each class become one bound on its discrete likelihood, and the posterior
    is that of the bounds. With Gaussian noise each noised copy has its own exact posterior: these are averaged, as are
    the log-likelihoods and the log marginals. ``prior`` is p(y) for each class, positive, with sum 1. Raises
    ``ValueError`` when the prior is for another number of classes.
    """
    if len(prior) != nats_KBY.shape[2]:
        raise ValueError(f"prior: got {len(prior)} classes, allowed is {nats_KBY.shape[2]}")
    nats_KBY = nats_KBY.double()
    log_prior_Y = torch.tensor(prior, dtype=torch.float64, device=nats_KBY.device).log()
    combined_BY = combine_draws(nats_KBY, noise)
    joint_KBY = (combined_BY.unsqueeze(0) if noise.kind == "uniform" else nats_KBY) + log_prior_Y
    return Posterior(
        log_likelihood_BY=combined_BY,
        # log_softmax subtracts the largest term first: likelihoods of thousands of nats are no numbers to exponentiate.
        probability_BY=joint_KBY.log_softmax(dim=2).exp().mean(dim=0),
        log_marginal_B=joint_KBY.logsumexp(dim=2).mean(dim=0),
    )


@torch.no_grad()
def class_log_likelihoods(flow: Flow, x_BTD: Tensor, labels: Sequence[int], rows_per_pass: int) -> Tensor:
    """log p(x | y) of patches (B, T, D) given each of the labels, (B, number of labels) float64 in nats.

    At most ``rows_per_pass`` rows, pairs of an image and a label, go through the flow together.
    """
    shape = (len(x_BTD), len(labels))
    y_L = torch.tensor(labels, device=x_BTD.device)
    rows = torch.arange(math.prod(shape), device=x_BTD.device)
    parts = [
        log_likelihood(flow, x_BTD[part // shape[1]], y_L[part % shape[1]]).double()
        for part in rows.split(rows_per_pass)
    ]
    return torch.cat(parts).view(shape)
