"""Schedule and average of the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.config import Optimization
from training.optimizer import WeightAverage, learning_rate


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
