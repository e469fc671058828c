"""The official training step, with the weak points that are known of it.

Written from the description of the official program: attention with a dense mask, which keeps a GPU from its fast
kernels, patches by unfold, AdamW as torch runs it by default. It neither clips gradients nor averages weights, which
ours does within its time. The weights, and what is computed with them, are the same as ours.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flow import NO_CLASS, Attention, Flow
from model.likelihood import add_noise
from training.config import TrainConfig


def _dense(attention: Attention, mask_TT: Tensor, x_BTW: Tensor, inverse_temperature: Tensor | None = None) -> Tensor:
    """What :class:`model.flow.Attention` computes, with a mask in place of the knowledge that it is causal."""
    del inverse_temperature
    B, T, W = x_BTW.shape
    qkv = attention.qkv(attention.norm(x_BTW)).view(B, T, 3, W // attention.head_dim, attention.head_dim)
    q_BHTE, k_BHTE, v_BHTE = qkv.permute(2, 0, 3, 1, 4)
    y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask_TT)
    return attention.out(y_BHTE.transpose(1, 2).reshape(B, T, W))


class PublishedTraining:
    """The official loop over batches; construct, then call for each batch."""

    def __init__(self, config: TrainConfig, device: torch.device, *, bf16: bool) -> None:
        options = config.optimization
        torch.manual_seed(config.seed)
        self.config, self.device, self.bf16 = config, device, bf16
        self.flow = Flow(config.flow).to(device)
        count = config.flow.num_patches
        mask_TT = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        for block in self.flow.blocks:
            for layer in block.layers:
                layer.attention.__dict__["forward"] = partial(_dense, layer.attention, mask_TT)
        self.optimizer = torch.optim.AdamW(
            self.flow.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )

    def __call__(self, pixels: Tensor, labels: Tensor) -> float:
        """One step on 8-bit images (B, C, H, W) with labels (B,); returns the loss per dimension."""
        config, size = self.config.flow, self.config.flow.patch_size
        pixels = pixels.to(self.device)
        if self.config.data.flip:
            flipped = torch.rand(len(pixels), 1, 1, 1, device=self.device) < 0.5
            pixels = torch.where(flipped, pixels.flip(3), pixels)
        sample = torch.randn if self.config.noise.kind == "gaussian" else torch.rand
        image = add_noise(pixels, self.config.noise, sample(pixels.shape, device=self.device))
        x_BTD = F.unfold(image, size, stride=size).transpose(1, 2)
        y_B = None
        if config.num_classes:
            dropped = torch.rand(len(labels), device=self.device) < self.config.optimization.label_drop
            y_B = torch.where(dropped, NO_CLASS, labels.to(self.device))
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            z_BTD, logdet_B = self.flow(x_BTD, y_B)
        loss = 0.5 * z_BTD.square().mean() - logdet_B.mean() / config.num_dims
        loss.backward()
        self.optimizer.step()
        return loss.item()
