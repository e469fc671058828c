"""Both ways to attend give the same, and a model that is served always takes torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import LONGEST_WRITTEN_OUT, causal_attention


def inputs(T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a model makes them: views of one tensor."""
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(3, T, 3, 2, 32, generator=generator).to(dtype).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def with_gradients(y: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach().float(), *(g.float() for g in torch.autograd.grad((y * weights).sum(), parts))]


# Its logits are rounded: where they are large, so is what that costs.
@pytest.mark.parametrize(("sharpness", "times"), [(1, 2), (3, 15)])
@pytest.mark.parametrize("T", [1, 2, 49, 130])
def test_written_out_it_is_near_to_the_exact_one_beside_torchs_kernel(T: int, sharpness: int, times: int) -> None:
    q, k, v = inputs(T, torch.bfloat16)
    half = ((q * sharpness).detach().requires_grad_(), (k * sharpness).detach().requires_grad_(), v)
    wide = tuple(x.detach().double().requires_grad_() for x in half)
    exact = with_gradients(F.scaled_dot_product_attention(*wide, is_causal=True), wide)
    ours = with_gradients(causal_attention(*half, training=True), half)
    kernel = with_gradients(causal_attention(*half, training=False), half)
    for expected, mine, theirs in zip(exact, ours, kernel, strict=True):
        size = expected.square().mean().sqrt()
        error, error_of_kernel = ((x - expected).square().mean().sqrt() for x in (mine, theirs))
        assert error <= times * error_of_kernel + 1e-3 * size
        assert error <= 0.02 * size


def test_no_patch_sees_those_behind_it() -> None:
    q, k, v = inputs(9, torch.bfloat16)
    y = causal_attention(q, k, v, training=True)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[:, :, 5:], changed_v[:, :, 5:] = 7, -3
    again = causal_attention(q, changed_k, changed_v, training=True)
    assert torch.equal(y[:, :, :5], again[:, :, :5])
    assert not torch.equal(y[:, :, 5:], again[:, :, 5:])


@pytest.mark.parametrize(
    ("T", "dtype", "training"),
    [
        (49, torch.bfloat16, False),
        (49, torch.float32, True),
        (LONGEST_WRITTEN_OUT + 1, torch.bfloat16, True),
    ],
)
def test_everywhere_else_it_is_torchs_kernel(T: int, dtype: torch.dtype, training: bool) -> None:
    q, k, v = inputs(T, dtype)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(causal_attention(q, k, v, training=training), expected)
