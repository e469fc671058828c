"""The tensors of a bundle: writing a whole bundle, and loading its flow."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as write_safetensors

from model.bundle import (
    CALIBRATION,
    CARD,
    CODEC,
    CONFIG,
    MANIFEST,
    SAMPLER,
    SAMPLES,
    WEIGHTS,
    Bundle,
    BundleConfig,
    BundleDamaged,
    BundleError,
    BundleShapeMismatch,
    read_bundle,
    read_file,
    sha256,
)
from model.codecs.autoencoder_kl import AutoencoderKL
from model.codecs.weights import pack
from model.config import SamplingDefaults
from model.flow import Flow
from model.sampling.plan import ConvergenceProfile


def write_bundle(
    directory: Path,
    config: BundleConfig,
    flow: Flow,
    sampling: SamplingDefaults,
    card: str,
    samples_png: bytes | None = None,
    codec: AutoencoderKL | None = None,
) -> Bundle:
    """Write a complete bundle, replacing one that is there; returns what was written.

    ``samples_png`` is a picture that the card may show as ``samples.png``. With a ``codec`` the bundle gets its
    weights, and its configuration their hash.
    The new directory is built beside the old and swapped in, so a reader sees the old bundle, the new one,
    or for an instant none, but never half of one. Raises :class:`BundleError` when the directory holds
    something else, or the disk cannot take it.
    Raises :class:`BundleDamaged` when a weight is not finite.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
    _check_values(tensors, directory)
    codec_files: dict[str, bytes] = {}
    if (codec is None) is not (config.codec is None):
        raise ValueError("codec: a configuration with a codec is written with its weights, and no other with any")
    if codec is not None:
        described, codec_files[CODEC] = pack(codec)
        config = replace(config, codec=described)
    files = {
        CONFIG: config.to_json(),
        WEIGHTS: write_safetensors(tensors),
        SAMPLER: (json.dumps({"defaults": sampling.to_dict()}, indent=2) + "\n").encode(),
        CARD: card.encode(),
        **codec_files,
    }
    if samples_png is not None:
        files[SAMPLES] = samples_png
    _replace_files(directory, files, created=int(time.time()))
    return read_bundle(directory)


def update_bundle(
    bundle: Bundle,
    *,
    sampling: SamplingDefaults | None = None,
    convergence: ConvergenceProfile | None = None,
    card: str | None = None,
    samples_png: bytes | None = None,
    calibration: bytes | None = None,
) -> Bundle:
    """Change a bundle's recommendation, profile, card, picture or calibration.

    What is not given stays as it is, as do the weights, and so the model's id.
    """
    files = {name: read_file(bundle.path, name) for name in bundle.files}
    changes = {
        name: record.to_dict()
        for name, record in (("defaults", sampling), ("convergence", convergence))
        if record is not None
    }
    if changes:
        files[SAMPLER] = (json.dumps({**json.loads(files[SAMPLER]), **changes}, indent=2) + "\n").encode()
    if card is not None:
        files[CARD] = card.encode()
    if samples_png is not None:
        files[SAMPLES] = samples_png
    if calibration is not None:
        files[CALIBRATION] = calibration
    _replace_files(bundle.path, files, created=bundle.created)
    return read_bundle(bundle.path)


def _replace_files(directory: Path, files: dict[str, bytes], created: int) -> None:
    directory = directory.resolve()
    if (
        directory.exists()
        and not (directory / MANIFEST).is_file()
        and (directory.is_file() or any(directory.iterdir()))
    ):
        raise BundleError(f"{directory}: exists and is not a bundle; choose a new directory")
    # Names with a dot in front, so that what an interruption leaves is not taken for a bundle.
    part, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    hashes = {name: sha256(data) for name, data in files.items()}
    try:
        for name, data in files.items():
            (part / name).write_bytes(data)
        (part / MANIFEST).write_text(json.dumps({"created": created, "sha256": hashes}, indent=2) + "\n")
    except OSError as error:
        # A full disk would stay full by it.
        shutil.rmtree(part, ignore_errors=True)
        last = "; the last one is kept" if directory.exists() else ""
        raise BundleError(f"{directory}: cannot be written: {error}{last}") from error
    # An `old` that is there now was left by a crash, and until here it may have been the only whole bundle.
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _check_values(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise BundleDamaged(f"{path}: weight {name} has values that are not finite")
    if not bool((tensors["prior_variance"] > 0).all()):
        raise BundleDamaged(f"{path}: weight prior_variance has values that are not positive")


def load_flow(bundle: Bundle, device: torch.device | str = "cpu") -> Flow:
    """Load a bundle's flow for inference: float32, gradients off, on ``device``.

    Raises :class:`BundleDamaged` for a wrong hash, an unreadable file or non-finite weights, and
    :class:`BundleShapeMismatch` when the tensors do not fit the architecture.
    """
    path = bundle.path / WEIGHTS
    data = read_file(bundle.path, WEIGHTS)
    if sha256(data) != bundle.weights_sha256:
        raise BundleDamaged(f"{path}: content does not match its sha256 in {MANIFEST}")
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        raise BundleDamaged(f"{path}: not a safetensors file: {error}") from error
    with torch.device("meta"):
        flow = Flow(bundle.config.flow)
    expected = {name: tuple(value.shape) for name, value in flow.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise BundleShapeMismatch(
                f"{path}: tensor {name} has shape {found.get(name, 'none (missing)')}, "
                f"the architecture in {CONFIG} has {expected.get(name, 'no such tensor')}"
            )
    _check_values(tensors, path)
    flow.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return flow.eval().requires_grad_(False).to(device)
