"""The benchmarks of sampling and denoising run, and with --json print one JSON document and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import denoising, sampling
from benchmarks.methods import GS_JACOBI, LEVEL_PLAN, PLAN, PUBLISHED, SELECTIVE, SEQUENTIAL
from tests.benchmarks.programs import document, run

SMALL_SAMPLING = ["--random", "14-64-2-1", "--batch", "3", "--repeats", "1"]
SMALL_DENOISING = ["--image-size", "16", "--width", "64", "--layers", "1", "--rows", "2"]


def test_sampling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = document(monkeypatch, capsys, sampling, *SMALL_SAMPLING)
    assert content["model"] == "random 14-64-2-1"
    (result,) = content["results"]
    assert result["batch"] == 3
    assert result["plan_over_fastest_other"] > 0
    methods = {row["method"]: row for row in result["methods"]}
    assert list(methods) == [PUBLISHED, SEQUENTIAL, SELECTIVE, GS_JACOBI, PLAN, LEVEL_PLAN]
    for row in methods.values():
        assert row["seconds_per_image"] > 0
        assert row["images_per_second"] == pytest.approx(1 / row["seconds_per_image"])
        assert row["ratio_to_published"] > 0
        # Calibration keeps the approximate ones within a grey level of other seeds' images.
        assert row["max_difference_levels"] < 2
        assert row["backward_error"] < 0.1
    assert methods[PUBLISHED]["ratio_to_published"] == 1
    for name in (PUBLISHED, SEQUENTIAL):
        assert methods[name]["max_difference_levels"] < 1e-2
        assert methods[name]["backward_error"] < 1e-4


def test_sampling_by_some_methods(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL_SAMPLING, "--methods", "our sequential, our plan", "--batch", "1,2", "--bandwidth", "0.01"]
    content = document(monkeypatch, capsys, sampling, *arguments)
    assert [result["batch"] for result in content["results"]] == [1, 2]
    for result in content["results"]:
        assert [row["method"] for row in result["methods"]] == [SEQUENTIAL, PLAN]
        assert all(row["share_of_roofline"] > 0 for row in result["methods"])


@pytest.mark.long
def test_denoising(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = document(monkeypatch, capsys, denoising, *SMALL_DENOISING)
    assert content["size"] == {"blocks": 8, "layers": 1, "width": 64, "image_size": 16, "rows": 2}
    assert content["max_gradient_difference"] < 1e-4 * max(1, content["max_gradient"])
    assert isinstance(content["within_limit"], bool)


def test_tables_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(variant: str, given: list[str], gradient_file: Path) -> dict[str, int]:
        torch.save(torch.zeros(1), gradient_file)
        return {"peak_bytes": 2**20}

    monkeypatch.setattr(denoising, "measure_apart", measured)
    run(monkeypatch, denoising, *SMALL_DENOISING)
    run(monkeypatch, sampling, *SMALL_SAMPLING, "--methods", "our sequential,our plan", "--batch", "1")
    for printed in capsys.readouterr().out.split("Sampling"):
        assert "ratio" in printed
        assert f"torch {torch.__version__}" in printed or "our plan" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "nowhere"], "nowhere: no such directory (for random weights give --random)"),
        (["--random", "4-100-4-4"], "width: got 100"),
        (["--random", "big"], "--random"),
        (["--random", "--batch", "0"], "--batch"),
        (["--random", "--repeats", "0"], "--repeats: at least 1"),
        (["--random", "--methods", "our plan,luck"], "--methods: got luck, allowed is some of published loop"),
    ],
)
def test_wrong_arguments_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, sampling, *arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.out == ""
