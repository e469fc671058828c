"""Guidance of the affine parameters: pure functions on tensors, one weight per row.

Source: TarFlow (arXiv 2412.06329), section 2.6: v ← v + w_k (v − v_u) for the log-scale α and the
shift μ of patch k, where v_u comes from the pass without class (or with tempered attention).
"""

from __future__ import annotations

import torch
from torch import Tensor


def patch_weight(scale_B: Tensor, is_linear_B: Tensor, index: int, num_patches: int) -> Tensor:
    """Weight w_k (B,) for patch ``index`` = k of 1…T−1 in the block's own order.

    Constant rows: w. Linear rows: w·k/(T−1), the paper's annealing.
    """
    return torch.where(is_linear_B, scale_B * (index / (num_patches - 1)), scale_B)


def guide(guided_BD: Tensor, unguided_BD: Tensor, weight_B: Tensor) -> Tensor:
    """v + w (v − v_u), row by row."""
    return guided_BD + weight_B.unsqueeze(-1) * (guided_BD - unguided_BD)
