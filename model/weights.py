"""The tensors of a bundle: writing a whole bundle, and loading its flow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as write_safetensors

from model.bundle import (
    CARD,
    CONFIG,
    MANIFEST,
    SAMPLER,
    WEIGHTS,
    Bundle,
    BundleConfig,
    BundleDamaged,
    BundleShapeMismatch,
    read_bundle,
    read_file,
    sha256,
)
from model.config import SamplingDefaults
from model.flow import Flow


def write_bundle(directory: Path, config: BundleConfig, flow: Flow, sampling: SamplingDefaults, card: str) -> Bundle:
    """Write a complete bundle, replacing one that is there; returns what was written.

    The new directory is built beside the old and swapped in, so a reader never sees half a bundle.
    Raises :class:`BundleDamaged` when a weight is not finite.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
    _check_finite(tensors, directory)
    files = {
        CONFIG: config.to_json(),
        WEIGHTS: write_safetensors(tensors),
        SAMPLER: (json.dumps({"defaults": sampling.to_dict()}, indent=2) + "\n").encode(),
        CARD: card.encode(),
    }
    _replace_files(directory, files)
    return read_bundle(directory)


def update_bundle(bundle: Bundle, *, sampling: SamplingDefaults | None = None, card: str | None = None) -> Bundle:
    """Change a bundle's recommendation or card; its weights, and so its id, stay the same."""
    files = {name: read_file(bundle.path, name) for name in (CONFIG, WEIGHTS, SAMPLER, CARD)}
    if sampling is not None:
        content = json.loads(files[SAMPLER])
        files[SAMPLER] = (json.dumps({**content, "defaults": sampling.to_dict()}, indent=2) + "\n").encode()
    if card is not None:
        files[CARD] = card.encode()
    _replace_files(bundle.path, files)
    return read_bundle(bundle.path)


def _replace_files(directory: Path, files: dict[str, bytes]) -> None:
    part, old = directory.with_name(directory.name + ".part"), directory.with_name(directory.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    for name, data in files.items():
        (part / name).write_bytes(data)
    hashes = {name: sha256(data) for name, data in files.items()}
    (part / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _check_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise BundleDamaged(f"{path}: weight {name} has values that are not finite")


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
    _check_finite(tensors, path)
    flow.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return flow.eval().requires_grad_(False).to(device)
