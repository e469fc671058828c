"""Tweedie denoising: the gradient of the density, block by block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model.denoise import denoise
from model.flow import NO_CLASS, Flow
from model.likelihood import log_likelihood
from model.noise import latents
from model.sampling.rows import finish

MakeFlow = Callable[..., Flow]
STD = 0.3


def direct(flow: Flow, x_BTD: Tensor, y_B: Tensor | None, std: float = STD) -> Tensor:
    """x + σ² ∇ log p by one backward pass through everything."""
    leaf = x_BTD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(flow, leaf, y_B).sum(), leaf)
    return x_BTD + std**2 * gradient


def noisy(flow: Flow, count: int) -> tuple[Tensor, Tensor | None]:
    config = flow.config
    x_BTD = latents(range(count), config.num_patches, config.patch_dim).double()
    labels = torch.arange(count) % (config.num_classes + 1) - 1 if config.num_classes else None
    return x_BTD, labels


@pytest.mark.parametrize(
    "variant", [{}, {"num_classes": 0}, {"volume_preserving": True}, {"layers_per_block": (1, 3, 1)}], ids=str
)
@pytest.mark.parametrize("rows_per_slice", [1, 3, 8])
def test_denoise_is_the_gradient_of_the_log_likelihood(
    make_flow: MakeFlow, variant: dict[str, Any], rows_per_slice: int
) -> None:
    """Also for the learned prior variance, where the official program uses a standard normal prior."""
    flow = make_flow(**variant)
    x_BTD, y = noisy(flow, 5)
    before = x_BTD.clone()
    denoised = finish(denoise(flow, x_BTD, y, STD, rows_per_slice))
    assert torch.equal(x_BTD, before)
    assert (denoised - x_BTD).abs().max() > 0.01
    assert (denoised - direct(flow, x_BTD, y)).abs().max() < 1e-10


def test_no_labels_and_dropped_labels_are_the_same(make_flow: MakeFlow) -> None:
    flow = make_flow()
    x_BTD, _ = noisy(flow, 2)
    dropped = finish(denoise(flow, x_BTD, torch.full((2,), NO_CLASS), STD))
    torch.testing.assert_close(finish(denoise(flow, x_BTD, None, STD)), dropped)


def test_weights_keep_no_gradient(make_flow: MakeFlow) -> None:
    flow = make_flow().requires_grad_(True)
    x_BTD, y = noisy(flow, 2)
    denoised = finish(denoise(flow, x_BTD, y, STD))
    assert not denoised.requires_grad
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_rows_do_not_depend_on_each_other(make_flow: MakeFlow) -> None:
    flow = make_flow(dtype=torch.float32)
    x_BTD, y = noisy(flow, 32)
    assert y is not None
    whole = finish(denoise(flow, x_BTD.float(), y, STD))
    for index in (0, 9, 31):
        alone = finish(denoise(flow, x_BTD[index : index + 1].float(), y[index : index + 1], STD))
        assert (whole[index] - alone[0]).abs().max() < 1e-4
    seven = finish(denoise(flow, x_BTD[9:16].float(), y[9:16], STD))
    assert (whole[9:16] - seven).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("drops", "kept"),
    [
        ({0: [0, 2, 6]}, [0, 2, 6]),
        ({3: [6, 1]}, [6, 1]),
        ({7: [4, 3, 2, 1]}, [4, 3, 2, 1]),
        ({2: [6, 5, 4, 3], 9: [3, 0]}, [3, 6]),
        ({1: [5]}, [5]),
        ({17: [0]}, [0]),
        ({4: []}, []),
    ],
    ids=str,
)
def test_rows_that_stay_are_as_without_drops(
    make_flow: MakeFlow, drops: dict[int, Sequence[int]], kept: list[int]
) -> None:
    flow = make_flow()
    x_BTD, y = noisy(flow, 7)
    whole = finish(denoise(flow, x_BTD, y, STD))
    slices = denoise(flow, x_BTD, y, STD, rows_per_slice=2)
    survivors = None
    try:
        next(slices)
        for number in range(1000):
            slices.send(torch.tensor(drops[number], dtype=torch.long) if number in drops else None)
    except StopIteration as stop:
        survivors = stop.value
    assert survivors is not None
    assert survivors.shape == whole[kept].shape
    assert len(kept) == 0 or (survivors - whole[kept]).abs().max() < 1e-10


def test_dropped_rows_cost_nothing(make_flow: MakeFlow) -> None:
    """Groups of rows that all left are never started."""
    flow = make_flow()
    x_BTD, y = noisy(flow, 6)
    slices = denoise(flow, x_BTD, y, STD, rows_per_slice=2)
    next(slices)
    slices.send(torch.tensor([0]))
    assert len(list(slices)) == 2 * 3 - 2, "the group in work is finished, no other is started"


@pytest.mark.parametrize("mode", [True, False])
def test_grad_mode_is_the_callers_between_slices(make_flow: MakeFlow, mode: bool) -> None:
    flow = make_flow()
    x_BTD, y = noisy(flow, 3)
    with torch.set_grad_enabled(mode):
        fractions = []
        for step in denoise(flow, x_BTD, y, STD, rows_per_slice=2):
            assert torch.is_grad_enabled() is mode
            fractions.append(step.fraction)
    assert len(fractions) == 2 * 2 * 3
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def most_saved(work: Callable[[], object], flow: Flow) -> int:
    """The most values that were saved for a backward pass at one time, weights not counted."""
    weights = {parameter.data_ptr() for parameter in flow.parameters()}
    saved, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(count: int) -> None:
        nonlocal saved
        saved -= count

    def pack(tensor: Tensor) -> Kept:
        nonlocal saved, most
        kept = Kept(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            saved += tensor.numel()
            most = max(most, saved)
            weakref.finalize(kept, release, tensor.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        work()
    return most


def test_memory_is_that_of_one_block(make_flow: MakeFlow) -> None:
    """At 8 blocks at most a third of what one backward pass through all of them needs."""
    flow = make_flow(num_blocks=8)
    x_BTD, y = noisy(flow, 4)
    plain = most_saved(lambda: direct(flow, x_BTD, y), flow)
    blockwise = most_saved(lambda: finish(denoise(flow, x_BTD, y, STD)), flow)
    between_blocks = 8 * x_BTD.numel()
    assert 0 < blockwise + between_blocks <= plain / 3
