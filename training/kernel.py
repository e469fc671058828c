"""Kernel distance between samples and real images, on named features, with a standard error.

The squared maximum mean discrepancy (Gretton et al., JMLR 2012) with the kernel (x·y/F + 1)³ of Bińkowski et al. (arXiv
1801.01401), who named it KID on Inception's features. Its estimate is unbiased at every number of samples, and assumes
nothing about the features' distribution. On other features than Inception's it is **not comparable with published
KID**.

Shape legend: N samples, M real images, F features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.frechet import GROUPS, Figure

ROWS_PER_PRODUCT = 1024


def kernel_distance(samples_NF: Tensor, real_MF: Tensor, groups: int = GROUPS) -> Figure:
    """The distance with its jackknife over groups of samples; sample i belongs to group i mod G.

    Raises ``ValueError`` for fewer than two samples a group or two real images, or features that do not fit.
    """
    if samples_NF.shape[1] != real_MF.shape[1]:
        raise ValueError(f"features: got {samples_NF.shape[1]} and {real_MF.shape[1]}, allowed is the same number")
    if len(samples_NF) < 2 * groups or len(real_MF) < 2:
        raise ValueError(
            f"samples: got {len(samples_NF)} and {len(real_MF)} real images, allowed is at least {2 * groups} and 2"
        )
    x_NF, y_MF = samples_NF.double(), real_MF.double()
    n, m = len(x_NF), len(y_MF)
    group_N = torch.arange(n, device=x_NF.device) % groups
    member_NG = torch.nn.functional.one_hot(group_N, groups).double()
    # Sums of the kernel between groups, of a group with the real images, and among these.
    within_GG, across_G = member_NG.new_zeros(groups, groups), member_NG.new_zeros(groups)
    for start in range(0, n, ROWS_PER_PRODUCT):
        rows = slice(start, start + ROWS_PER_PRODUCT)
        within_GG += member_NG[rows].T @ (_kernel(x_NF[rows], x_NF) @ member_NG)
        across_G += member_NG[rows].T @ _kernel(x_NF[rows], y_MF).sum(dim=1)
    # No image is compared with itself: that is what makes the estimate unbiased.
    within_GG -= torch.diag(member_NG.T @ _self_kernel(x_NF))
    real = sum(float(_kernel(rows, y_MF).sum()) for rows in y_MF.split(ROWS_PER_PRODUCT)) - float(
        _self_kernel(y_MF).sum()
    )
    real /= m * (m - 1)

    def distance(within: Tensor, across: Tensor, count: Tensor) -> Tensor:
        return within / (count * (count - 1)) + real - 2 * across / (count * m)

    size_G = member_NG.sum(dim=0)
    total = distance(within_GG.sum(), across_G.sum(), size_G.sum())
    rest_G = within_GG.sum() - within_GG.sum(dim=0) - within_GG.sum(dim=1) + within_GG.diagonal()
    without_G = distance(rest_G, across_G.sum() - across_G, n - size_G)
    return Figure((groups * total - (groups - 1) * without_G).cpu(), float(total))


def _kernel(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    return (x_NF @ y_MF.T / x_NF.shape[1] + 1) ** 3


def _self_kernel(x_NF: Tensor) -> Tensor:
    """Each vector with itself, (N,)."""
    return (x_NF.square().sum(dim=1) / x_NF.shape[1] + 1) ** 3
