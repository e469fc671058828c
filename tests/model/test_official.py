"""Import of official-layout checkpoints, and of files that only look like one."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.bundle import BundleConfig, BundleDamaged
from model.config import NoiseProtocol, SamplingDefaults
from model.official import CheckpointFormatError, infer_config, read_checkpoint, to_flow
from model.weights import load_flow, write_bundle

EXPECTED = "expected a state dict of TarFlow in the official layout"
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def tensors(reference: Path) -> dict[str, Tensor]:
    return read_checkpoint(reference / "tiny_cond.pth")


def refuse(path: Path, found: str) -> None:
    with pytest.raises(CheckpointFormatError, match=found) as caught:
        to_flow(read_checkpoint(path))
    assert str(path) in str(caught.value)
    assert EXPECTED in str(caught.value)
    assert "found" in str(caught.value)


@pytest.mark.parametrize("name", ["tiny_cond", "tiny_uncond", "tiny_uncond_vp"])
class TestImport:
    def test_becomes_a_bundle(self, reference: Path, tmp_path: Path, name: str) -> None:
        flow = to_flow(read_checkpoint(reference / f"{name}.pth"))
        classes = tuple(f"class {i}" for i in range(flow.config.num_classes))
        noise = NoiseProtocol(kind="gaussian", std=0.05)
        config = BundleConfig(name=name, flow=flow.config, noise=noise, class_names=classes)
        loaded = load_flow(write_bundle(tmp_path / name, config, flow, SamplingDefaults(), ""))
        state = flow.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
        assert not flow.training
        assert not any(parameter.requires_grad for parameter in flow.parameters())

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_prefixes_of_wrappers(self, reference: Path, tmp_path: Path, name: str, prefix: str) -> None:
        """DistributedDataParallel and torch.compile put their names before the model's."""
        original = read_checkpoint(reference / f"{name}.pth")
        path = tmp_path / "wrapped.pth"
        torch.save({prefix + key: value for key, value in original.items()}, path)
        ours, theirs = to_flow(read_checkpoint(path)), to_flow(original)
        assert ours.config == theirs.config
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def test_half_precision_becomes_float32(self, reference: Path, name: str) -> None:
        original = read_checkpoint(reference / f"{name}.pth")
        flow = to_flow({key: value.bfloat16() for key, value in original.items()})
        assert {value.dtype for value in flow.state_dict().values()} == {torch.float32}


def test_learned_variance_is_imported(reference: Path) -> None:
    original = read_checkpoint(reference / "tiny_uncond_vp.pth")
    flow = to_flow(original)
    assert torch.equal(flow.prior_variance, original["var"])
    assert (flow.prior_variance != 1).any(), "the vector has a variance of its own"


def test_without_a_variance_the_prior_is_standard(tensors: dict[str, Tensor]) -> None:
    tensors.pop("var", None)
    assert (to_flow(tensors).prior_variance == 1).all()


def test_layers_may_differ_between_blocks(tensors: dict[str, Tensor]) -> None:
    kept = {key: value for key, value in tensors.items() if not key.startswith("blocks.1.attn_blocks.1.")}
    assert infer_config(kept).layers_per_block == (2, 1, 2)
    assert to_flow(kept).config.layer_counts == (2, 1, 2)


def test_non_finite_weights_do_not_become_a_bundle(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["blocks.0.proj_in.bias"][0] = float("nan")
    flow = to_flow(tensors)
    names = tuple("abcde")
    config = BundleConfig(name="x", flow=flow.config, noise=NoiseProtocol(kind="uniform"), class_names=names)
    with pytest.raises(BundleDamaged, match=r"blocks\.0\.proj_in\.bias has values that are not finite"):
        write_bundle(tmp_path / "x", config, flow, SamplingDefaults(), "")


class TestNotACheckpoint:
    def test_no_file(self, tmp_path: Path) -> None:
        refuse(tmp_path / "nothing.pth", "no such file")
        refuse(tmp_path, "no such file")

    @pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x80\x02", b"\x89PNG\r\n\x1a\n" + bytes(50)])
    def test_other_bytes(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x").write_bytes(data)
        refuse(tmp_path / "x", "unreadable file")

    def test_random_and_damaged_bytes(self, tmp_path: Path) -> None:
        """Whatever a file holds, the answer is one kind of error."""
        generator, path = random.Random(0), tmp_path / "x"
        torch.save({"blocks.0.proj_in.weight": torch.zeros(2, 4)}, path)
        seeds = [path.read_bytes(), pickle.dumps({"a": [1, 2]}), b"\x80\x02" + generator.randbytes(20)]
        torch.save({"x": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        seeds += [path.read_bytes(), generator.randbytes(100)]
        for _ in range(400):
            data = bytearray(generator.choice(seeds))
            for _ in range(generator.choice([1, 2, 8])):
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(data[: generator.randrange(1, len(data))] if generator.random() < 0.2 else data)
            with pytest.raises(CheckpointFormatError, match="expected"):
                to_flow(read_checkpoint(path))

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_code_is_not_executed(self, tmp_path: Path, protocol: int) -> None:
        victim = tmp_path / "executed"

        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (victim,)

        path = tmp_path / "x"
        path.write_bytes(pickle.dumps({"blocks": Attack()}, protocol=protocol))
        refuse(path, "unreadable file")
        torch.save({"blocks.0.proj_in.weight": Attack()}, path, pickle_protocol=2)
        refuse(path, "unreadable file")
        assert not victim.exists()

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ([torch.zeros(1)], "found a list"),
            (torch.zeros(3), "found a Tensor"),
            (3, "found a int"),
            ({}, "an empty dict"),
            ({"epoch": 3, "x": torch.zeros(1)}, "entries that are not tensors: epoch"),
            ({"model": {"x": torch.zeros(1)}}, "entries that are not tensors: model"),
        ],
    )
    def test_other_objects(self, tmp_path: Path, content: object, found: str) -> None:
        torch.save(content, tmp_path / "x")
        refuse(tmp_path / "x", found)


def remove(key: str) -> Change:
    return lambda tensors: tensors.__delitem__(key)


def replace(key: str, value: Tensor) -> Change:
    return lambda tensors: tensors.__setitem__(key, value)


def widen_patches(tensors: dict[str, Tensor]) -> None:
    for block in range(3):
        tensors[f"blocks.{block}.proj_in.weight"] = torch.zeros(64, 32)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (remove("blocks.0.proj_in.weight"), "blocks.0.proj_in.weight with 2 axes, found no such tensor"),
        (remove("blocks.0.pos_embed"), "blocks.0.pos_embed with 2 axes, found no such tensor"),
        (remove("blocks.1.pos_embed"), "blocks.1.position with shape .*, found none"),
        (remove("blocks.2.attn_blocks.1.mlp.main.2.bias"), r"blocks.2.layers.1.mlp.down.bias .* found none"),
        (replace("blocks.0.pos_embed", torch.zeros(16)), "found 1 axes"),
        (replace("blocks.0.class_embed", torch.zeros(5, 64)), "found 2 axes"),
        (replace("blocks.0.pos_embed", torch.zeros(15, 64)), "48 values in a patch and 15 patches"),
        (widen_patches, "1 or 3 channels on a square grid, found 32 values in a patch"),
        (replace("blocks.1.proj_in.weight", torch.zeros(64, 12)), r"found \(64, 12\)"),
        (replace("blocks.1.proj_out.weight", torch.zeros(48, 64)), r"with shape \(96, 64\), found \(48, 64\)"),
        (replace("blocks.0.proj_out.weight", torch.zeros(50, 64)), r"found \(50, 64\)"),
        (replace("blocks.0.proj_in.weight", torch.zeros(0, 48)), "width: got 0"),
        (replace("blocks.0.proj_in.weight", torch.zeros(100, 48)), "multiple of head_dim 64"),
        (replace("blocks.0.attn_blocks.0.mlp.main.0.weight", torch.zeros(100, 64)), "found"),
        (replace("blocks.0.proj_in.bias", torch.zeros(64, dtype=torch.int64)), "floating-point .* found torch.int64"),
        (replace("blocks.0.proj_in.bias", torch.zeros(64, dtype=torch.complex64)), "found torch.complex64"),
        (replace("blocks.9.attn_blocks.0.norm", torch.zeros(1)), r"blocks numbered from 0, found \[0, 1, 2, 9\]"),
        (replace("blocks.0.attn_blocks.99999999.norm", torch.zeros(1)), "layers of block 0 numbered from 0"),
        (replace("optimizer", torch.zeros(1)), r"optimizer with shape none, found \(1,\)"),
        (dict.clear, "no such tensor"),
    ],
)
def test_inconsistent_tensors(tensors: dict[str, Tensor], change: Change, found: str) -> None:
    change(tensors)
    with pytest.raises(CheckpointFormatError, match=found) as caught:
        to_flow(tensors)
    assert "expected" in str(caught.value)


def test_two_channels_are_refused(tensors: dict[str, Tensor]) -> None:
    """C·P² = 2·P² fits neither grey nor RGB."""
    tensors["blocks.0.proj_in.weight"] = torch.zeros(64, 2 * 3**2)
    with pytest.raises(CheckpointFormatError, match=r"1 or 3 channels.*found 18 values in a patch and 16 patches"):
        infer_config(tensors)
