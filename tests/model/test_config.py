"""Configurations refuse what is invalid, naming the field, the value got and what is allowed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from model.config import FlowConfig, NoiseProtocol, Record, SamplingDefaults

FLOW: dict[str, Any] = {
    "image_size": 28,
    "channels": 1,
    "patch_size": 4,
    "width": 128,
    "num_blocks": 4,
    "layers_per_block": 4,
    "num_classes": 10,
    "volume_preserving": False,
    "head_dim": 64,
    "expansion": 4,
}
GAUSSIAN: dict[str, Any] = {"kind": "gaussian", "std": 0.1}
UNIFORM: dict[str, Any] = {"kind": "uniform", "std": 0.0}
SAMPLING: dict[str, Any] = {
    "guidance_scale": 1.5,
    "guidance_rule": "linear",
    "guidance_schedule": "linear",
    "guidance_target": "both",
    "guidance_window": [0, 2],
    "attention_temperature": 0.5,
    "denoise": True,
}
NOT_COUNTS = [0, -1, 1.0, 1.5, True, "4", None, math.nan]
NOT_NUMBERS = ["1", None, True, math.nan, math.inf, -math.inf, 10**400, [1]]

INVALID: list[tuple[type[Record], dict[str, Any], str, Any, str]] = [
    *(
        (FlowConfig, FLOW, name, value, "integer >= 1")
        for name in ("image_size", "channels", "patch_size", "width", "num_blocks", "head_dim", "expansion")
        for value in NOT_COUNTS
    ),
    *((FlowConfig, FLOW, "patch_size", value, "divisor of image_size 28") for value in (3, 5, 56)),
    (FlowConfig, FLOW, "patch_size", 28, "at least two patches"),
    *((FlowConfig, FLOW, "width", value, "multiple of head_dim 64") for value in (1, 63, 100)),
    *((FlowConfig, FLOW, "num_classes", value, "integer >= 0") for value in (-1, 1.0, True, None, "3")),
    *((FlowConfig, FLOW, "volume_preserving", value, "true or false") for value in (0, 1, "false", None)),
    *((FlowConfig, FLOW, "layers_per_block", value, "integers >= 1") for value in (0, None, "4", 2.0, [1, 0, 1, 1])),
    *((FlowConfig, FLOW, "layers_per_block", value, "num_blocks = 4") for value in ([1, 2], [1] * 5, ())),
    *(
        (FlowConfig, FLOW, "conditioned_blocks", value, "from 0 to 3 in ascending order")
        for value in ((), (4,), (-1,), (1, 0), (1, 1), ("1",), (True,), 3, "all")
    ),
    *((FlowConfig, FLOW, "scale_function", value, "exp or softplus") for value in ("sigmoid", None, 1, [])),
    (FlowConfig, {**FLOW, "volume_preserving": True}, "scale_function", "softplus", "'exp' for a volume-preserving"),
    *((FlowConfig, FLOW, "soft_clip", value, "[0, 100]") for value in (-1, 101, *NOT_NUMBERS)),
    *((NoiseProtocol, GAUSSIAN, "kind", value, "'gaussian' or 'uniform'") for value in ("Gaussian", None, 1, [])),
    *((NoiseProtocol, GAUSSIAN, "std", value, "(0, 2)") for value in (0, 2, -0.1, *NOT_NUMBERS)),
    *((NoiseProtocol, UNIFORM, "std", value, "0 when") for value in (0.1, *NOT_NUMBERS)),
    *((NoiseProtocol, GAUSSIAN, "space", value, "'pixels' or 'latents'") for value in ("latent", None, 1, [])),
    (NoiseProtocol, UNIFORM, "space", "latents", "'pixels' when"),
    *((SamplingDefaults, SAMPLING, "guidance_scale", value, "[0, 100]") for value in (-0.1, 101, *NOT_NUMBERS)),
    *(
        (SamplingDefaults, SAMPLING, "guidance_schedule", value, "constant, linear, cosine")
        for value in ("square", None, 1)
    ),
    *((SamplingDefaults, SAMPLING, "guidance_target", value, "both, scale, shift") for value in ("mean", None, [])),
    *(
        (SamplingDefaults, SAMPLING, "attention_temperature", value, "[0.01, 100]")
        for value in (0, -1, 0.001, 101, *NOT_NUMBERS)
    ),
    *((SamplingDefaults, SAMPLING, "denoise", value, "true or false") for value in (0, 1, "true", None)),
]


@pytest.mark.parametrize(("record", "valid", "field", "value", "allowed"), INVALID)
def test_invalid_field(record: type[Record], valid: dict[str, Any], field: str, value: Any, allowed: str) -> None:
    record.from_dict(valid)
    with pytest.raises(ValueError, match=field) as caught:
        record.from_dict({**valid, field: value})
    message = str(caught.value)
    got = tuple(value) if field == "layers_per_block" and isinstance(value, list) else value
    assert f"{field}: got {got!r}" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("record", "valid"),
    [(FlowConfig, FLOW), (NoiseProtocol, GAUSSIAN), (NoiseProtocol, UNIFORM), (SamplingDefaults, SAMPLING)],
)
class TestRecord:
    def test_round_trip_through_json(self, record: type[Record], valid: dict[str, Any]) -> None:
        value = record.from_dict(valid)
        assert value.to_dict() == valid
        assert record.from_dict(json.loads(json.dumps(value.to_dict()))) == value
        assert hash(value) == hash(record.from_dict(valid))

    def test_unknown_field(self, record: type[Record], valid: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"fields: got \['colour'\], allowed is .*"):
            record.from_dict({**valid, "colour": 1})

    @pytest.mark.parametrize("data", [None, [], "x", 3])
    def test_not_an_object(self, record: type[Record], valid: dict[str, Any], data: Any) -> None:
        with pytest.raises(ValueError, match="allowed is an object"):
            record.from_dict(data)


@pytest.mark.parametrize("field", ["image_size", "channels", "patch_size", "width", "num_blocks", "layers_per_block"])
def test_missing_field(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        FlowConfig.from_dict({name: value for name, value in FLOW.items() if name != field})


def test_derived_numbers() -> None:
    config = FlowConfig.from_dict({**FLOW, "channels": 3, "layers_per_block": [8, 2, 2, 2]})
    assert (config.num_patches, config.patch_dim, config.num_dims, config.num_heads) == (49, 48, 3 * 28 * 28, 2)
    assert config.layer_counts == (8, 2, 2, 2)
    assert config.to_dict()["layers_per_block"] == [8, 2, 2, 2]
    assert FlowConfig.from_dict(FLOW).layer_counts == (4, 4, 4, 4)


def test_protocols_say_what_they_measure() -> None:
    assert "0.1" in NoiseProtocol.from_dict(GAUSSIAN).meaning
    assert "not comparable" in NoiseProtocol.from_dict(GAUSSIAN).meaning
    assert "upper bound" in NoiseProtocol.from_dict(UNIFORM).meaning
    latents = NoiseProtocol.from_dict({**GAUSSIAN, "space": "latents"})
    assert "no likelihood of pixels" in latents.meaning
    assert latents.to_dict() == {**GAUSSIAN, "space": "latents"}
