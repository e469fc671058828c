"""The official sampling loop, with the weak points that are known of it.

Written from the description of the official program: keys and values are kept in lists that are
concatenated anew for every patch in every layer, guidance takes a separate pass without class, and
the mean of the class embeddings is computed for every patch. The images are the same as ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published.guidance import Guidance, combine
from model.flow import Block, Flow, Layer, affine_parameters

Cache = list[tuple[list[Tensor], list[Tensor]]]
"""Per layer the keys and the values seen so far, one tensor a patch."""


def _layer_step(layer: Layer, x_B1W: Tensor, keys: list[Tensor], values: list[Tensor], temperature: float) -> Tensor:
    attention = layer.attention
    batch, _, width = x_B1W.shape
    qkv = attention.qkv(attention.norm(x_B1W)).view(batch, 1, 3, -1, attention.head_dim)
    q_BH1E, k_BH1E, v_BH1E = qkv.permute(2, 0, 3, 1, 4)
    keys.append(k_BH1E)
    values.append(v_BH1E)
    y_BH1E = F.scaled_dot_product_attention(
        q_BH1E, torch.cat(keys, dim=2), torch.cat(values, dim=2), scale=attention.head_dim**-0.5 / temperature
    )
    x_B1W = x_B1W + attention.out(y_BH1E.transpose(1, 2).reshape(batch, 1, width))
    return x_B1W + layer.mlp(x_B1W)


def _block_step(
    block: Block, x_B1D: Tensor, index: int, y_B: Tensor | None, cache: Cache, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """α and μ (B, D) of patch ``index + 1``."""
    position_TW = block.position.flip(0) if block.reverse else block.position
    x_B1W = block.proj_in(x_B1D) + position_TW[index : index + 1]
    if block.class_embedding is not None:
        mean_1W = block.class_embedding.mean(dim=0, keepdim=True)
        if y_B is None:
            x_B1W = x_B1W + mean_1W
        else:
            given_BW = block.class_embedding[y_B.clamp(min=0)]
            x_B1W = x_B1W + torch.where((y_B < 0).unsqueeze(1), mean_1W, given_BW).unsqueeze(1)
    for layer, (keys, values) in zip(block.layers, cache, strict=True):
        x_B1W = _layer_step(layer, x_B1W, keys, values, temperature)
    alpha, mu = affine_parameters(block.proj_out(x_B1W).squeeze(1), block.config).unbind(-2)
    return alpha, mu


def invert(block: Block, z_BTD: Tensor, y_B: Tensor | None, guidance: Guidance) -> Tensor:
    """One block's x (B, T, D) from its z, both in the block's own order."""
    num_patches = z_BTD.shape[1]
    x_BTD = z_BTD.clone()
    own: Cache = [([], []) for _ in block.layers]
    other: Cache = [([], []) for _ in block.layers]
    for index in range(num_patches - 1):
        previous = x_BTD[:, index : index + 1]
        alpha, mu = _block_step(block, previous, index, y_B, own)
        if guidance.scale:
            unguided = _block_step(block, previous, index, None, other, guidance.attention_temperature)
            alpha, mu = combine((alpha, mu), unguided, guidance.weight(index + 1, num_patches))
        x_BTD[:, index + 1] = x_BTD[:, index + 1] * alpha.exp() + mu
    return x_BTD


@torch.no_grad()
def sample(
    flow: Flow,
    latent_BTD: Tensor,
    y_B: Tensor | None = None,
    guidance_scale: float = 0.0,
    linear: bool = False,
    attention_temperature: float = 1.0,
) -> Tensor:
    """Latents u to patches x (B, T, D), with one class, weight, schedule and temperature rule for all rows."""
    guidance = Guidance(guidance_scale, linear, attention_temperature)
    x_BTD = latent_BTD * flow.prior_variance.sqrt()
    for block in reversed(flow.blocks):
        x_BTD = block.in_block_order(invert(block, block.in_block_order(x_BTD), y_B, guidance))
    return x_BTD
