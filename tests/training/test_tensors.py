"""Files of tensors: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.full_disk import full_disk
from training.tensors import write_tensors


def test_what_was_written_comes_back_and_a_full_disk_leaves_the_last(tmp_path: Path) -> None:
    path, values = tmp_path / "values.safetensors", torch.arange(100_000.0)
    write_tensors(path, {"values": values}, {"made": "of these"})
    with full_disk(200_000), pytest.raises(OSError, match=r"values\.safetensors: cannot be written: .*too large"):
        write_tensors(path, {"values": -values})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["values"], values)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made": "of these"}
