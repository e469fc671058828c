"""TarFlow, the transformer autoregressive flow, read from leaf to root.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329), section 2. The options
of STARFlow (Gu et al., arXiv 2506.06276): blocks of different depth, of which some do not see the class, and another
way from the network to the scale.

Shape legend: B batch, T patches, D values per patch, C colour channels, H attention heads,
E size of a head, W transformer width. Log-determinants are in nats, summed over all dimensions of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import causal_attention
from model.config import EMBEDDING_STD, FlowConfig

NO_CLASS = -1
"""Label of a row without a class; its embedding is the mean of the class embeddings."""
SOFTPLUS_IS_ONE = math.log(math.e - 1)
"""Where softplus is 1."""


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precisions to float32 and leave float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) image to (B, T, D) patches in raster order; channel-major inside a patch."""
    batch, channels, height, width = image_BCHW.shape
    # As views: torch's unfold and fold take as long as a layer of a small model.
    tiles = image_BCHW.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch_size**2)


def unpatchify(patches_BTD: Tensor, patch_size: int, image_size: int) -> Tensor:
    """Inverse of :func:`patchify`: (B, T, D) patches to a (B, C, H, W) image."""
    batch, side = len(patches_BTD), image_size // patch_size
    tiles = patches_BTD.reshape(batch, side, side, -1, patch_size, patch_size)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, image_size, image_size)


class LayerNorm(nn.LayerNorm):
    """Layer normalization computed in at least float32, returned in the input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class WideLinear(nn.Linear):
    """A linear layer that autocast leaves in its weights' precision: where the flow's values enter and leave a block.

    Just below one bfloat16 has steps of 1/256, half of an 8-bit value's interval: a mean that is rounded so cannot say
    where in the interval a pixel lies. These products are the smallest of a block.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Causal multi-head self-attention with a pre-norm."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor, inverse_temperature: Tensor | None = None) -> Tensor:
        """Attend causally; ``inverse_temperature`` (B, 1, 1, 1) multiplies the attention logits of each row (1/τ)."""
        B, T, W = x_BTW.shape
        qkv = self.qkv(self.norm(x_BTW)).view(B, T, 3, W // self.head_dim, self.head_dim)
        q_BHTE, k_BHTE, v_BHTE = qkv.permute(2, 0, 3, 1, 4)
        if inverse_temperature is not None:
            q_BHTE = q_BHTE * inverse_temperature.to(q_BHTE.dtype)
        y_BHTE = causal_attention(q_BHTE, k_BHTE, v_BHTE, training=self.training)
        return self.out(y_BHTE.transpose(1, 2).reshape(B, T, W))


class MLP(nn.Module):
    """Position-wise feed-forward network with a pre-norm and exact GELU."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.up = nn.Linear(width, width * expansion)
        self.down = nn.Linear(width * expansion, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x_BTW))))


class Layer(nn.Module):
    """One transformer layer: attention and MLP, each with a residual connection."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.head_dim)
        self.mlp = MLP(config.width, config.expansion)

    def forward(self, x_BTW: Tensor, inverse_temperature: Tensor | None = None) -> Tensor:
        x_BTW = x_BTW + self.attention(x_BTW, inverse_temperature)
        return x_BTW + self.mlp(x_BTW)


def affine_parameters(values_2D: Tensor, config: FlowConfig) -> Tensor:
    """α and μ (…, 2, D) in at least float32 from what a block's output layer gives, (…, 2D), or (…, D) for μ alone."""
    values = at_least_float32(values_2D)
    if config.soft_clip:
        values = config.soft_clip * torch.tanh(values / config.soft_clip)
    if config.volume_preserving:
        return torch.stack([torch.zeros_like(values), values], dim=-2)
    values = values.unflatten(-1, (2, -1))
    if config.scale_function == "exp":
        return values
    scale, mu = values.unbind(-2)
    scale = F.softplus(scale + SOFTPLUS_IS_ONE)
    # Where it underflows a smallest scale is left: its logarithm must be a number.
    return torch.stack([scale.clamp(min=torch.finfo(scale.dtype).tiny).log(), mu], dim=-2)


class Block(nn.Module):
    """One flow step: z_i = (x_i − μ_i(x_<i))·exp(−α_i(x_<i)), z_0 = x_0 (paper, equation 4).

    ``reverse`` blocks read the patches in opposite order. :meth:`forward` takes and returns image order;
    its inverse is in :mod:`model.sampling`.
    """

    def __init__(self, config: FlowConfig, number: int) -> None:
        """``number`` counts from the data to the noise."""
        super().__init__()
        self.config = config
        self.reverse = bool(number % 2)
        self.volume_preserving = config.volume_preserving
        self.conditioned = config.is_conditioned(number)
        self.proj_in = WideLinear(config.patch_dim, config.width)
        self.position = nn.Parameter(EMBEDDING_STD * torch.randn(config.num_patches, config.width))
        self.class_embedding = (
            nn.Parameter(EMBEDDING_STD * torch.randn(config.num_classes, config.width)) if self.conditioned else None
        )
        # The casts tell the type checker what nn.ModuleList forgets.
        self.layers = cast("Sequence[Layer]", nn.ModuleList(Layer(config) for _ in range(config.layer_counts[number])))
        outputs = config.patch_dim if config.volume_preserving else 2 * config.patch_dim
        self.proj_out = WideLinear(config.width, outputs)
        # Zero output weights: a new block is the identity map up to its bias.
        nn.init.zeros_(self.proj_out.weight)

    def spread_embeddings(self, std: float) -> None:
        """Widen or narrow a new block's embeddings to this standard deviation."""
        with torch.no_grad():
            self.position.mul_(std / EMBEDDING_STD)
            if self.class_embedding is not None:
                self.class_embedding.mul_(std / EMBEDDING_STD)

    def class_condition(self, y_B: Tensor | None) -> Tensor | None:
        """Class embeddings as (B, 1, W), or (1, W) when no row has a class, or None where no class enters."""
        if self.class_embedding is None:
            return None
        mean_W = self.class_embedding.mean(dim=0)
        if y_B is None:
            return mean_W.unsqueeze(0)
        given_BW = self.class_embedding[y_B.clamp(min=0)]
        return torch.where((y_B < 0).unsqueeze(-1), mean_W, given_BW).unsqueeze(1)

    def in_block_order(self, x_BT: Tensor) -> Tensor:
        """Change between image order and the block's own order (the change is its own inverse)."""
        return x_BT.flip(1) if self.reverse else x_BT

    def affine(
        self, x_BTD: Tensor, y_B: Tensor | None, inverse_temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """α and μ (B, T, D) for all patches of a sequence in block order; zero for the first patch."""
        position_TW = self.position.flip(0) if self.reverse else self.position
        h_BTW = self.proj_in(x_BTD) + position_TW
        condition = self.class_condition(y_B)
        if condition is not None:
            h_BTW = h_BTW + condition
        for layer in self.layers:
            h_BTW = layer(h_BTW, inverse_temperature)
        # The outputs at patch i are the parameters of patch i+1.
        alpha, mu = affine_parameters(self.proj_out(h_BTW[:, :-1]), self.config).unbind(-2)
        return F.pad(alpha, (0, 0, 1, 0)), F.pad(mu, (0, 0, 1, 0))

    def forward(self, x_BTD: Tensor, y_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise: returns z (B, T, D) and the log-scale α (B, T, D), both in image order.

        The block's log-determinant is −Σ α.
        """
        x_BTD = self.in_block_order(x_BTD)
        alpha, mu = self.affine(x_BTD, y_B)
        z_BTD = (x_BTD - mu) * torch.exp(-alpha)
        return self.in_block_order(z_BTD), self.in_block_order(alpha)


class Flow(nn.Module):
    """The whole flow: an image's patches to latents z with prior N(0, prior_variance)."""

    prior_variance: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        blocks = [Block(config, number) for number in range(config.num_blocks)]
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        # (T, D); stays at one unless the flow is volume preserving.
        self.register_buffer("prior_variance", torch.ones(config.num_patches, config.patch_dim))

    def trace(self, x_BTD: Tensor, y_B: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Per block the pair (z, α), both (B, T, D) in image order; the last z is the latent."""
        steps = []
        for block in self.blocks:
            x_BTD, alpha = block(x_BTD, y_B)
            steps.append((x_BTD, alpha))
        return steps

    def forward(self, x_BTD: Tensor, y_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches (B, T, D) to latents z (B, T, D) and logdet (B,) in nats, summed per image.

        ``y_B`` holds class indices with :data:`NO_CLASS` for none; ``None`` means no class for all.
        """
        logdet_B = torch.zeros(x_BTD.shape[0], dtype=at_least_float32(x_BTD).dtype, device=x_BTD.device)
        for block in self.blocks:
            x_BTD, alpha = block(x_BTD, y_B)
            logdet_B = logdet_B - alpha.sum(dim=(1, 2))
        return x_BTD, logdet_B

    def patchify(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, T, D) patches."""
        return patchify(image_BCHW, self.config.patch_size)

    def unpatchify(self, patches_BTD: Tensor) -> Tensor:
        """(B, T, D) patches to (B, C, H, W) images."""
        return unpatchify(patches_BTD, self.config.patch_size, self.config.image_size)
