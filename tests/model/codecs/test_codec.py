"""Codecs: what diffusers computes, and bundles of models of latents. The vectors are the package's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.bundle import CODEC, BundleConfig, BundleDamaged, BundleMissingFile, read_bundle
from model.codecs.autoencoder_kl import AutoencoderKL
from model.codecs.base import ROWS_PER_PASS, Identity, Latents
from model.codecs.config import CodecConfig
from model.codecs.weights import DIFFUSERS_WEIGHTS, CodecError, load_codec, read_autoencoder
from model.config import NoiseProtocol, SamplingDefaults
from model.flow import Flow
from model.likelihood import add_noise, bits_per_dim, to_model_range
from model.weights import load_flow, update_bundle, write_bundle
from tests.model.conftest import tiny_flow

VECTORS = Path(__file__).parents[2] / "reference" / "autoencoder-kl"
TOYS = sorted(path.name for path in VECTORS.iterdir())
LATENTS = NoiseProtocol(kind="gaussian", std=0.3, space="latents")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A directory of diffusers that may be changed."""
    return Path(shutil.copytree(VECTORS / "grey", tmp_path / "vae"))


def change(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def latent_flow() -> Flow:
    """A flow of the latents of 16x16 grey images."""
    return tiny_flow(dtype=torch.float32, image_size=8, channels=2, patch_size=2)


def described(codec: AutoencoderKL, flow: Flow) -> BundleConfig:
    return BundleConfig(name="latent", flow=flow.config, noise=LATENTS, class_names=("a", "b", "c"), codec=codec.config)


class TestAutoencoder:
    @pytest.mark.parametrize("name", TOYS)
    def test_gives_what_diffusers_gives(self, name: str) -> None:
        codec, expected = read_autoencoder(VECTORS / name), load_file(VECTORS / name / "expected.safetensors")
        torch.testing.assert_close(codec.encode(expected["images"]), expected["latents"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(expected["given"]), expected["decoded"], atol=1e-5, rtol=1e-5)
        assert expected["images"].shape[2] == codec.config.factor * expected["latents"].shape[2]

    def test_older_names_and_shapes_of_attention_are_read(self, toy: Path) -> None:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        older = {}
        for name, value in load_file(toy / DIFFUSERS_WEIGHTS).items():
            for new, old in names.items():
                if f".{new}." in name:
                    name = name.replace(f".{new}.", f".{old}.")
                    value = value[..., None, None] if value.dim() == 2 else value
            older[name] = value.contiguous()
        before = read_autoencoder(toy)
        save_file(older, toy / DIFFUSERS_WEIGHTS)
        image = torch.rand(1, 1, 16, 16)
        assert torch.equal(read_autoencoder(toy).encode(image), before.encode(image))

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"_class_name": "AutoencoderTiny"}, "codec._class_name: got 'AutoencoderTiny'"),
            ({"act_fn": "relu"}, "codec.act_fn: got 'relu'"),
            ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "codec.down_block_types"),
            ({"latents_mean": [0.0, 0.0]}, "codec.latents_mean"),
            ({"out_channels": 3}, "codec.out_channels: got 3"),
            ({"block_out_channels": [8, 9]}, "codec.block_out_channels: got (8, 9)"),
            ({"scaling_factor": 0}, "codec.scaling_factor: got 0"),
            ({"layers_per_block": 2}, "(missing), the architecture has"),
            ({"use_quant_conv": False}, "the architecture has no such tensor"),
            ({"colour": 1}, "fields: got ['colour']"),
        ],
    )
    def test_what_is_not_computed_is_refused(self, toy: Path, fields: dict[str, Any], says: str) -> None:
        change(toy, **fields)
        with pytest.raises(CodecError) as caught:
            read_autoencoder(toy)
        assert says in str(caught.value)
        assert str(toy) in str(caught.value)

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda path: (path / "config.json").unlink(), "AutoencoderKL"),
            (lambda path: (path / "config.json").write_text("["), "config.json"),
            (lambda path: (path / DIFFUSERS_WEIGHTS).write_bytes(b"x" * 100), "not a safetensors file"),
            (lambda path: (path / DIFFUSERS_WEIGHTS).rename(path / "diffusion_pytorch_model.bin"), "is a pickle"),
        ],
        ids=["no-config", "no-json", "no-tensors", "pickle"],
    )
    def test_a_directory_that_is_none_says_why(self, toy: Path, spoil: Callable[[Path], Any], says: str) -> None:
        spoil(toy)
        with pytest.raises(CodecError, match=says):
            read_autoencoder(toy)

    def test_weights_that_are_not_finite_are_refused(self, toy: Path) -> None:
        tensors = load_file(toy / DIFFUSERS_WEIGHTS)
        tensors["decoder.conv_in.bias"][0] = float("nan")
        save_file(tensors, toy / DIFFUSERS_WEIGHTS)
        with pytest.raises(CodecError, match=r"decoder\.conv_in\.bias"):
            read_autoencoder(toy)


class TestBundle:
    def test_a_codec_belongs_to_its_bundle(self, toy: Path, tmp_path: Path) -> None:
        codec, flow = read_autoencoder(toy), latent_flow()
        bundle = write_bundle(
            tmp_path / "latent", described(codec, flow), flow, SamplingDefaults(), "# latent\n", codec=codec
        )
        assert CODEC in bundle.files
        assert (bundle.config.image_size, bundle.config.image_channels) == (16, 1)
        again, pixels = load_codec(bundle), torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
        latent = again.modelled(pixels)
        assert torch.equal(latent, codec.encode(to_model_range(pixels)))
        assert latent.shape == (2, 2, 8, 8)
        assert torch.equal(again.images(latent), codec.decode(latent))
        assert torch.equal(load_flow(bundle).unpatchify(flow.patchify(latent)), latent)
        # Another codec is another model, though the flow is the same; a new recommendation is not.
        codec.decoder.conv_out.bias.add_(0.5)
        other = write_bundle(
            tmp_path / "other", described(codec, flow), flow, SamplingDefaults(), "# latent\n", codec=codec
        )
        assert other.model_id != bundle.model_id
        changed = update_bundle(bundle, sampling=SamplingDefaults(guidance_scale=1.0))
        assert changed.model_id == bundle.model_id
        assert torch.equal(load_codec(changed).modelled(pixels), latent)

    @pytest.mark.parametrize("spoiled", ["weights", "hash", "missing"])
    def test_a_codec_that_is_another_is_found(self, toy: Path, tmp_path: Path, spoiled: str) -> None:
        codec, flow = read_autoencoder(toy), latent_flow()
        bundle = write_bundle(tmp_path / "b", described(codec, flow), flow, SamplingDefaults(), "# b\n", codec=codec)
        path = bundle.path / CODEC
        if spoiled == "weights":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            with pytest.raises(BundleDamaged, match=CODEC):
                load_codec(bundle)
        elif spoiled == "hash":
            manifest = json.loads((bundle.path / "manifest.json").read_text())
            manifest["sha256"][CODEC] = "0" * 64
            (bundle.path / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(BundleDamaged, match=CODEC):
                read_bundle(bundle.path)
        else:
            path.unlink()
            with pytest.raises(BundleMissingFile, match=CODEC):
                read_bundle(bundle.path)

    def test_flow_noise_and_codec_must_fit(self, toy: Path) -> None:
        codec, flow = read_autoencoder(toy), latent_flow()
        names = ("a", "b", "c")
        pixels = NoiseProtocol(kind="gaussian", std=0.3)
        with pytest.raises(ValueError, match=r"noise\.space: got 'pixels', allowed is 'latents'"):
            BundleConfig(name="x", flow=flow.config, noise=pixels, class_names=names, codec=codec.config)
        with pytest.raises(ValueError, match="channels: got 2, allowed is 1 or 3"):
            BundleConfig(name="x", flow=flow.config, noise=pixels, class_names=names)
        with pytest.raises(ValueError, match=r"noise\.space: got 'latents', allowed is 'pixels'"):
            BundleConfig(name="x", flow=tiny_flow().config, noise=LATENTS, class_names=names)
        with pytest.raises(ValueError, match="channels: got 1, allowed is 2"):
            BundleConfig(name="x", flow=tiny_flow().config, noise=LATENTS, class_names=names, codec=codec.config)

    def test_a_codec_is_written_with_its_weights(self, toy: Path, tmp_path: Path) -> None:
        flow = latent_flow()
        with pytest.raises(ValueError, match="codec"):
            write_bundle(tmp_path / "b", described(read_autoencoder(toy), flow), flow, SamplingDefaults(), "# b\n")
        assert not (tmp_path / "b").exists()


class TestMeaning:
    def test_noise_is_added_to_pixels_or_to_latents(self, toy: Path) -> None:
        codec = read_autoencoder(toy)
        count = ROWS_PER_PASS + 1
        pixels = torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8)
        draw, latents = torch.randn(count, 2, 8, 8), codec.encode(to_model_range(pixels))
        modelled = Latents(codec).modelled(pixels)
        torch.testing.assert_close(add_noise(modelled, LATENTS, draw), latents + 0.3 * draw)
        assert torch.equal(add_noise(modelled, LATENTS, 0.0), modelled)
        assert Identity().modelled(pixels) is pixels
        assert Identity().images(draw) is draw

    def test_bits_of_latents_have_no_8_bit_step(self) -> None:
        assert bits_per_dim(-10.0, 10, LATENTS) == pytest.approx(1 / 0.6931471805599453)

    def test_descriptions_survive_a_round_trip(self, toy: Path) -> None:
        config = read_autoencoder(toy).config
        assert CodecConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
