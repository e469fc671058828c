"""A request joined with the bundle's recommendation, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.bundle import read_bundle
from model.config import SamplingDefaults, SolverOptions
from service.api.options import asked, passes, sampling_options
from service.api.schemas import SampleRequest
from service.errors import InvalidRequest
from service.jobs import ModelInfo


@pytest.fixture(scope="module")
def model(models: Path) -> ModelInfo:
    """A model that recommends much."""
    recommended = SamplingDefaults(
        guidance_scale=2.0, guidance_target="shift", guidance_window=(0, 2), attention_temperature=0.5, denoise=True
    )
    return replace(ModelInfo.of(read_bundle(models / "tiny-cond")), sampling=recommended)


def test_null_opens_the_window_and_is_else_as_if_absent(model: ModelInfo) -> None:
    nothing, nulls = (
        asked(model, SampleRequest.model_validate(body), 0)[0]["options"]
        for body in ({}, {"guidance_window": None, "guidance_scale": None, "guidance_target": None})
    )
    assert nothing == model.sampling.to_dict()
    assert nulls == {**nothing, "guidance_window": None}


def test_the_closed_form_does_not_take_the_target_that_is_meant_for_the_linear_rule(model: ModelInfo) -> None:
    assert sampling_options(model, {"guidance_rule": "closed_form"}, 0).guidance_target == "both"
    with pytest.raises(InvalidRequest) as caught:
        sampling_options(model, {"guidance_rule": "closed_form", "guidance_target": "shift"}, 0)
    assert caught.value.param == "guidance_target"


@pytest.mark.parametrize(
    ("options", "solver", "tuned", "expected"),
    [
        ({}, {}, False, 1),
        ({}, {"solver": "sequential"}, True, 1),
        ({"guidance_scale": 1.0}, {}, False, 2),
        ({"denoise": True}, {}, False, 2),
        ({"guidance_scale": 1.0, "denoise": True}, {"solver": "jacobi"}, False, 4),
        ({}, {"certify": True, "solver": "sequential"}, False, 2),
        ({}, {"certify": True, "solver": "jacobi"}, False, 2),
        ({}, {}, True, 2),
        ({}, {"precision": "bf16", "solver": "sequential"}, False, 2),
    ],
)
def test_a_certificate_costs_a_pass(
    model: ModelInfo, options: dict[str, Any], solver: dict[str, Any], tuned: bool, expected: int
) -> None:
    model = replace(model, convergence={"gain": 1.0} if tuned else None)
    assert passes(model, SamplingDefaults(**options), SolverOptions(**solver)) == expected
