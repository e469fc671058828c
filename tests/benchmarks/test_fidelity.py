"""Solvers of the same seeds draw the same images; a solver that does not is found out."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import fidelity
from model.bundle import Bundle
from model.sampling.plan import CostProfile, PassCost
from model.sampling.sampler import Decoded, Sampler
from tests.benchmarks.programs import document, run
from training.features import EXTRACTORS, Extractor

SMALL = ["--num-samples", "42", "--components", "8", "--batch", "16"]


def _means(pixels_BCHW: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels_BCHW.float(), 2).flatten(1)


def _costs(kernels: object, most_rows: int) -> CostProfile:
    """A pass costs what a step does, so that plans iterate."""
    return CostProfile([PassCost(rows=1, patches=n, seconds=1e-3, threads=1) for n in (1, 4, 8, 15, 16)])


@pytest.fixture
def arguments(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run on the tiny model, random images and simple features."""
    means = Extractor(name="means", num_features=16, extract=_means)
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: means)
    monkeypatch.setattr(fidelity, "measure_costs", _costs)
    generator = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    pixels = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    labels = generator.integers(0, 3, 60).astype(np.uint8)
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (data / f"t10k-{kind}-ubyte").write_bytes(header + array.tobytes())
    return ["--bundle", str(bundle.path), "--data", str(data), *SMALL]


def test_fidelity(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = document(monkeypatch, capsys, fidelity, *arguments, "--tolerance", "1e-4")
    assert content["title"].startswith("Fréchet distance (means/pca8, 42 samples against 60 real images)")
    assert content["plans"] == {"16": ["jacobi/15"] * 3, "1": ["jacobi/15"] * 3}
    assert not content["sampling"]["denoise"]
    rows = {row["solver"]: row for row in content["solvers"]}
    assert list(rows) == ["sequential", "jacobi"]
    assert rows["sequential"]["largest_backward_error"] is None
    assert rows["sequential"]["max_difference_levels"] == rows["sequential"]["difference"] == 0
    assert 0 < rows["jacobi"]["largest_backward_error"] <= 1e-4
    assert 0 < rows["jacobi"]["max_difference_levels"] < 1
    assert content["between_solvers"] < content["between_seeds"]
    assert content["same_distribution"]


def test_another_plan_is_drawn_too(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costly = CostProfile(
        [PassCost(rows=r, patches=n, seconds=1e-3 * n**0.5, threads=1) for r in (1,) for n in (1, 4, 15)]
    )
    monkeypatch.setattr(fidelity, "measure_costs", lambda kernels, most_rows: costly)
    content = document(monkeypatch, capsys, fidelity, *arguments, "--denoise", "--batch", "42")
    assert content["sampling"]["denoise"]
    names = [row["solver"] for row in content["solvers"]]
    assert names[:2] == ["sequential", "jacobi"]
    assert all(name.startswith("plan for") for name in names[2:])
    run(monkeypatch, fidelity, *arguments)
    printed = capsys.readouterr().out
    assert "less than two sets of seeds of one solver" in printed


def test_a_solver_of_another_distribution_is_found_out(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest: Callable[..., Any] = Sampler.decode

    def darker(self: Sampler, *given: Any, **named: Any) -> Any:
        decoded: Decoded = yield from honest(self, *given, **named)
        if not named["plan"].is_sequential:
            decoded.x_BTD.sub_(1)
        return decoded

    monkeypatch.setattr(Sampler, "decode", darker)
    content = document(monkeypatch, capsys, fidelity, *arguments)
    assert not content["same_distribution"]
    assert content["solvers"][1]["max_difference_levels"] > 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-samples", "39"], "num_samples: got 39, allowed is at least 40"),
        (["--extractor", "luck"], "extractor: got 'luck', allowed is efficientnet-lite0"),
        (["--data", "nowhere"], "nowhere: no such directory"),
        (["--batch", "0"], "--batch: at least 1"),
        (["--tolerance", "7"], "tolerance: got 7.0"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, fidelity, *arguments, *more)
    assert message in capsys.readouterr().err


def test_an_untuned_bundle_has_no_plan_to_compare(
    bundle: Bundle, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fidelity, "read_bundle", lambda path: replace(bundle, convergence=None))
    with pytest.raises(SystemExit):
        run(monkeypatch, fidelity, *arguments)
    assert "tiny was not tuned" in capsys.readouterr().err
