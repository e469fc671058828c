"""Files of tensors that a run keeps for itself: whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def read_tensors(path: Path, advice: str) -> dict[str, Tensor]:
    """What is in a file, on the CPU; raises ``ValueError`` that names the file, with ``advice``, for a damaged one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}; {advice}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, replacing one that is there; raises ``OSError`` where the disk cannot take it."""
    part = path.with_suffix(".part")
    try:
        save_file(dict(tensors), part, None if metadata is None else dict(metadata))
        part.replace(path)
    except SafetensorError as error:
        # An error of the library's own, neither ``OSError`` nor ``ValueError``, whatever the system said.
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        # A full disk would stay full by it.
        part.unlink(missing_ok=True)
