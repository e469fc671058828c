"""What a report cannot be made with, or written to, is refused before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.bundle import Bundle, BundleConfig
from model.config import SamplingDefaults
from model.flow import Flow
from model.weights import load_flow, write_bundle
from tests.training.conftest import run_command
from training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("pixel_features")


def test_options_that_do_not_fit_are_refused_before_anything_is_measured(
    make_bundle: Callable[..., Bundle], config: TrainConfig, idx_data: Path, tmp_path: Path
) -> None:
    def refused(*options: object) -> str:
        return run_command("evaluate", make_bundle().path, "--data", idx_data, *options, status=2)

    assert "baseline: got True, allowed is with --report only" in refused("--baseline")
    assert "extractor: got 'x', allowed is with --report only" in refused("--extractor", "x")
    assert "baseline_learning_rate: got 0.1, allowed is with" in refused("--baseline-learning-rate", "0.1")
    for rate in ("0", "nan", "inf"):
        options = ("--report", tmp_path / "report", "--baseline-learning-rate", rate)
        assert "baseline_learning_rate: got" in refused(*options)
    out = ("--report", tmp_path / "report")
    assert "num_samples: got 39, allowed is an integer >= 40" in refused(*out, "--samples", "39")
    assert "extractor: got 'inception', allowed is efficientnet-lite0" in refused(*out, "--extractor", "inception")
    missing = f"statistics: got {tmp_path / 'none.npz'}, which cannot be read (No such file or directory), allowed is"
    assert missing in refused(*out, "--statistics", tmp_path / "none.npz")
    flow = Flow(replace(config.flow, image_size=12))
    described = BundleConfig(name="larger", flow=flow.config, noise=config.noise, class_names=("0", "1"))
    larger = write_bundle(tmp_path / "larger", described, flow, SamplingDefaults(), "# larger\n")
    found = refused(larger.path, *out, "--statistics-out", tmp_path / "statistics.npz")
    assert "statistics_out: got bundles of 1x12x12 and 1x8x8 pixels, allowed is one size" in found
    assert "there are 20 and 44" in refused(*out)
    assert not (tmp_path / "report").exists()


def test_where_nothing_can_be_written_is_told_before_anything_is_measured(
    make_bundle: Callable[..., Bundle], idx_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, file, named = make_bundle(), tmp_path / "file", tmp_path / "reports" / "squares"
    file.write_text("kept")
    named.parent.mkdir()
    named.write_text("kept")
    monkeypatch.setattr("training.evaluate.load_flow", lambda *arguments: pytest.fail("something was measured"))

    def refused(*options: object) -> str:
        return run_command("evaluate", bundle.path, "--data", idx_data, *options, status=2)

    new = "allowed is a directory, or the path of a new one"
    assert refused("--report", file) == f"Error: report: got '{file}', {new}\n"
    assert refused("--report", file / "in") == f"Error: report: got '{file / 'in'}', {new}; {file} is a file\n"
    flow = load_flow(bundle)
    other = write_bundle(
        tmp_path / "other", replace(bundle.config, name="other"), flow, SamplingDefaults(), "# other\n"
    )
    assert f"report: got '{named}', {new}" in refused(other.path, "--report", named.parent)
    out = ("--report", tmp_path / "report", "--statistics-out")
    for path in (tmp_path, file / "statistics.npz"):
        assert f"statistics_out: got '{path}', allowed is a file" in refused(*out, path)
    monkeypatch.setattr("training.destinations.os.access", lambda path, mode: Path(path) != tmp_path)
    assert f"report: got '{tmp_path / 'new'}', allowed is one that can be written" in refused(
        "--report", tmp_path / "new"
    )
    found = refused("--report", named.parent, "--statistics-out", tmp_path / "new.npz")
    assert f"statistics_out: got '{tmp_path / 'new.npz'}', allowed is one that can be written" in found
    assert file.read_text() == named.read_text() == "kept"
