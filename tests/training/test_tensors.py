"""Files of tensors: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.full_disk import full_disk
from training.tensors import read_tensors, write_tensors


def test_what_was_written_comes_back_and_a_full_disk_leaves_the_last(tmp_path: Path) -> None:
    path, values = tmp_path / "values.safetensors", torch.arange(100_000.0)
    write_tensors(path, {"values": values}, {"made": "of these"})
    with full_disk(200_000), pytest.raises(OSError, match=r"values\.safetensors: cannot be written: .*too large"):
        write_tensors(path, {"values": -values})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_tensors(path, "")["values"], values)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made": "of these"}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"values\.safetensors: damaged: .*; make it again"):
        read_tensors(path, "make it again")
