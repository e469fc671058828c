"""The decoding step as a CUDA graph needs it: the same operations on the same addresses, whatever is decoded.

It says once more what :meth:`BlockKernel.run`, :class:`Guidance` and :class:`BlockSolver` do for one patch. All
that changes from step to step is on the device, the position too, and all that changes from batch to batch is in
buffers that are filled when a block starts. A step attends to the first L patches of the memory and hides those that
are not there yet.

Shapes: R network rows that the buffers have room for; B images of a batch and G of them guided, B + G <= R.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import FlowConfig
from model.flow import NO_CLASS, affine_parameters, at_least_float32
from model.guidance import guide_closed_form, guide_linear, patch_weights
from model.sampling.guided import Guidance
from model.sampling.kernel import BlockKernel, Memory
from model.sampling.rows import Rows


def cache_lengths(num_patches: int) -> list[int]:
    """Lengths that steps attend to: eighths of the sequence, but multiples of 8, to which attention aligns its mask."""
    step = 8 * math.ceil(num_patches / 64)
    return list(range(step, num_patches - 1 + step, step))


class Variant(NamedTuple):
    """What a batch needs of a step besides the network."""

    guided: bool
    tempered: bool
    closed_form: bool


class StepBuffers:
    """All that a step reads and writes besides weights, where it stays.

    Network row r takes the patch of image ``source_R[r]``. Image b's own pass is row b, and the one that guidance
    compares with is row ``second_R[b]``; where there is none, that is b itself. Latents and values have R rows
    too, so that R is the only size; what becomes of those beyond the batch is never looked at.
    """

    def __init__(self, config: FlowConfig, num_rows: int, dtype: torch.dtype, z_TBD: Tensor) -> None:
        """``dtype`` is that of the weights, ``z_TBD`` latents like those to come."""
        T, R, D, W = config.num_patches, num_rows, config.patch_dim, config.width
        self.num_patches, self.num_rows = T, R
        capacity = max(T, cache_lengths(T)[-1])

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=z_TBD.device)

        qkv = [zeros(capacity, R, 3 * W, dtype=dtype) for _ in range(max(config.layer_counts))]
        self.memory = Memory(config, R, dtype, lambda: qkv)
        self.position_1, self.zero_1 = zeros(1, dtype=torch.long), zeros(1, dtype=dtype)
        self.hidden_L = zeros(capacity, dtype=dtype)  # 0 where a patch is in the memory, else −∞: added to logits
        self.z_TRD, self.x_TRD = zeros(T, R, D, dtype=z_TBD.dtype), zeros(T, R, D, dtype=z_TBD.dtype)
        self.source_R, self.second_R = zeros(R, dtype=torch.long), zeros(R, dtype=torch.long)
        self.offset_RW, self.inverse_temperature_R1 = zeros(R, W, dtype=dtype), zeros(R, 1, dtype=dtype)
        self.weight_TR21 = zeros(T, R, 2, 1, dtype=torch.promote_types(dtype, torch.float32))
        self.closed_form_R11 = zeros(R, 1, 1, dtype=torch.bool)

    def load(self, kernel: BlockKernel, rows: Rows, guidance: Guidance) -> Variant:
        """Take what a block needs of the rows."""
        B, used, guided = guidance.num_rows, guidance.num_passes, guidance.guided
        place_R = torch.arange(self.num_rows, device=guided.device)
        self.source_R.zero_()
        self.source_R[:used] = torch.cat([place_R[:B], guided])
        self.second_R.copy_(place_R)
        self.second_R[guided] = place_R[B:used]
        label_R = torch.full_like(place_R, NO_CLASS)
        label_R[:used] = guidance.label_R
        self.offset_RW.copy_(kernel.offset(label_R))
        self.inverse_temperature_R1.fill_(1)
        tempered = guidance.inverse_temperature_R is not None
        if guidance.inverse_temperature_R is not None:
            self.inverse_temperature_R1[:used, 0] = guidance.inverse_temperature_R.to(kernel.dtype)
        weight_BT = patch_weights(at_least_float32(rows.scale_B), rows.schedule_B, self.num_patches)
        weight_TB21 = (weight_BT.t().unsqueeze(2) * rows.target_B2).unsqueeze(3)
        self.weight_TR21.zero_()
        self.weight_TR21[:, guided] = weight_TB21[:, guided].to(self.weight_TR21.dtype)
        self.closed_form_R11.zero_()
        self.closed_form_R11[guided, 0, 0] = rows.closed_form_B[guided]
        return Variant(len(guided) > 0, tempered, bool(self.closed_form_R11.any()))

    def seek(self, position: int) -> None:
        """The next step takes the patch at ``position``; those before it are in the memory."""
        self.position_1.fill_(position)
        self.hidden_L.fill_(-math.inf)
        self.hidden_L[:position] = 0

    def start(self, z_TBD: Tensor) -> None:
        """Begin a block of the rows that were loaded."""
        # Hidden values count for nothing times what they are, which must not be what a row left that overflowed.
        for held in self.memory.qkv:
            held.zero_()
        self.z_TRD.zero_()
        self.z_TRD[:, : z_TBD.shape[1]] = z_TBD
        self.x_TRD.copy_(self.z_TRD)
        self.seek(0)

    def randomize(self, start: int, stop: int, generator: torch.Generator) -> None:
        """Something else in the memory from ``start`` to ``stop``."""
        for held in self.memory.qkv:
            held[start:stop].normal_(generator=generator)


def decode_step(kernel: BlockKernel, buffers: StepBuffers, length: int, variant: Variant) -> None:
    """x_{i+1} = z_{i+1}·exp(α) + μ for the position i in the buffers, which then moves on.

    Equals :meth:`BlockKernel.run` with N = 1, :meth:`Guidance.combine` and the update of :class:`BlockSolver`, as
    long as i < ``length``. Shapes are static, and nothing waits for the device or asks it.
    """
    position_1, R = buffers.position_1, buffers.num_rows
    following_1 = position_1 + 1
    x_RD = buffers.x_TRD.index_select(0, position_1)[0].index_select(0, buffers.source_R)
    base_RW = buffers.offset_RW + kernel.position_TW.index_select(0, position_1)
    h = torch.addmm(base_RW, x_RD.to(kernel.dtype), kernel.proj_in)
    buffers.hidden_L.index_copy_(0, position_1, buffers.zero_1)
    mask = buffers.hidden_L[:length].view(1, 1, 1, length)
    shape = (kernel.width,)
    for index, layer in enumerate(kernel.layers):
        norm, norm_bias, qkv, qkv_bias, out, bias, mlp_norm, mlp_norm_bias, up, up_bias, down, down_bias = layer
        y = torch.layer_norm(h, shape, norm, norm_bias, kernel.eps)
        held = torch.addmm(qkv_bias, y, qkv)
        if variant.tempered:
            held[:, : kernel.width].mul_(buffers.inverse_temperature_R1)
        buffers.memory.qkv[index].index_copy_(0, position_1, held.unsqueeze(0))
        _, key, value = buffers.memory.heads(index, 0, length)
        query = held[:, : kernel.width].unflatten(1, (key.shape[1], 1, key.shape[3]))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        h.add_(torch.addmm(bias, y.reshape(R, -1), out))
        y = torch.layer_norm(h, shape, mlp_norm, mlp_norm_bias, kernel.eps)
        h.add_(torch.addmm(down_bias, F.gelu(torch.addmm(up_bias, y, up)), down))
    result_R2D = affine_parameters(torch.addmm(kernel.out_bias, h, kernel.proj_out), kernel.block.config)
    if variant.guided:
        result_R2D = _guide(result_R2D, buffers, following_1, variant)
    z_RD = buffers.z_TRD.index_select(0, following_1)[0]
    x_RD = torch.addcmul(result_R2D[:, 1], z_RD, result_R2D[:, 0].exp())
    buffers.x_TRD.index_copy_(0, following_1, x_RD.unsqueeze(0))
    position_1.copy_(following_1)


def _guide(own_R2D: Tensor, buffers: StepBuffers, position_1: Tensor, variant: Variant) -> Tensor:
    """Guided α and μ; those of rows without a second pass as they are, since their weight is 0."""
    other_R2D = own_R2D.index_select(0, buffers.second_R)
    weight_R21 = buffers.weight_TR21.index_select(0, position_1)[0]
    linear_R2D = guide_linear(own_R2D, other_R2D, weight_R21)
    if not variant.closed_form:
        return linear_R2D
    (alpha, mu), (other_alpha, other_mu) = own_R2D.unbind(1), other_R2D.unbind(1)
    closed_R2D = torch.stack(guide_closed_form(alpha, mu, other_alpha, other_mu, weight_R21[:, 0]), dim=1)
    return torch.where(buffers.closed_form_R11, closed_R2D, linear_R2D)
