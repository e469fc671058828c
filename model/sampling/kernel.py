"""One block's transformer as plain tensor operations on preallocated memory: what sampling runs.

The modules of :mod:`model.flow` say what the network is; this says the same with fewer and larger steps.
A pass takes N patches of R rows at positions ``start``…``start + N − 1`` of a block's own order, sees the
prefix in the memory, and appends itself to it: N = 1 is a decoding step, N = T a parallel pass.

Everything is token-major, (N, R, …): a decoding step then writes one contiguous piece, and the attention
of all rows reads from the memory without a copy. R counts network rows: an image's own pass, and for guided
images one more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from model.config import FlowConfig
from model.flow import Block, Flow, affine_parameters

SMALL = 2**14
"""Values up to which starting a kernel costs more than what it computes."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for attention when sampling. On recent GPUs torch prefers cuDNN's in bfloat16, which take tens of
milliseconds to plan for every new number of keys; decoding has a new one at every step."""
View = tuple[Tensor, Tensor, Tensor]


class Memory:
    """Queries, keys and values of up to ``num_layers`` layers, T patches and R rows, preallocated.

    Blocks use it one after another. It belongs to one sampler in flight.
    """

    def __init__(
        self, config: FlowConfig, num_rows: int, dtype: torch.dtype, make_qkv: Callable[[], list[Tensor]]
    ) -> None:
        self._config, self._make_qkv = config, make_qkv
        self.num_rows = num_rows
        """Network rows R."""
        self.dtype = dtype
        """Precision of what is held."""
        self._steps: dict[tuple[int, int], View] = {}

    @classmethod
    def allocate(cls, config: FlowConfig, num_rows: int, dtype: torch.dtype, device: torch.device) -> Memory:
        """Memory for the deepest block; shallower ones use a part of it."""
        shape = (config.num_patches, num_rows, 3 * config.width)
        layers = range(max(config.layer_counts))
        # On a GPU torch keeps what is freed, so a batch of a size that was there before costs no allocation.
        return cls(config, num_rows, dtype, lambda: [torch.empty(shape, dtype=dtype, device=device) for _ in layers])

    @cached_property
    def qkv(self) -> list[Tensor]:
        """For each layer (T, R, 3W); made when first used, since captured steps have a memory of their own."""
        return self._make_qkv()

    def first_layers(self, count: int) -> Memory:
        """The memory of the first ``count`` layers alone, itself and no copy: what a block of that depth uses."""
        part = Memory(self._config, self.num_rows, self.dtype, lambda: self.qkv[:count])
        part._steps = self._steps
        return part

    def select(self, index: Tensor, num_patches: int) -> Memory:
        """A copy that holds the first ``num_patches`` patches of the rows at ``index``."""
        qkv = [held.new_empty(len(held), len(index), held.shape[2]) for held in self.qkv]
        for new, held in zip(qkv, self.qkv, strict=True):
            torch.index_select(held[:num_patches], 1, index, out=new[:num_patches])
        return Memory(self._config, len(index), self.dtype, lambda: qkv)

    def restore(self, source: Memory, index: Tensor, source_index: Tensor, start: int, end: int) -> None:
        """Copy patches ``start``…``end − 1`` of rows at ``source_index`` of another memory to the rows at ``index``."""
        for own, other in zip(self.qkv, source.qkv, strict=True):
            own[start:end, index] = other[start:end, source_index]

    def heads(self, layer: int, start: int, end: int) -> View:
        """Views (R, H, N, E) of the queries from ``start``, and of the keys and values from 0, up to ``end``."""
        # A decoding step's views are the same for every block, and making them costs as much as a small product.
        known = self._steps.get((layer, start)) if end == start + 1 else None
        if known is not None:
            return known
        heads = self.qkv[layer].unflatten(2, (3, self._config.num_heads, self._config.head_dim))
        # (T, R, 3, H, E) to three of (R, H, T, E).
        query, key, value = heads.permute(2, 1, 3, 0, 4).unbind(0)
        view = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        if end == start + 1:
            self._steps[layer, start] = view
        return view


class BlockKernel:
    """A block's weights in one precision, and its passes."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        # Where the precision is the module's own these are its tensors, not copies.
        def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensor.detach().to(dtype) for tensor in tensors)

        self.block = block
        self.dtype = dtype
        self.width = block.proj_in.out_features
        self.eps = block.layers[0].attention.norm.eps
        position = block.position.flip(0) if block.reverse else block.position
        self.proj_in, self.in_bias, self.position_TW = cast(block.proj_in.weight.t(), block.proj_in.bias, position)
        self.proj_out, self.out_bias = cast(block.proj_out.weight.t(), block.proj_out.bias)
        self.layers = [
            cast(
                layer.attention.norm.weight,
                layer.attention.norm.bias,
                layer.attention.qkv.weight.t(),
                layer.attention.qkv.bias,
                layer.attention.out.weight.t(),
                layer.attention.out.bias,
                layer.mlp.norm.weight,
                layer.mlp.norm.bias,
                layer.mlp.up.weight.t(),
                layer.mlp.up.bias,
                layer.mlp.down.weight.t(),
                layer.mlp.down.bias,
            )
            for layer in block.layers
        ]

    def offset(self, label_R: Tensor) -> Tensor:
        """What every patch of a row starts from besides its values: input bias and class, (R, W)."""
        condition = self.block.class_condition(label_R)
        if condition is None:
            return self.in_bias.expand(len(label_R), -1)
        return self.in_bias + condition.squeeze(1).to(self.dtype)

    def run(
        self, x_NRD: Tensor, start: int, offset_RW: Tensor, inverse_temperature_R: Tensor | None, memory: Memory
    ) -> Tensor:
        """α and μ, (N, R, 2, D) in at least float32, of the patches that follow the N given ones.

        All patches before ``start`` are in ``memory``, which takes the N of this pass.
        """
        N, R, _ = x_NRD.shape
        end = start + N
        base = offset_RW + self.position_TW[start:end].unsqueeze(1)
        h = torch.addmm(base.view(N * R, -1), x_NRD.reshape(N * R, -1).to(self.dtype), self.proj_in)
        shape = (self.width,)
        mask = _causal(N, start, h) if start and N > 1 else None
        for index, layer in enumerate(self.layers):
            norm, norm_bias, qkv, qkv_bias, out, bias, mlp_norm, mlp_norm_bias, up, up_bias, down, down_bias = layer
            y = torch.layer_norm(h, shape, norm, norm_bias, self.eps)
            held = memory.qkv[index][start:end]
            torch.addmm(qkv_bias, y, qkv, out=held.view(N * R, -1))
            if inverse_temperature_R is not None:
                held[:, :, : self.width].mul_(inverse_temperature_R.to(self.dtype).view(1, R, 1))
            query, key, value = memory.heads(index, start, end)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=N > 1 and mask is None)
            h.add_(torch.addmm(bias, y.permute(2, 0, 1, 3).reshape(N * R, -1), out))
            y = torch.layer_norm(h, shape, mlp_norm, mlp_norm_bias, self.eps)
            h.add_(torch.addmm(down_bias, _gelu(torch.addmm(up_bias, y, up)), down))
        return affine_parameters(torch.addmm(self.out_bias, h, self.proj_out).view(N, R, -1), self.block.config)


def _gelu(x: Tensor) -> Tensor:
    """Exact GELU."""
    if x.device.type == "cpu" and x.numel() < SMALL and x.numel() % 2 == 0:
        # torch hands contiguous values to oneDNN, which takes ten times longer to start than these take to compute.
        return F.gelu(x.view(2, -1).t()).t().view_as(x)
    return F.gelu(x)


def _causal(num_queries: int, start: int, like: Tensor) -> Tensor:
    """Which of ``start`` + N keys each of the last N patches sees, (N, start + N)."""
    if like.device.type == "cuda":
        # Flash attention takes no mask but this one. Its import is slow, so it is here.
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(num_queries, start + num_queries)
    ones = torch.ones(num_queries, start + num_queries, dtype=torch.bool, device=like.device)
    return ones.tril(diagonal=start)


class FlowKernel:
    """All blocks of a flow in one precision, in the order of sampling: the block next to the noise first."""

    def __init__(self, flow: Flow, dtype: torch.dtype | None = None) -> None:
        self.flow = flow
        self.dtype = dtype or flow.blocks[0].proj_in.weight.dtype
        self.blocks = [BlockKernel(block, self.dtype) for block in reversed(flow.blocks)]
