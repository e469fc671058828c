"""The optimizer, its schedule, and the average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.config import FlowConfig
from model.flow import Flow
from training.config import Optimization
from training.optimizer import Optimizer, WeightAverage, check_optimizer, learning_rate


@given(total=st.integers(2, 5000), warmup=st.integers(0, 500), data=st.data())
def test_rate_stays_between_zero_and_the_peak(total: int, warmup: int, data: st.DataObject) -> None:
    options = Optimization(learning_rate=1e-3)
    step = data.draw(st.integers(0, total - 1))
    assert 0 < learning_rate(step, total, warmup, options) <= options.learning_rate


def test_rate_rises_to_the_peak_and_falls_to_the_final_rate() -> None:
    options = Optimization(learning_rate=1e-3, final_learning_rate=1e-6)
    rates = [learning_rate(step, 100, 10, options) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert max(rates) == rates[9] == rates[10] == 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-6)


def test_average_of_constant_weights_is_those_weights() -> None:
    module = nn.Linear(3, 3)
    average = WeightAverage(module, 0.999)
    for _ in range(5):
        average.update(module)
    assert torch.equal(average.tensors["weight"], module.weight)


def test_average_follows_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average, expected = WeightAverage(module, 0.25), 0.0
    for n in range(1, 6):
        nn.init.constant_(module.weight, n)
        average.update(module)
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert average.tensors["weight"].item() == pytest.approx(expected)


def flow() -> Flow:
    torch.manual_seed(0)
    return Flow(FlowConfig(image_size=8, channels=1, patch_size=4, width=64, num_blocks=2, layers_per_block=1))


def muon_step(rate: float, **options: float) -> tuple[Flow, Flow]:
    """A flow before and after one step with random gradients."""
    before, after = flow(), flow()
    for parameter in after.parameters():
        parameter.grad = torch.randn_like(parameter)
    Optimizer(after, Optimization(optimizer="muon", learning_rate=1e-3, weight_decay=0.0, **options)).step(rate)
    return before, after


def test_muon_orthogonalizes_the_steps_of_the_matrices_of_the_layers_alone() -> None:
    before, after = muon_step(1e-3, muon_learning_rate=2e-3)
    new = dict(after.named_parameters())
    for name, old in before.named_parameters():
        change = (new[name] - old).detach()
        if "layers" in name and old.ndim == 2:
            # All directions alike, to the accuracy of five iterations, which leave the very smallest behind; with the
            # root mean square of AdamW's steps (0.2).
            scale = 0.2 * 2e-3 * math.sqrt(max(old.shape))
            values = torch.linalg.svdvals(change) / scale
            assert float(values.quantile(0.1)) > 0.5, name
            assert float(values.max()) < 1.4, name
        else:
            # AdamW's first step: the learning rate in the direction of the sign.
            torch.testing.assert_close(change.abs(), torch.full_like(change, 1e-3), atol=1e-6, rtol=1e-3)


def test_the_rates_of_muon_and_adamw_stay_in_proportion() -> None:
    (_, full), (before, tenth) = muon_step(1e-3), muon_step(1e-4)
    for name, old in before.named_parameters():
        large, small = ((dict(after.named_parameters())[name] - old).detach() for after in (full, tenth))
        assert float(small.norm() / large.norm()) == pytest.approx(0.1, rel=1e-2), name


def test_muon_is_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer(Optimization(optimizer="muon"))
    monkeypatch.delattr(torch.optim, "Muon")
    check_optimizer(Optimization())
    with pytest.raises(ValueError, match=r"optimizer: got 'muon', allowed is adamw with PyTorch .* \(Muon came with"):
        check_optimizer(Optimization(optimizer="muon"))
