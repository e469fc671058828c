"""The benchmark of /v1/score runs the real service and says what it measured."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import scoring


@pytest.mark.long
def test_every_mode_is_measured_beside_the_bare_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scoring", "--images", "1,2", "--repeats", "1", "--json"])
    scoring.main()
    document = json.loads(capsys.readouterr().out)
    assert [(row["images"], row["mode"]) for row in document["results"]] == [
        (count, mode) for count in (1, 2) for mode in ("bare pass", "plain", "verdict", "maps", "overlay")
    ]
    for row in document["results"]:
        assert row["images_per_second"] == pytest.approx(1000 * row["images"] / row["milliseconds"])
        assert (row["mode"] == "bare pass") == (row["times_bare_pass"] == 1)
