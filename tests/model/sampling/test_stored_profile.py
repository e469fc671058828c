"""Plans and profiles as JSON: what is written comes back, and what is damaged is refused by the name of its field."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundle import MANIFEST, SAMPLER, Bundle, BundleConfig, BundleDamaged, read_bundle, sha256
from model.config import NoiseProtocol, SamplingDefaults
from model.sampling.plan import BlockConvergence, BlockPlan, ConvergenceProfile, Plan, segment_lengths
from model.weights import update_bundle, write_bundle
from tests.model.conftest import tiny_flow
from tests.model.sampling.profiles import CONFIG, all_need, profile_of

LAW = settings(deadline=None, max_examples=40)
PROFILE = profile_of([all_need(3), all_need(15), all_need(2)])
positive = st.floats(1e-12, 1e6)
measures = st.floats(0, 1e6)


def through_json(record: Any) -> Any:
    return type(record).from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))


block_plans = st.builds(BlockPlan, segment=st.integers(1, 5000), guess=st.sampled_from(["latent", "zeros"]))
shares = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(tuple)
convergences = st.builds(
    BlockConvergence,
    crm=measures,
    igm_latent=measures,
    igm_zeros=measures,
    active=st.dictionaries(st.sampled_from(segment_lengths(256)).map(str), shares),
)


@LAW
@given(block=block_plans, blocks=st.lists(block_plans, min_size=1, max_size=5), gain=positive, floor=measures)
def test_plans_come_back(block: BlockPlan, blocks: list[BlockPlan], gain: float, floor: float) -> None:
    plan = Plan(blocks=tuple(blocks), gain=gain, floor=floor)
    assert through_json(block) == block
    assert through_json(plan) == plan
    assert through_json(plan).describe() == plan.describe()


@LAW
@given(
    blocks=st.lists(convergences, min_size=1, max_size=3),
    gain=positive,
    floor=positive,
    tolerance=positive,
    num_images=st.integers(1, 10**6),
)
def test_profiles_come_back(blocks: list[BlockConvergence], num_images: int, **numbers: float) -> None:
    guidance = SamplingDefaults(guidance_scale=2, guidance_window=(0, 1)).to_dict()
    profile = ConvergenceProfile(blocks=tuple(blocks), num_images=num_images, guidance=guidance, **numbers)
    assert through_json(profile) == profile
    for block in blocks:
        assert through_json(block) == block
        assert through_json(block).passes == {int(key): pytest.approx(sum(v)) for key, v in block.active.items()}


NOT_NUMBERS = ["1", None, [], {}, True, math.nan, math.inf, 10**400]
BLOCK: dict[str, Any] = all_need(3).to_dict() | {"active": {"15": [1.0, 0.5]}}
DAMAGED: list[tuple[type[Any], dict[str, Any], str, Any]] = [
    *((BlockPlan, {"segment": 4}, "segment", v) for v in (0, -1, 1.5, True, "4", None, [])),
    *((BlockPlan, {"segment": 4}, "guess", v) for v in ("ones", None, 0, [])),
    *((Plan, {"blocks": [{"segment": 4}]}, "blocks", v) for v in ([], None, 5, "abc", {})),
    *((Plan, {"blocks": [{"segment": 4}]}, "gain", v) for v in (0, -1, *NOT_NUMBERS)),
    *((Plan, {"blocks": [{"segment": 4}]}, "floor", v) for v in (-1, *NOT_NUMBERS)),
    *((BlockConvergence, BLOCK, name, v) for name in ("crm", "igm_latent", "igm_zeros") for v in (-1, *NOT_NUMBERS)),
    *(
        (BlockConvergence, BLOCK, "active", v)
        for v in (
            None,
            [],
            "15",
            {"x": [1]},
            {"0": [1]},
            {"-4": [1]},
            {"15": []},
            {"15": None},
            {"15": 3},
            {"15": "1"},
            {"15": ["a"]},
            {"15": [None]},
            {"15": [1.5]},
            {"15": [-0.1]},
            {"15": [math.nan]},
            {15: [1.0]},
        )
    ),
    *((ConvergenceProfile, PROFILE.to_dict(), "blocks", v) for v in ([], None, 5, "abc", {})),
    *(
        (ConvergenceProfile, PROFILE.to_dict(), name, v)
        for name in ("gain", "floor", "tolerance")
        for v in (0, -1, *NOT_NUMBERS)
    ),
    *((ConvergenceProfile, PROFILE.to_dict(), "num_images", v) for v in (0, -1, 1.5, "32", None, True)),
    *((ConvergenceProfile, PROFILE.to_dict(), "guidance", v) for v in (None, [], 5, "w=2")),
]


@pytest.mark.parametrize(
    ("record", "good", "name", "value"), DAMAGED, ids=[f"{d[0].__name__}-{d[2]}-{str(d[3])[:20]}" for d in DAMAGED]
)
def test_a_damaged_field_is_refused_by_its_name(
    record: type[Any], good: dict[str, Any], name: str, value: object
) -> None:
    record.from_dict(good)
    with pytest.raises(ValueError, match=name) as refusal:
        record.from_dict({**good, name: value})
    assert "allowed is" in str(refusal.value)


@pytest.mark.parametrize("entry", [5, "abc", None, [], {"segment": 4}, {**BLOCK, "crm": -1}])
def test_a_damaged_block_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match=r"Block|crm"):
        ConvergenceProfile.from_dict({**PROFILE.to_dict(), "blocks": [entry]})
    with pytest.raises(ValueError, match="Block"):
        Plan.from_dict({"blocks": [entry if entry != {"segment": 4} else {"guess": "zeros"}]})


@pytest.mark.parametrize("record", [PROFILE, all_need(3), Plan.sequential(CONFIG), BlockPlan(segment=2)])
def test_missing_and_unknown_fields_are_named(record: Any) -> None:
    content = record.to_dict()
    with pytest.raises(ValueError, match="surprise"):
        type(record).from_dict({**content, "surprise": 1})
    first = next(iter(content))
    del content[first]
    with pytest.raises(ValueError, match=first):
        type(record).from_dict(content)


def test_the_better_start_is_the_one_that_moves_less() -> None:
    assert replace(all_need(3), igm_latent=1.0, igm_zeros=2.0).guess == "latent"
    assert replace(all_need(3), igm_latent=2.0, igm_zeros=1.0).guess == "zeros"


OTHER_BLOCKS = profile_of([all_need(3)] * 2)
OTHER_PATCHES = profile_of([all_need(3, replace(CONFIG, image_size=12))] * 3)


@pytest.mark.parametrize("profile", [OTHER_BLOCKS, OTHER_PATCHES], ids=["blocks", "patches"])
def test_a_profile_of_another_architecture_does_not_fit(profile: ConvergenceProfile) -> None:
    PROFILE.check_fits(CONFIG)
    with pytest.raises(ValueError, match=r"convergence\.(blocks|active)"):
        profile.check_fits(CONFIG)


class TestBundle:
    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        flow = tiny_flow(dtype=torch.float32)
        config = BundleConfig(
            name="tiny",
            flow=flow.config,
            noise=NoiseProtocol(kind="gaussian", std=0.1),
            class_names=("a", "b", "c"),
        )
        return write_bundle(tmp_path / "tiny", config, flow, SamplingDefaults(guidance_scale=1), "card")

    @staticmethod
    def edit(bundle: Bundle, convergence: object) -> None:
        """Write another profile, with hashes that agree."""
        path = bundle.path / SAMPLER
        path.write_text(json.dumps({**json.loads(path.read_text()), "convergence": convergence}))
        manifest = json.loads((bundle.path / MANIFEST).read_text())
        manifest["sha256"][SAMPLER] = sha256(path.read_bytes())
        (bundle.path / MANIFEST).write_text(json.dumps(manifest))

    def test_a_bundle_that_was_not_tuned_has_none(self, bundle: Bundle) -> None:
        assert bundle.convergence is None
        assert "convergence" not in json.loads((bundle.path / SAMPLER).read_text())
        self.edit(bundle, None)
        assert read_bundle(bundle.path).convergence is None

    def test_tuning_adds_the_profile_and_changes_nothing_else(self, bundle: Bundle) -> None:
        tuned = update_bundle(bundle, convergence=PROFILE)
        assert tuned.convergence == PROFILE
        assert read_bundle(bundle.path) == tuned
        assert replace(tuned, convergence=None) == bundle
        assert tuned.model_id == bundle.model_id
        again = update_bundle(tuned, convergence=replace(PROFILE, gain=9.0))
        assert again.convergence is not None
        assert again.convergence.gain == 9.0

    def test_other_updates_keep_the_profile(self, bundle: Bundle) -> None:
        tuned = update_bundle(bundle, convergence=PROFILE)
        for changed in (
            update_bundle(tuned, sampling=SamplingDefaults(guidance_scale=3)),
            update_bundle(tuned, card="new"),
        ):
            assert changed.convergence == PROFILE
            assert changed.model_id == bundle.model_id
        both = update_bundle(bundle, sampling=SamplingDefaults(guidance_scale=4), convergence=OTHER)
        assert (both.sampling.guidance_scale, both.convergence) == (4, OTHER)

    @pytest.mark.parametrize("profile", [OTHER_BLOCKS, OTHER_PATCHES], ids=["blocks", "patches"])
    def test_a_profile_of_another_architecture_is_refused(self, bundle: Bundle, profile: ConvergenceProfile) -> None:
        self.edit(bundle, profile.to_dict())
        with pytest.raises(BundleDamaged, match=r"sampler\.json: convergence\."):
            read_bundle(bundle.path)

    @pytest.mark.parametrize(
        "damage",
        [
            {"blocks": [1, 2, 3]},
            {"blocks": "abc"},
            {"blocks": 3},
            {"gain": 10**400},
            {"gain": math.inf},
            {"floor": "low"},
            {"num_images": None},
            {"guidance": None},
            {"blocks": [{**BLOCK, "active": {"15": ["a"]}}] * 3},
        ],
        ids=lambda damage: str(damage)[:40],
    )
    def test_a_damaged_profile_is_a_damaged_bundle(self, bundle: Bundle, damage: dict[str, Any]) -> None:
        self.edit(bundle, {**PROFILE.to_dict(), **damage})
        with pytest.raises(BundleDamaged, match=r"sampler\.json"):
            read_bundle(bundle.path)

    @pytest.mark.parametrize("convergence", [[], 5, "fast", {}])
    def test_what_is_no_profile_is_a_damaged_bundle(self, bundle: Bundle, convergence: object) -> None:
        self.edit(bundle, convergence)
        with pytest.raises(BundleDamaged, match=r"sampler\.json: ConvergenceProfile"):
            read_bundle(bundle.path)


OTHER = profile_of([all_need(5)] * 3)
