"""Laws of the architecture, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import EMBEDDING_STD, FlowConfig
from model.flow import NO_CLASS, Flow, LayerNorm, patchify, unpatchify
from model.likelihood import log_likelihood

MakeFlow = Callable[..., Flow]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_blocks": 2},
    {"num_blocks": 1},
    {"num_classes": 0},
    {"volume_preserving": True},
    {"channels": 3, "image_size": 4},
    {"layers_per_block": (1, 3, 1)},
    {"width": 24, "head_dim": 24},
    {"scale_function": "softplus"},
    {"soft_clip": 0.5},
    {"layers_per_block": (1, 1, 3), "conditioned_blocks": (2,), "scale_function": "softplus", "soft_clip": 1.5},
]


def images(flow: Flow, count: int, seed: int = 1) -> torch.Tensor:
    config = flow.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.num_patches, config.patch_dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("label", [NO_CLASS, 0])
def test_logdet_is_that_of_the_jacobian(make_flow: MakeFlow, variant: dict[str, Any], label: int) -> None:
    flow = make_flow(**variant)
    x_BTD, y = images(flow, 1), torch.tensor([label])
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, y)[0], x_BTD)
    sign, logabsdet = torch.linalg.slogdet(jacobian.reshape(flow.config.num_dims, -1))
    logdet = flow(x_BTD, y)[1]
    assert sign == 1
    torch.testing.assert_close(logdet[0], logabsdet, atol=1e-9, rtol=1e-9)
    if flow.config.volume_preserving:
        assert logdet.item() == 0
    else:
        assert abs(logdet.item()) > 0.01, "the law is tested on a flow that changes volume"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_blocks_are_autoregressive_in_alternating_directions(make_flow: MakeFlow, variant: dict[str, Any]) -> None:
    flow = make_flow(**variant)
    x_BTD = images(flow, 1)
    for number, block in enumerate(flow.blocks):
        jacobian = torch.autograd.functional.jacobian(lambda x, block=block: block(x)[0].sum(dim=(0, 2)), x_BTD)
        depends = jacobian.abs().sum(dim=(1, 3)) > 0
        causal = torch.ones_like(depends).tril()
        assert torch.equal(depends, causal if number % 2 == 0 else causal.T)


def test_trace_is_the_forward_pass_block_by_block(make_flow: MakeFlow) -> None:
    flow = make_flow()
    x_BTD, y = images(flow, 2), torch.tensor([0, NO_CLASS])
    z_BTD, logdet_B = flow(x_BTD, y)
    steps = flow.trace(x_BTD, y)
    assert torch.equal(steps[-1][0], z_BTD)
    torch.testing.assert_close(-sum(alpha.sum(dim=(1, 2)) for _, alpha in steps), logdet_B)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_receives_a_gradient(make_flow: MakeFlow, variant: dict[str, Any]) -> None:
    flow = make_flow(**variant).requires_grad_(True)
    labels = torch.arange(3) if flow.config.num_classes else None
    log_likelihood(flow, images(flow, 3), labels).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):
            # A bias of the keys adds the same to all logits of a query, which softmax ignores.
            q, k, v = parameter.grad.chunk(3)
            assert k.abs().max() < 1e-9
            assert (torch.cat([q, v]) != 0).all(), name
        elif name.endswith("position"):
            # The last patch in a block's own order tells nothing to the patches after it.
            last = 0 if int(name.split(".")[1]) % 2 else -1
            assert (parameter.grad[last] == 0).all()
            assert (parameter.grad != 0).all(dim=1).sum() == flow.config.num_patches - 1
        else:
            assert (parameter.grad != 0).all(), name


def test_a_new_flow_is_an_affine_map_of_its_output_bias() -> None:
    """Output weights start at zero, so training starts next to the identity."""
    flow = Flow(FlowConfig(image_size=8, channels=1, patch_size=2, width=64, num_blocks=2, layers_per_block=1))
    for block in flow.blocks:
        assert (block.proj_out.weight == 0).all()
        torch.nn.init.zeros_(block.proj_out.bias)
    x_BTD = torch.randn(2, 16, 4)
    z_BTD, logdet_B = flow(x_BTD)
    assert torch.equal(z_BTD, x_BTD)
    assert torch.equal(logdet_B, torch.zeros(2))


class TestClassCondition:
    def test_given_class_is_its_embedding_and_none_is_the_mean(self, make_flow: MakeFlow) -> None:
        block = make_flow().blocks[0]
        assert block.class_embedding is not None
        condition = block.class_condition(torch.tensor([2, NO_CLASS, 0]))
        assert condition is not None
        mean = block.class_embedding.mean(0)
        expected = torch.stack([block.class_embedding[2], mean, block.class_embedding[0]])
        assert torch.equal(condition, expected.unsqueeze(1))
        assert torch.equal(block.class_condition(None), mean.unsqueeze(0))

    def test_dropped_labels_equal_no_labels(self, make_flow: MakeFlow) -> None:
        flow = make_flow()
        x_BTD = images(flow, 3)
        for ours, theirs in zip(flow(x_BTD, torch.full((3,), NO_CLASS)), flow(x_BTD, None), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)

    def test_classes_matter_in_every_block(self, make_flow: MakeFlow) -> None:
        flow = make_flow()
        x_BTD = images(flow, 1).expand(2, -1, -1)
        for block in flow.blocks:
            z_BTD, _ = block(x_BTD, torch.tensor([0, 1]))
            assert (z_BTD[0] - z_BTD[1]).abs().max() > 1e-3

    def test_an_unconditional_flow_ignores_labels(self, make_flow: MakeFlow) -> None:
        flow = make_flow(num_classes=0)
        x_BTD = images(flow, 2)
        assert flow.blocks[0].class_condition(torch.tensor([0, 1])) is None
        assert torch.equal(flow(x_BTD, torch.tensor([0, 1]))[0], flow(x_BTD)[0])

    def test_a_label_beyond_the_classes_is_an_error(self, make_flow: MakeFlow) -> None:
        flow = make_flow()
        with pytest.raises(IndexError):
            flow(images(flow, 1), torch.tensor([3]))


def test_layers_per_block_may_differ(make_flow: MakeFlow) -> None:
    flow = make_flow(layers_per_block=(4, 1, 1))
    assert [len(block.layers) for block in flow.blocks] == [4, 1, 1]
    assert [block.reverse for block in flow.blocks] == [False, True, False]


def test_precision_is_at_least_float32(make_flow: MakeFlow) -> None:
    """Half-precision weights leave latents and logdet in float32; float64 stays float64."""
    flow = make_flow()
    x_BTD = images(flow, 2)
    exact_z, exact_logdet = flow(x_BTD)
    assert exact_z.dtype == exact_logdet.dtype == torch.float64
    for x in (x_BTD.float(), x_BTD.bfloat16()):
        z_BTD, logdet_B = make_flow(dtype=torch.bfloat16)(x)
        assert z_BTD.dtype == logdet_B.dtype == torch.float32
        assert (z_BTD - exact_z).abs().max() < 0.1
        assert (logdet_B - exact_logdet).abs().max() < 0.5


def test_layer_norm_computes_in_float32() -> None:
    norm = LayerNorm(64).bfloat16()
    x = (1000 + torch.randn(2, 64)).bfloat16()
    expected = torch.nn.functional.layer_norm(x.float(), (64,)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), expected)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    patch_size=st.integers(1, 5),
    side=st.integers(1, 4),
)
def test_patches_and_images_are_each_others_inverse(batch: int, channels: int, patch_size: int, side: int) -> None:
    size = patch_size * side
    image_BCHW = torch.arange(float(batch * channels * size * size)).view(batch, channels, size, size)
    patches_BTD = patchify(image_BCHW, patch_size)
    assert patches_BTD.shape == (batch, side * side, channels * patch_size**2)
    assert torch.equal(unpatchify(patches_BTD, patch_size, size), image_BCHW)
    # Raster order over patches; channel-major, then raster, inside one.
    last = image_BCHW[-1, :, -patch_size:, :patch_size]
    assert torch.equal(patches_BTD[-1, side * (side - 1)], last.reshape(-1))


def test_autocast_leaves_the_flows_values_as_they_are() -> None:
    """An 8-bit value's interval is 1/128 wide, and bfloat16 has steps of 1/256 there."""
    config = FlowConfig(image_size=4, channels=1, patch_size=2, width=8, num_blocks=1, layers_per_block=1, head_dim=8)
    block = Flow(config).blocks[0]
    mean = 0.9937
    torch.nn.init.constant_(block.proj_out.bias, mean)
    with torch.autocast("cpu", torch.bfloat16):
        z_BTD, alpha = block(torch.full((1, config.num_patches, config.patch_dim), mean))
    assert z_BTD.dtype == alpha.dtype == torch.float32
    assert z_BTD[:, 1:].abs().max() < 1e-6


def test_embeddings_begin_as_wide_as_asked() -> None:
    config = FlowConfig(image_size=16, channels=1, patch_size=2, width=64, num_blocks=2, layers_per_block=1)
    flow = Flow(replace(config, num_classes=10))
    for block in flow.blocks:
        assert block.class_embedding is not None
        weights = block.proj_in.weight.clone()
        for std in (EMBEDDING_STD, 1.0):
            if std != EMBEDDING_STD:
                block.spread_embeddings(std)
            assert block.position.std().item() == pytest.approx(std, rel=0.1)
            assert block.class_embedding.std().item() == pytest.approx(std, rel=0.1)
        assert torch.equal(block.proj_in.weight, weights)
