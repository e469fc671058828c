"""Memory is measured, and what is measured in part is what the whole would be."""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

import pytest
import torch

from benchmarks import resources
from benchmarks.memory import available_bytes, peak_bytes
from benchmarks.models import random_flow
from benchmarks.resources import QUICK, SHAPES, WORKS, blocks_to_run, num_parameters, part
from tests.benchmarks.programs import document, run

CPU = torch.device("cpu")
MIB = 2**20
FOUND = {"peak_bytes": MIB, "seconds": 1234.0, "is_estimate": True, "blocks_run": 1, "steps_timed": None}


def test_peak_is_what_work_touched_at_a_time() -> None:
    del_first = torch.ones(64 * MIB // 4)
    del del_first

    def work() -> float:
        total = 0.0
        for _ in range(3):
            # One after another: 64 MiB at a time. What is not touched is not held.
            torch.empty(512 * MIB // 4)
            total += float(torch.ones(64 * MIB // 4).sum())
        return total

    peak, total = peak_bytes(work, CPU)
    assert total == 3 * 64 * MIB / 4
    assert 60 * MIB < peak < 90 * MIB


def test_available_memory_is_known_here() -> None:
    available = available_bytes(CPU)
    assert available is None or available > 0


def test_parameters_are_counted_without_making_them() -> None:
    made = sum(parameter.numel() for parameter in random_flow(QUICK).parameters())
    assert num_parameters(QUICK) == made
    assert num_parameters(SHAPES[0].config) == 466286784


@pytest.mark.parametrize("work", ["scoring", "denoising"])
def test_a_part_of_the_blocks_fits_the_time(work: str) -> None:
    config = SHAPES[0].config
    assert blocks_to_run(work, config, 1, CPU, full=True) == 8
    assert blocks_to_run(work, QUICK, 1, CPU, full=False) == 2
    assert 1 <= blocks_to_run(work, config, 1, CPU, full=False) < 8
    assert blocks_to_run(work, config, 100, CPU, full=False) == 1
    assert blocks_to_run(work, config, 1, torch.device("cuda"), full=False) == 8
    assert part(config, 3).layer_counts == (8, 8, 8)


def test_time_of_a_part_stands_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {work: resources.measure(work, QUICK, 2, CPU, full=True) for work in WORKS}
    assert not any(result["is_estimate"] for result in whole.values())
    monkeypatch.setattr(resources, "MAX_STEPS", 1)
    monkeypatch.setattr(resources, "MAX_FLOPS", 1)
    for work, all_of_it in whole.items():
        measured = resources.measure(work, QUICK, 2, CPU, full=False)
        assert measured["is_estimate"]
        assert measured["blocks_run"] == (2 if work == "sampling" else 1)
        # The same thing and not another; how near it comes is no matter for a test.
        assert 0.02 < measured["seconds"] / all_of_it["seconds"] < 50


def measured_here(work: str, place: int, arguments: argparse.Namespace) -> dict[str, Any]:
    return resources.measure(work, resources.pick(place, arguments.quick).config, arguments.rows, CPU, arguments.full)


def test_resources(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(resources, "measure_apart", measured_here)
    content = document(monkeypatch, capsys, resources, "--quick", "--rows", "2")
    assert content["rows"] == 2
    assert [result["size"] for result in content["results"]] == [64, 128, 256, 256, 512]
    for result in content["results"]:
        assert result["weights_bytes"] == 4 * result["parameters"]
        assert list(result["works"]) == list(WORKS)
        assert all(found["seconds"] > 0 and found["peak_bytes"] >= 0 for found in result["works"].values())


def test_a_measurement_is_a_process_of_its_own() -> None:
    given = argparse.Namespace(device="cpu", rows=2, quick=True, full=False)
    found = resources.measure_apart("scoring", 0, given)
    assert found["seconds"] > 0
    assert not found["is_estimate"]


def test_the_table_says_what_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "available_bytes", lambda device: 2**26)
    content = document(monkeypatch, capsys, resources, "--sizes", "512")
    found = content["results"][0]["works"]
    assert [found[work]["not_measured"] for work in WORKS] == ["needs 5 GiB", "needs 1 GiB", "needs 3 GiB"]
    monkeypatch.setattr(
        resources, "measure_apart", lambda work, *rest: found["sampling"] if work == "scoring" else FOUND
    )
    run(monkeypatch, resources, "--sizes", "512")
    printed = capsys.readouterr().out
    assert "512² 8-1024-8-8: 512x512, as wide as the widest published" in printed
    assert "needs 5 GiB" in printed
    assert "≈ 1,234" in printed


def test_a_process_that_ended_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, -9, stdout=""))
    content = document(monkeypatch, capsys, resources, "--quick", "--sizes", "64")
    assert content["results"][0]["works"]["scoring"]["not_measured"].startswith("ended with status -9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "65"], "got 65, allowed is some of 64, 128, 256, 512"),
        (["--rows", "0"], "--rows: at least 1"),
    ],
)
def test_wrong_arguments_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, resources, *arguments)
    assert message in capsys.readouterr().err
