"""The display: plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from training.commands import PlainProgress, progress_bar
from training.duration import duration
from training.progress import ProgressDisplay
from training.trainer import StepReport

REPORT = StepReport(
    step=1,
    total_steps=100,
    epoch=0.1,
    loss=-1.0,
    bits_per_dim=3.0,
    grad_norm=1.0,
    learning_rate=1e-3,
    images_per_second=100.0,
    seconds=1.0,
    skipped_steps=0,
)


def show(terminal: bool, seconds_per_line: float = 1e9) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=140)
    display = ProgressDisplay(
        console, resumed_step=0, total_steps=100, batch_size=50, seconds_per_line=seconds_per_line
    )
    with display:
        for step in (1, 2, 100):
            display.update(replace(REPORT, step=step, loss=-float(step), images_per_second=100.0 * step))
        display.note("a [note] about /a/path")
    return stream.getvalue()


def test_plain_lines_for_the_first_and_the_last_step() -> None:
    lines = show(terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 1/100", "step 100/100"]
    # 99 steps of 50 images at 100 images/s are left after the first.
    assert "loss -1.0000  3.000 bits/dim  100 images/s  0:00:50 left" in lines[0]
    assert lines[-1] == "a [note] about /a/path"


def test_plain_lines_every_so_often() -> None:
    assert len(show(terminal=False, seconds_per_line=0).splitlines()) == 4


def test_a_bar_on_a_terminal() -> None:
    text = show(terminal=True)
    assert "100/100" in text
    assert "bits/dim" in text
    assert "a [note]" in text


def test_skipped_steps_are_shown() -> None:
    display = ProgressDisplay(Console(file=io.StringIO()), resumed_step=0, total_steps=100, batch_size=50)
    display.update(replace(REPORT, skipped_steps=2))
    assert display.figures().endswith("2 steps skipped")


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]


def test_other_commands_tell_how_far_they_are_without_a_terminal_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.commands.SECONDS_PER_LINE", -1.0)
    progress = progress_bar()
    assert isinstance(progress, PlainProgress)
    with progress:
        images, unknown = progress.add_task("tiny", total=None), progress.add_task("warming up", total=None)
        progress.update(images, completed=1280, total=10_000)
        progress.advance(images, 20)
        progress.update(unknown, description="now [this]")
    streams = capsys.readouterr()
    assert streams.err.splitlines() == ["tiny: 1,280 of 10,000", "tiny: 1,300 of 10,000", "now [this]"]
    assert streams.out == ""


def test_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        task = progress.add_task("tiny", total=100)
        for _ in range(100):
            progress.advance(task)
    assert capsys.readouterr().err == ""
