"""Sequential decoding: one patch after another with a preallocated key-value cache.

Exact by construction. The class pass and the pass that guidance compares with run as one batch, and
rows without guidance take no second pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.flow import Block, Flow, LayerCache, at_least_float32
from model.guidance import guide, patch_weight
from model.sampling.rows import Progress, Rows, Slices


def _allocate(flow: Flow, num_rows: int, like: Tensor) -> list[LayerCache]:
    """Caches for the deepest block; shallower blocks use the first of them."""
    config = flow.config
    shape = (num_rows, config.num_heads, config.num_patches, config.head_dim)
    dtype = flow.blocks[0].proj_in.weight.dtype
    return [
        LayerCache(
            torch.empty(shape, dtype=dtype, device=like.device),
            torch.empty(shape, dtype=dtype, device=like.device),
        )
        for _ in range(max(config.layer_counts))
    ]


class _BlockDecoder:
    """State of one block's inversion for a set of rows; rebuilt when rows leave."""

    def __init__(self, block: Block, rows: Rows) -> None:
        self.block, self.rows = block, rows
        self.guided = rows.guided
        labels = rows.label_B
        self.inverse_temperature: Tensor | None = None
        if len(self.guided):
            unguided = torch.full_like(labels[self.guided], -1)
            labels = torch.cat([labels, unguided])
            temperature = torch.cat([torch.ones_like(rows.temperature_B), rows.temperature_B[self.guided]])
            if bool((temperature != 1).any()):
                self.inverse_temperature = (1 / temperature).view(-1, 1, 1, 1)
        self.condition = block.class_condition(labels)
        self.weights = rows.scale_B[self.guided], rows.is_linear_B[self.guided]
        self.guides = rows.guides_scale_B[self.guided], rows.guides_shift_B[self.guided]

    def parameters(self, x_BD: Tensor, index: int, num_patches: int, caches: list[LayerCache]) -> tuple[Tensor, Tensor]:
        """Guided α and μ (B, D) of patch ``index + 1``, given patch ``index``."""
        num_rows = len(self.rows)
        if len(self.guided):
            x_BD = torch.cat([x_BD, x_BD[self.guided]])
        alpha, mu = self.block.step(x_BD, index, self.condition, caches, self.inverse_temperature)
        if not len(self.guided):
            return alpha, mu
        weight = patch_weight(*self.weights, index + 1, num_patches)
        guided = []
        for value, is_guided in zip((alpha, mu), self.guides, strict=True):
            own, other = value[:num_rows], value[num_rows:]
            guided.append(own.index_copy(0, self.guided, guide(own[self.guided], other, weight * is_guided)))
        return guided[0], guided[1]


@torch.no_grad()
def decode(flow: Flow, rows: Rows) -> Slices:
    """Latents to patches x (B, T, D) in image order, yielding after every patch of every block.

    Sending a tensor of row indices keeps only those rows; the result then has only them.
    """
    config = flow.config
    num_patches, num_blocks = config.num_patches, config.num_blocks
    x_BTD = rows.latent_BTD * flow.prior_variance.sqrt().to(rows.latent_BTD.dtype)
    caches = _allocate(flow, len(rows) + len(rows.guided), x_BTD)
    for done, block in enumerate(reversed(flow.blocks)):
        z_BTD = block.in_block_order(x_BTD)
        x_BTD = z_BTD.clone()
        decoder = _BlockDecoder(block, rows)
        layers = caches[: len(block.layers)]
        for index in range(num_patches - 1):
            alpha, mu = decoder.parameters(x_BTD[:, index], index, num_patches, layers)
            x_BTD[:, index + 1] = z_BTD[:, index + 1] * torch.exp(alpha) + mu
            fraction = (done + (index + 1) / (num_patches - 1)) / num_blocks
            keep = yield Progress(done, num_blocks, fraction)
            if keep is not None:
                # The cache holds the rows' own pass first and the second pass of guided rows after it.
                first, rows = len(rows), rows.select(keep)
                second = first + torch.searchsorted(decoder.guided, keep[rows.guided])
                kept = torch.cat([keep, second])
                for cache in caches:
                    cache.key_BHTE, cache.value_BHTE = cache.key_BHTE[kept], cache.value_BHTE[kept]
                z_BTD, x_BTD = z_BTD[keep], x_BTD[keep]
                decoder = _BlockDecoder(block, rows)
        x_BTD = block.in_block_order(x_BTD)
    return at_least_float32(x_BTD)
