"""The weights of a codec: from a directory that diffusers has saved, into a bundle, and from a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as write_safetensors
from torch import Tensor

from model.bundle import CODEC, MANIFEST, Bundle, BundleDamaged, read_file, sha256
from model.codecs.autoencoder_kl import AutoencoderKL
from model.codecs.base import Codec, Identity, Latents
from model.codecs.config import CodecConfig

DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
OLDER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What attention's layers were called in weights from before 2023."""


class CodecError(ValueError):
    """A directory that is no autoencoder, or none that can be used; the message names the file and the reason."""


def read_autoencoder(directory: Path) -> AutoencoderKL:
    """The autoencoder of a directory that ``AutoencoderKL.save_pretrained`` of diffusers wrote, in float32.

    Raises :class:`CodecError`. A pickle is never read, since it can run anything.
    """
    try:
        config = CodecConfig.from_diffusers(json.loads((directory / DIFFUSERS_CONFIG).read_bytes()))
    except OSError as error:
        reason = f"{directory / DIFFUSERS_CONFIG}: cannot be read: {error.strerror}"
        raise CodecError(f"{reason}; give a directory that diffusers has saved an AutoencoderKL in") from error
    except (ValueError, RecursionError) as error:
        raise CodecError(f"{directory / DIFFUSERS_CONFIG}: {error}") from error
    path = directory / DIFFUSERS_WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        pickled = (
            f"; {PICKLED} is a pickle, save it with safe_serialization=True" if (directory / PICKLED).exists() else ""
        )
        raise CodecError(f"{path}: cannot be read: {error.strerror}{pickled}") from error
    return _network(config, data, path)


def _network(config: CodecConfig, data: bytes, path: Path) -> AutoencoderKL:
    """Raises :class:`CodecError` for weights that are not those of the architecture."""
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        raise CodecError(f"{path}: not a safetensors file: {error}") from error
    with torch.device("meta"):
        network = AutoencoderKL(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    tensors = _with_present_names(tensors, expected)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CodecError(
                f"{path}: tensor {name} has shape {found.get(name, 'none (missing)')}, "
                f"the architecture has {expected.get(name, 'no such tensor')}"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CodecError(f"{path}: weight {name} has values that are not finite")
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _with_present_names(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights under today's names and in today's shapes: attention was made of 1×1 convolutions once."""
    renamed = {}
    for name, value in tensors.items():
        for old, new in OLDER_NAMES.items():
            if ".attentions." in name:
                name = name.replace(old, new)
        if value.dim() == 4 and len(expected.get(name, ())) == 2:
            value = value.flatten(1)
        renamed[name] = value
    return renamed


def pack(codec: AutoencoderKL) -> tuple[CodecConfig, bytes]:
    """A codec for a bundle: its description with the hash of its weights, and their file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in codec.state_dict().items()}
    data = write_safetensors(tensors)
    return replace(codec.config, sha256=sha256(data)), data


def load_codec(bundle: Bundle, device: torch.device | str = "cpu") -> Codec:
    """A bundle's codec for inference on ``device``: its autoencoder in float32, or the identity.

    Raises :class:`~model.bundle.BundleDamaged` for a wrong hash, or weights that are not those of the description.
    """
    config = bundle.config.codec
    if config is None:
        return Identity()
    path = bundle.path / CODEC
    data = read_file(bundle.path, CODEC)
    if sha256(data) != config.sha256:
        raise BundleDamaged(f"{path}: content does not match its sha256 in {MANIFEST} and config.json")
    try:
        return Latents(_network(config, data, path).to(device))
    except CodecError as error:
        raise BundleDamaged(str(error)) from error
