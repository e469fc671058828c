"""Bundles on disk: round trips, identity, and a typed error for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.bundle import (
    BUNDLED,
    CARD,
    CONFIG,
    MANIFEST,
    SAMPLER,
    SAMPLES,
    WEIGHTS,
    Bundle,
    BundleConfig,
    BundleDamaged,
    BundleError,
    BundleMissingFile,
    BundleShapeMismatch,
    BundleTooNew,
    find_bundles,
    read_bundle,
    sha256,
)
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults
from model.flow import Flow
from model.weights import load_flow, update_bundle, write_bundle
from tests.full_disk import full_disk

MakeFlow = Callable[..., Flow]
SAMPLING = SamplingDefaults(guidance_scale=1.5, guidance_schedule="linear", denoise=True)
FILES = (CONFIG, WEIGHTS, SAMPLER, CARD, MANIFEST)


def bundle_config(flow: Flow, **changes: Any) -> BundleConfig:
    names = ("shirt", "Hose", "größe")
    fields: dict[str, Any] = {
        "name": "tiny",
        "flow": flow.config,
        "noise": NoiseProtocol(kind="gaussian", std=0.1),
        "class_names": names if flow.config.num_classes else (),
        "training": {"epochs": 3},
    }
    return BundleConfig(**{**fields, **changes})


@pytest.fixture
def flow(make_flow: MakeFlow) -> Flow:
    return make_flow(dtype=torch.float32)


@pytest.fixture
def bundle(flow: Flow, tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "tiny", bundle_config(flow), flow, SAMPLING, "# Tiny\nA card with ünïcode.\n")


def rehash(directory: Path) -> None:
    """Make the manifest agree with files that a test changed: what a careless writer would do."""
    hashes = {name: sha256((directory / name).read_bytes()) for name in FILES if name != MANIFEST}
    (directory / MANIFEST).write_text(json.dumps({"sha256": hashes}))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestRoundTrip:
    @pytest.mark.parametrize("variant", [{}, {"num_classes": 0, "layers_per_block": (1, 3, 1)}], ids=str)
    @pytest.mark.parametrize("volume_preserving", [False, True])
    def test_everything_comes_back(
        self, make_flow: MakeFlow, tmp_path: Path, variant: dict[str, Any], volume_preserving: bool
    ) -> None:
        flow = make_flow(dtype=torch.float32, volume_preserving=volume_preserving, **variant)
        config = bundle_config(flow)
        written = write_bundle(tmp_path / "a" / "b", config, flow, SAMPLING, "card")
        assert sorted(path.name for path in written.path.iterdir()) == sorted(FILES)
        assert list((tmp_path / "a").iterdir()) == [written.path], "nothing temporary stays"
        read = read_bundle(tmp_path / "a" / "b")
        assert read == written
        assert (read.config, read.sampling, read.card, read.name) == (config, SAMPLING, "card", "tiny")
        loaded = load_flow(read)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        state = flow.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())

    def test_a_class_prior_comes_back_and_makes_another_model(self, flow: Flow, bundle: Bundle, tmp_path: Path) -> None:
        prior = (0.5, 0.3, 0.2)
        read = write_bundle(tmp_path / "prior", bundle_config(flow, class_prior=prior), flow, SAMPLING, "card")
        assert read.config.class_prior == read.config.prior == prior
        assert read.model_id != bundle.model_id

    def test_without_a_class_prior_it_is_uniform_and_nothing_is_written(self, make_flow: MakeFlow) -> None:
        config = bundle_config(make_flow())
        assert "class_prior" not in json.loads(config.to_json())
        assert config.prior == (1 / 3, 1 / 3, 1 / 3)
        assert bundle_config(make_flow(num_classes=0)).prior == ()
        with pytest.raises(ValueError, match="class_prior: got 1 values, allowed is 0"):
            bundle_config(make_flow(num_classes=0), class_prior=(1.0,))

    def test_half_precision_weights_load_as_float32(self, make_flow: MakeFlow, tmp_path: Path) -> None:
        flow = make_flow(dtype=torch.bfloat16)
        loaded = load_flow(write_bundle(tmp_path / "half", bundle_config(flow), flow, SAMPLING, ""))
        assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())

    def test_writing_replaces(self, bundle: Bundle, make_flow: MakeFlow) -> None:
        other = make_flow(seed=5, dtype=torch.float32)
        replaced = write_bundle(bundle.path, bundle_config(other), other, SamplingDefaults(), "new")
        assert replaced.model_id != bundle.model_id
        assert read_bundle(bundle.path) == replaced
        assert sorted(path.name for path in bundle.path.parent.iterdir()) == ["tiny"]


class TestPicture:
    def test_it_is_part_of_the_bundle_but_not_of_its_id(self, bundle: Bundle, flow: Flow, tmp_path: Path) -> None:
        pictured = write_bundle(tmp_path / "p", bundle_config(flow), flow, SAMPLING, "", samples_png=b"picture")
        assert (pictured.path / SAMPLES).read_bytes() == b"picture"
        assert pictured.model_id == bundle.model_id
        assert SAMPLES in pictured.files
        tuned = update_bundle(pictured, card="new")
        assert (tuned.path / SAMPLES).read_bytes() == b"picture"
        assert (update_bundle(tuned, samples_png=b"other").path / SAMPLES).read_bytes() == b"other"

    def test_it_is_checked_like_the_rest(self, flow: Flow, tmp_path: Path) -> None:
        pictured = write_bundle(tmp_path / "p", bundle_config(flow), flow, SAMPLING, "", samples_png=b"picture")
        (pictured.path / SAMPLES).write_bytes(b"changed")
        with pytest.raises(BundleDamaged, match=f"{SAMPLES}: content does not match"):
            read_bundle(pictured.path)
        (pictured.path / SAMPLES).unlink()
        with pytest.raises(BundleMissingFile, match=f"{SAMPLES} is missing"):
            read_bundle(pictured.path)

    @pytest.mark.parametrize("name", ["../other.json", "/etc/hostname", "a/b", "..", "", "x\0y"])
    def test_a_manifest_names_only_files_of_the_bundle(self, bundle: Bundle, name: str) -> None:
        hashes = json.loads((bundle.path / MANIFEST).read_text())["sha256"]
        (bundle.path / MANIFEST).write_text(json.dumps({"sha256": {**hashes, name: "0"}}))
        with pytest.raises(BundleDamaged):
            read_bundle(bundle.path)


class TestIdentity:
    def test_tuning_keeps_the_id(self, bundle: Bundle) -> None:
        tuned = update_bundle(bundle, sampling=SamplingDefaults(guidance_scale=3), card="other")
        assert tuned.model_id == bundle.model_id
        assert (tuned.sampling.guidance_scale, tuned.card) == (3, "other")
        assert load_flow(tuned).config == bundle.config.flow

    def test_tuning_keeps_what_it_does_not_know(self, bundle: Bundle) -> None:
        edit_json(bundle.path / SAMPLER, profile={"iterations": [3, 4]})
        rehash(bundle.path)
        update_bundle(read_bundle(bundle.path), sampling=SamplingDefaults())
        assert json.loads((bundle.path / SAMPLER).read_text())["profile"] == {"iterations": [3, 4]}
        update_bundle(read_bundle(bundle.path), card="only the card")
        assert read_bundle(bundle.path).sampling == SamplingDefaults()

    def test_the_same_content_has_the_same_id(self, bundle: Bundle, flow: Flow, tmp_path: Path) -> None:
        assert write_bundle(tmp_path / "x", bundle_config(flow), flow, SAMPLING, "").model_id == bundle.model_id
        assert bundle.model_id.startswith("sha256:")

    def test_other_weights_or_names_have_another_id(self, bundle: Bundle, flow: Flow, tmp_path: Path) -> None:
        renamed = write_bundle(tmp_path / "x", bundle_config(flow, name="other"), flow, SAMPLING, "")
        flow.blocks[0].proj_in.bias[0] += 1
        changed = write_bundle(tmp_path / "y", bundle_config(flow), flow, SAMPLING, "")
        assert len({bundle.model_id, renamed.model_id, changed.model_id}) == 3


class TestMissing:
    def test_directory(self, tmp_path: Path) -> None:
        for read in (read_bundle, find_bundles):
            with pytest.raises(BundleMissingFile, match="nowhere: no such directory"):
                read(tmp_path / "nowhere")

    def test_a_file_instead_of_a_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(BundleMissingFile, match="no such directory"):
            read_bundle(tmp_path / "file")

    @pytest.mark.parametrize("name", FILES)
    def test_file(self, bundle: Bundle, name: str) -> None:
        (bundle.path / name).unlink()
        with pytest.raises(BundleMissingFile, match=f"{name} is missing"):
            read_bundle(bundle.path)

    def test_weights_that_vanish_after_reading(self, bundle: Bundle) -> None:
        (bundle.path / WEIGHTS).unlink()
        with pytest.raises(BundleMissingFile, match=WEIGHTS):
            load_flow(bundle)


class TestDamaged:
    @pytest.mark.parametrize("place", [0, 7, 8, 100, 0.3, 0.7, -1])
    def test_bit_flip_in_the_weights(self, bundle: Bundle, place: float) -> None:
        path = bundle.path / WEIGHTS
        data = bytearray(path.read_bytes())
        data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
        path.write_bytes(data)
        with pytest.raises(BundleDamaged, match=f"{WEIGHTS}: content does not match its sha256"):
            load_flow(read_bundle(bundle.path))

    @pytest.mark.parametrize("name", [CONFIG, SAMPLER, CARD])
    def test_changed_file(self, bundle: Bundle, name: str) -> None:
        with (bundle.path / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(BundleDamaged, match=f"{name}: content does not match"):
            read_bundle(bundle.path)

    @pytest.mark.parametrize("name", [CONFIG, SAMPLER, MANIFEST])
    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b'{"a": 1}'])
    def test_json(self, bundle: Bundle, name: str, content: bytes) -> None:
        if name == SAMPLER and content == b'{"a": 1}':
            content = b'{"defaults": 3}'
        (bundle.path / name).write_bytes(content)
        if name != MANIFEST:
            rehash(bundle.path)
        with pytest.raises(BundleDamaged, match=name):
            read_bundle(bundle.path)

    @pytest.mark.parametrize("content", [b"", b"\0" * 20, b"not tensors", b"\xff" * 100])
    def test_weights_that_are_no_safetensors(self, bundle: Bundle, content: bytes) -> None:
        (bundle.path / WEIGHTS).write_bytes(content)
        rehash(bundle.path)
        with pytest.raises(BundleDamaged, match="not a safetensors file"):
            load_flow(read_bundle(bundle.path))

    @pytest.mark.parametrize("field", ["name", "flow", "noise", "class_names", "preprocessing", "format_version"])
    def test_missing_field(self, bundle: Bundle, field: str) -> None:
        content = json.loads((bundle.path / CONFIG).read_text())
        del content[field]
        (bundle.path / CONFIG).write_text(json.dumps(content))
        rehash(bundle.path)
        with pytest.raises(BundleDamaged, match=field):
            read_bundle(bundle.path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("name", ""),
            ("name", "../other"),
            ("name", ".hidden"),
            ("name", "a b"),
            ("name", 3),
            ("name", "x" * 101),
            ("class_names", ["a", "b"]),
            ("class_names", ["a", "b", "b"]),
            ("class_names", ["a", "b", ""]),
            ("class_names", ["a", "b", 3]),
            ("class_names", None),
            ("flow", {"width": 3}),
            ("flow", []),
            ("noise", {"kind": "gaussian", "std": 7}),
            ("preprocessing", {}),
            ("training", [1]),
            ("format_version", 0),
            ("format_version", "1"),
            ("format_version", None),
        ],
    )
    def test_invalid_field(self, bundle: Bundle, field: str, value: Any) -> None:
        edit_json(bundle.path / CONFIG, **{field: value})
        rehash(bundle.path)
        with pytest.raises(BundleDamaged, match=CONFIG):
            read_bundle(bundle.path)

    def test_sampler_that_denoises_a_uniform_noise_model(self, flow: Flow, tmp_path: Path) -> None:
        config = bundle_config(flow, noise=NoiseProtocol(kind="uniform"))
        with pytest.raises(BundleDamaged, match="denoise: got True"):
            write_bundle(tmp_path / "x", config, flow, SAMPLING, "")

    def test_a_directory_in_place_of_a_file(self, bundle: Bundle) -> None:
        (bundle.path / CARD).unlink()
        (bundle.path / CARD).mkdir()
        with pytest.raises(BundleDamaged, match="cannot be read"):
            read_bundle(bundle.path)


class TestNewer:
    def test_newer_format(self, bundle: Bundle) -> None:
        edit_json(bundle.path / CONFIG, format_version=2)
        with pytest.raises(BundleTooNew, match="format 2, this program reads up to 1; upgrade"):
            read_bundle(bundle.path)

    @pytest.mark.parametrize("name", [SAMPLER, CARD, WEIGHTS, MANIFEST])
    def test_a_newer_format_may_have_other_files(self, bundle: Bundle, name: str) -> None:
        edit_json(bundle.path / CONFIG, format_version=7)
        (bundle.path / name).unlink()
        with pytest.raises(BundleTooNew):
            read_bundle(bundle.path)


class TestShapes:
    def change(self, bundle: Bundle, name: str, value: torch.Tensor | None) -> Bundle:
        tensors = load_file(bundle.path / WEIGHTS)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, bundle.path / WEIGHTS)
        rehash(bundle.path)
        return read_bundle(bundle.path)

    @pytest.mark.parametrize(
        ("name", "value", "found"),
        [
            ("blocks.0.proj_in.weight", torch.zeros(16, 5), r"\(16, 5\)"),
            ("blocks.1.class_embedding", torch.zeros(4, 16), r"\(4, 16\)"),
            ("prior_variance", torch.ones(16), r"\(16,\)"),
            ("blocks.2.position", None, "missing"),
            ("blocks.3.position", torch.zeros(16, 16), "no such tensor"),
            ("extra", torch.zeros(1), "no such tensor"),
        ],
    )
    def test_tensors_that_do_not_fit(self, bundle: Bundle, name: str, value: torch.Tensor | None, found: str) -> None:
        with pytest.raises(BundleShapeMismatch, match=f"tensor {name} has shape .*{found}"):
            load_flow(self.change(bundle, name, value))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_weights(self, bundle: Bundle, flow: Flow, bad: float) -> None:
        weights = flow.blocks[1].proj_out.weight.clone()
        weights[0, 3] = bad
        with pytest.raises(BundleDamaged, match=r"blocks\.1\.proj_out\.weight has values that are not finite"):
            load_flow(self.change(bundle, "blocks.1.proj_out.weight", weights))
        flow.blocks[1].proj_out.weight[0, 3] = bad
        with pytest.raises(BundleDamaged, match="not finite"):
            write_bundle(bundle.path, bundle_config(flow), flow, SAMPLING, "")
        assert bundle.path.is_dir(), "the bundle that was there stays"

    def test_a_full_disk(self, bundle: Bundle, flow: Flow, tmp_path: Path) -> None:
        with full_disk(1000), pytest.raises(BundleError, match=r"tiny: cannot be written: .*; the last one is kept"):
            write_bundle(bundle.path, bundle_config(flow), flow, SAMPLING, "another")
        assert read_bundle(bundle.path).model_id == bundle.model_id
        assert list(tmp_path.iterdir()) == [bundle.path]


class TestFinding:
    def test_one_bundle_or_a_directory_of_them(self, bundle: Bundle, flow: Flow, tmp_path: Path) -> None:
        other = write_bundle(tmp_path / "zzz", bundle_config(flow, name="another"), flow, SAMPLING, "")
        (tmp_path / "not-a-bundle").mkdir()
        (tmp_path / "file.txt").write_text("x")
        assert find_bundles(tmp_path) == [other, bundle]
        assert find_bundles(bundle.path) == [bundle]

    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(BundleMissingFile, match="no bundle in it"):
            find_bundles(tmp_path)

    def test_two_of_a_name(self, bundle: Bundle, tmp_path: Path) -> None:
        shutil.copytree(bundle.path, tmp_path / "copy")
        with pytest.raises(BundleError, match=r"copy.*both are named 'tiny'|both are named 'tiny'"):
            find_bundles(tmp_path)

    @pytest.mark.parametrize("leftover", ["part", "old"])
    def test_leftovers_of_an_interrupted_write_are_ignored(self, bundle: Bundle, tmp_path: Path, leftover: str) -> None:
        shutil.copytree(bundle.path, tmp_path / f".tiny.{leftover}")
        assert find_bundles(tmp_path) == [bundle]

    def test_one_unusable(self, bundle: Bundle, tmp_path: Path) -> None:
        shutil.copytree(bundle.path, tmp_path / "bad")
        (tmp_path / "bad" / CONFIG).write_text("{")
        with pytest.raises(BundleDamaged, match="bad"):
            find_bundles(tmp_path)


def test_config_needs_as_many_names_as_classes() -> None:
    flow = FlowConfig(image_size=8, channels=1, patch_size=2, width=64, num_blocks=1, layers_per_block=1, num_classes=2)
    with pytest.raises(ValueError, match=r"class_names: got 1, allowed is 2 names"):
        BundleConfig(name="x", flow=flow, noise=NoiseProtocol(kind="uniform"), class_names=("a",))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ((0.5, 0.5), "class_prior: got 2 values, allowed is 3"),
        ((0.5, 0.5, 0.0), r"class_prior\[2\]: got 0.0, allowed is a number above 0"),
        ((0.5, -0.5, 1.0), r"class_prior\[1\]: got -0.5"),
        ((0.5, float("nan"), 0.5), r"class_prior\[1\]: got nan"),
        ((float("inf"), 0.5, 0.5), r"class_prior\[0\]: got inf"),
        ((True, 0.5, 0.5), r"class_prior\[0\]: got True"),
        (("1", 0.5, 0.5), r"class_prior\[0\]: got '1'"),
        ((0.5, 0.3, 0.19), "class_prior: got values with sum 0.99, allowed is a sum of 1"),
    ],
    ids=str,
)
def test_what_is_no_prior_is_refused(make_flow: MakeFlow, prior: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bundle_config(make_flow(), class_prior=prior)


@pytest.mark.parametrize("prior", [None, 1, "abc", [0.5, 0.5], [[1], [2], [3]]])
def test_a_damaged_prior_in_the_file_is_a_bundle_error(bundle: Bundle, prior: object) -> None:
    edit_json(bundle.path / CONFIG, class_prior=prior)
    rehash(bundle.path)
    with pytest.raises(BundleDamaged, match=r"config\.json"):
        read_bundle(bundle.path)


def test_the_bundled_model_keeps_its_bytes() -> None:
    bundle = read_bundle(BUNDLED / "fashion-mnist")
    assert bundle.config.to_json() == (bundle.path / CONFIG).read_bytes()
