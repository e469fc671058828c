"""Our numbers against what the official code computed for the same weights (tests/reference).

The cases are generated from the keys of the vector files, and a key that no rule knows fails, so
that no vector can be left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.config import SamplingDefaults
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import encode, log_likelihood, patch_terms
from model.official import read_checkpoint, to_flow
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler

REFERENCE = Path(__file__).parents[1] / "reference"
NAMES = ("tiny_cond", "tiny_uncond", "tiny_uncond_vp")
INPUTS = {"x", "y", "y_dropped", "noise"}
REVERSE = re.compile(
    r"reverse\.(?P<mode>plain|null|guidance_(?P<w>[\d.]+)|unconditional_guidance_(?P<uw>[\d.]+)_temp_(?P<temp>[\d.]+))"
    r"(?P<annealed>_annealed)?(?P<mean_only>_mean_only)?"
)
EXACT, GUIDED = 1e-4, 2e-3


def outputs() -> list[tuple[str, str]]:
    """Every (vector, key) that the official code computed."""
    cases = []
    for name in NAMES:
        with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
            cases += [(name, key) for key in sorted(file.keys()) if key not in INPUTS]
    return cases


@pytest.fixture(scope="module", params=NAMES)
def vector(request: pytest.FixtureRequest) -> tuple[str, Flow, dict[str, Tensor]]:
    name = request.param
    return name, load(name), load_file(REFERENCE / f"{name}.safetensors")


def load(name: str) -> Flow:
    return to_flow(read_checkpoint(REFERENCE / f"{name}.pth"))


def reverse_options(key: str, labels: list[int | None]) -> tuple[list[int | None], SamplingDefaults]:
    """The labels and options that a key's name stands for."""
    match = REVERSE.fullmatch(key)
    assert match is not None, f"no rule for {key}"
    no_class: list[int | None] = [None] * len(labels)
    schedule = "linear" if match["annealed"] else "constant"
    target = "shift" if match["mean_only"] else "both"
    if match["mode"] == "plain":
        return labels, SamplingDefaults()
    if match["mode"] == "null":
        return no_class, SamplingDefaults()
    if match["w"]:
        scale = float(match["w"])
        return labels, SamplingDefaults(guidance_scale=scale, guidance_schedule=schedule, guidance_target=target)
    return no_class, SamplingDefaults(
        guidance_scale=float(match["uw"]),
        attention_temperature=float(match["temp"]),
        guidance_schedule=schedule,
        guidance_target=target,
    )


def compute(name: str, key: str, flow: Flow, stored: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Our value for a stored key, and how far it may be from it."""
    x_BTD, y = flow.patchify(stored["x"]), stored.get("y")
    kind, _, rest = key.partition(".")
    if kind in ("forward", "forward_dropped", "forward_null"):
        labels = {"forward": y, "forward_dropped": stored.get("y_dropped"), "forward_null": None}[kind]
        if rest.startswith("block_"):
            return flow.trace(x_BTD, labels)[int(rest.removeprefix("block_"))][0], EXACT
        z_BTD, logdet_B = flow(x_BTD, labels)
        return {"z": z_BTD, "logdet_per_dim": logdet_B / flow.config.num_dims}[rest], EXACT
    if kind == "reverse":
        given: list[int | None] = [None] * len(x_BTD) if y is None else y.tolist()
        labels, options = reverse_options(key, given)
        rows = make_rows(stored["noise"], labels, [options] * len(labels))
        tolerance = GUIDED if options.guidance_scale else EXACT
        return flow.unpatchify(finish(Sampler(flow).decode(rows)).x_BTD), tolerance
    assert key == "denoised", f"no rule for {key}"
    if flow.config.volume_preserving:
        # The official program denoises with a standard normal prior also for this variant.
        flow.prior_variance.fill_(1)
    std = json.loads((REFERENCE / f"{name}.json").read_text())["denoise_sigma"]
    return flow.unpatchify(finish(denoise(flow, flow.patchify(stored["reverse.plain"]), y, std))), EXACT


@pytest.mark.parametrize(("name", "key"), outputs())
def test_official_output(name: str, key: str) -> None:
    stored = load_file(REFERENCE / f"{name}.safetensors")
    ours, tolerance = compute(name, key, load(name), stored)
    assert ours.shape == stored[key].shape
    assert (ours - stored[key]).abs().max().item() < tolerance


@pytest.mark.parametrize("key", ["reverse.sideways", "reverse.plainly", "reverse.guidance_2_anneal", "denoised_twice"])
def test_unknown_key_fails(key: str) -> None:
    stored = load_file(REFERENCE / "tiny_cond.safetensors")
    with pytest.raises(AssertionError, match="no rule"):
        compute("tiny_cond", key, load("tiny_cond"), stored)


def test_every_reverse_name_means_something_else() -> None:
    """A rule that reads two names as one would hide a case."""
    keys = [key for name, key in outputs() if name == "tiny_cond" and key.startswith("reverse.")]
    meanings = [repr(reverse_options(key, [1])) for key in keys]
    assert len(keys) == 7
    assert len(set(meanings)) == 7


def test_logdet_is_summed(vector: tuple[str, Flow, dict[str, Tensor]]) -> None:
    _, flow, stored = vector
    _, logdet_B = flow(flow.patchify(stored["x"]), stored.get("y"))
    expected = stored["forward.logdet_per_dim"] * flow.config.num_dims
    torch.testing.assert_close(logdet_B, expected, atol=1e-4, rtol=1e-6)


def test_patch_terms_sum_to_the_log_likelihood(vector: tuple[str, Flow, dict[str, Tensor]]) -> None:
    _, flow, stored = vector
    flow = flow.double()
    x_BTD, y = flow.patchify(stored["x"].double()), stored.get("y")
    torch.testing.assert_close(patch_terms(flow, x_BTD, y).sum(1), -log_likelihood(flow, x_BTD, y))


def test_encoding_inverts_the_official_samples(vector: tuple[str, Flow, dict[str, Tensor]]) -> None:
    _, flow, stored = vector
    u_BTD, _ = encode(flow.float(), flow.patchify(stored["reverse.plain"]), stored.get("y"))
    assert (u_BTD - stored["noise"]).abs().max().item() < EXACT


def test_configurations_are_inferred(vector: tuple[str, Flow, dict[str, Tensor]]) -> None:
    name, flow, _ = vector
    expected = json.loads((REFERENCE / f"{name}.json").read_text())["config"]
    config = flow.config
    assert expected == {
        "in_channels": config.channels,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "channels": config.width,
        "num_blocks": config.num_blocks,
        "layers_per_block": config.layers_per_block,
        "nvp": not config.volume_preserving,
        "num_classes": config.num_classes,
    }
