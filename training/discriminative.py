"""A discriminative term beside the likelihood: the label's log-posterior, from the exact likelihoods of some classes.

A flow trained by likelihood alone spends its capacity on what all classes share, and as a classifier it is weak. The
hybrid objective −log p(x | y) − β·log p(y | x) keeps the density and moves it apart between classes: Lasserre, Bishop
and Minka, "Principled hybrids of generative and discriminative models" (CVPR 2006); with flows Ardizzone et al.,
"Training Normalizing Flows with the Information Bottleneck for Competitive Generative Classification"
(arXiv 2001.06448), and Mackowiak et al. (arXiv 2007.15036).

The posterior's sum over all classes costs a pass for each. Here K wrong classes of an image are drawn, likelier ones
more often, and each counts 1/π times for its probability π of being drawn (Horvitz and Thompson, JASA 1952): the sum
is right on average, and exact with all of them. Which classes are alike the flow itself knows: by their embeddings.

Shape legend: B batch, L images of it that have their label, Y classes, O = Y − 1 wrong classes, K of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import check
from model.flow import Flow
from training.config import TrainConfig
from training.sharding import whole

FALLOFF = 4
"""A wrong class is drawn in proportion to this negative power of its embedding's distance from the label's."""


@dataclass(frozen=True)
class WrongClasses:
    """Wrong classes of a batch's images: L·K rows that go through the flow beside the images with their labels."""

    image_L: Tensor
    """Number of the image in the batch; images whose label was dropped have no rows."""
    label_LK: Tensor
    """Its wrong classes."""
    log_weight_LK: Tensor
    """−log π in float64: how often each counts."""

    def beside(self, x_BTD: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """Patches and classes for one pass: the batch's rows, and behind them the L·K rows of wrong classes."""
        image_R = self.image_L.repeat_interleave(self.label_LK.shape[1])
        return torch.cat([x_BTD, x_BTD[image_R]]), torch.cat([y_B, self.label_LK.flatten()])

    def label_nats(self, log_likelihood_R: Tensor, y_B: Tensor, log_prior_Y: Tensor) -> Tensor:
        """−log p(y | x) (L,) in nats, from the log-likelihoods of the rows that :meth:`beside` makes.

        Exact with every wrong class. With fewer the posterior's denominator is right on average, and its logarithm so
        on average too small.
        """
        y_L = y_B[self.image_L]
        own_L = log_likelihood_R[self.image_L] + log_prior_Y[y_L]
        others_LK = log_likelihood_R[len(y_B) :].view_as(self.label_LK) + log_prior_Y[self.label_LK]
        weighted_LK = others_LK + self.log_weight_LK.to(others_LK.dtype)
        return torch.logaddexp(own_L, weighted_LK.logsumexp(dim=1)) - own_L


def check_wrong_classes(config: TrainConfig) -> None:
    """Refuse the term where there are no wrong classes; raises ``ValueError``."""
    weight, num_classes = config.optimization.discriminative_weight, config.flow.num_classes
    fits = not weight or num_classes > 1
    check(fits, "optimization.discriminative_weight", weight, "0 for a flow with less than two classes")


def check_has_likeness(config: TrainConfig, flow: Flow) -> None:
    """Refuse the term for a flow without blocks, as the baselines are; raises ``ValueError``."""
    weight = config.optimization.discriminative_weight
    fits = not weight or hasattr(flow, "blocks")
    check(fits, "optimization.discriminative_weight", weight, f"0 for {type(flow).__name__}, which has no blocks")


@torch.no_grad()
def draw_wrong_classes(flow: Flow, y_B: Tensor, count: int, chance_B: Tensor) -> WrongClasses:
    """``count`` different wrong classes for each label, or all where there are fewer; one number in [0, 1) an image
    decides which.

    With shards all processes call this together.
    """
    image_L, num_classes = (y_B >= 0).nonzero().squeeze(1), flow.config.num_classes
    count = min(count, num_classes - 1)
    y_L1 = y_B[image_L, None]
    wrong_LO = (y_L1 + torch.arange(1, num_classes, device=y_B.device)) % num_classes
    pi_LO = inclusion_probabilities(_likeness(flow)[y_L1, wrong_LO], count)
    # Systematic sampling: the teeth of a comb, 1 apart, meet each class's part of [0, K) with that part's length.
    teeth_LK = torch.arange(count, device=y_B.device) + chance_B[image_L, None].double()
    drawn_LK = torch.searchsorted(pi_LO.cumsum(dim=1), teeth_LK, right=True).clamp(max=num_classes - 2)
    return WrongClasses(image_L, wrong_LO.gather(1, drawn_LK), -pi_LO.gather(1, drawn_LK).log())


def inclusion_probabilities(likeness_LO: Tensor, count: int) -> Tensor:
    """π (L, O), which sums to ``count``: in proportion to positive values, where that is not more than 1."""
    if count == likeness_LO.shape[1]:
        return torch.ones_like(likeness_LO)
    pi_LO = torch.zeros_like(likeness_LO)
    # What is certain leaves less for the others, of which more may be certain then.
    for _ in range(count):
        certain_LO = pi_LO >= 1
        others_LO = likeness_LO.masked_fill(certain_LO, 0)
        left_L1 = count - certain_LO.sum(dim=1, keepdim=True)
        pi_LO = torch.where(certain_LO, 1, others_LO / others_LO.sum(dim=1, keepdim=True) * left_L1)
    return pi_LO.clamp(max=1)


def _likeness(flow: Flow) -> Tensor:
    """How alike the flow finds classes, (Y, Y) in float64: their embeddings, in all blocks that see them."""
    embeddings = [whole(block.class_embedding) for block in flow.blocks if block.class_embedding is not None]
    embedding_YW = torch.cat(embeddings, dim=1).double()
    # Equal embeddings are as alike as can be, but not infinitely.
    return torch.cdist(embedding_YW, embedding_YW).clamp(min=1e-9).pow(-FALLOFF)
