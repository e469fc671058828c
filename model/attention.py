"""Causal attention over a whole sequence, by the fastest way to its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_WRITTEN_OUT = 512
"""Patches up to which matrix products win over torch's kernel on a CPU in bf16 (at 1,024 they do not)."""


def causal_attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, *, training: bool) -> Tensor:
    """Attention of each patch to itself and those before it: (B, H, T, E).

    On a CPU in bf16 torch's fused kernel takes for its gradient several times what matrix products take, so in
    ``training`` they take its place; their logits are rounded to bf16. Everywhere else it is torch's kernel.
    """
    if training and q_BHTE.device.type == "cpu" and q_BHTE.dtype == torch.bfloat16:
        B, H, T, E = q_BHTE.shape
        if T <= LONGEST_WRITTEN_OUT:
            q, k, v = (x_BHTE.reshape(B * H, T, E) for x_BHTE in (q_BHTE, k_BHTE, v_BHTE))
            future_TT = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
            logits = torch.baddbmm(future_TT.expand(B * H, T, T), q, k.transpose(1, 2), alpha=E**-0.5)
            return (logits.softmax(dim=-1) @ v).view(B, H, T, E)
    return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
