"""The log holds each due step once, also after crashes and resumed runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from training.log import FILE_NAME, RunLog, last_epoch_bits_per_dim, read_log
from training.trainer import StepReport

REPORT = StepReport(
    step=1,
    total_steps=95,
    epoch=0.0,
    loss=-1.0,
    bits_per_dim=3.0,
    grad_norm=1.0,
    learning_rate=1e-3,
    images_per_second=100.0,
    seconds=1.0,
    skipped_steps=0,
)


def write(directory: Path, first: int, last: int) -> None:
    with RunLog(directory, first - 1) as log:
        for step in range(first, last + 1):
            log.record(replace(REPORT, step=step, epoch=step / 20, bits_per_dim=float(step)))


def steps(directory: Path) -> list[int]:
    return [line["step"] for line in read_log(directory)]


def test_every_tenth_step_and_the_last(tmp_path: Path) -> None:
    write(tmp_path, 1, 95)
    assert steps(tmp_path) == [*range(10, 91, 10), 95]


def test_lines_beyond_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    write(tmp_path, 1, 60)
    write(tmp_path, 35, 95)
    assert steps(tmp_path) == [*range(10, 91, 10), 95]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 1, 30)
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text()[:-20])
    write(tmp_path, 21, 40)
    assert steps(tmp_path) == [10, 20, 30, 40]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.record(replace(REPORT, step=10, loss=math.nan, grad_norm=math.inf))
    line = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["bits_per_dim"]) == (None, None, 3.0)


def test_mean_of_the_last_epoch(tmp_path: Path) -> None:
    assert last_epoch_bits_per_dim(tmp_path) is None
    write(tmp_path, 1, 60)
    assert last_epoch_bits_per_dim(tmp_path) == (50 + 60) / 2
